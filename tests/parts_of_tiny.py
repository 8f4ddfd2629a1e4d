"""What tests of the parts of `tiny` share: tokenizers, a VLM and other parts that have hardly learned."""

from pathlib import Path
from unittest import mock

import torch

from uniworld.train.parts import loop, make_part
from uniworld.train.parts import words as parts_words
from uniworld.train.parts.config import PartConfig, load_part_config

ROOT = Path(__file__).resolve().parent.parent


def train(config, part, **more):
    trainer = loop.PartTrainer(config, part, quiet=True)
    return trainer, trainer.run(**more)


def overfit(part, batch, num_steps, lr):
    """Train on one batch alone; (loss, what else is logged) of each step."""
    optimizer, generator = torch.optim.AdamW(part.module.parameters(), lr=lr), torch.Generator()
    logged = []
    for _ in range(num_steps):
        loss, more = part.loss(batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append((float(loss.detach()), {name: float(value) for name, value in more.items()}))
    return logged


def part_config(name, folder, words, parts, *more):
    changes = [f"run_dir={folder}", f"words={words}", f"parts={parts}", "num_checked=32", *more]
    return load_part_config(ROOT / "configs" / "tiny" / f"{name}.yaml", changes)


def make_words(folder):
    """Tokenizers that learned from a few texts."""
    with mock.patch.object(parts_words, "texts", lambda: parts_words.learned_texts(100)):
        return parts_words.open_tokenizers(folder)


def make_language(words, folder):
    """The vision-language part after 60 steps on one batch, the loss of each, and that batch."""
    changes = [f"run_dir={folder}", f"words={words}", "num_checked=4", "size_px=64", "look_items=0"]
    part = make_part(load_part_config(ROOT / "configs" / "tiny" / "vlm.yaml", changes))
    batch = part.make(range(4))
    losses = [loss for loss, _ in overfit(part, batch, num_steps=60, lr=3e-3)]
    return part, losses, batch


def make_parts(language, folder):
    """A folder of parts that the later ones build on: a fresh autoencoder, and the VLM that learned one batch."""
    vae = make_part(PartConfig(part="vae", run_dir=str(folder / "vae"), num_steps=1, num_checked=32))
    with torch.no_grad():
        vae.module.encoder.conv_out.bias[16:] = -10  # log variance: latents with hardly any noise, as trained ones
    vae.export(folder / "vae" / "model")
    language[0].export(folder / "vlm" / "model")
    return folder
