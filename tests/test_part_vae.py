"""The image autoencoder of `tiny`."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from parts_of_tiny import ROOT, train
from PIL import Image
from safetensors.torch import load_file

from uniworld.cli_train_part import as_this_machine_computes
from uniworld.config import OptimConfig
from uniworld.models.vae import ImageAutoencoder, to_pixels
from uniworld.train.parts import make_part, vae
from uniworld.train.parts.config import PartConfig, load_part_config
from uniworld.train.parts.vae import picture as picture_of


def test_the_autoencoder_learns_and_its_latents_have_unit_size(tmp_path):
    """A few seconds at 64 pixels."""
    config = load_part_config(
        ROOT / "configs" / "tiny" / "vae.yaml",
        [f"run_dir={tmp_path}", "num_steps=40", "size_px=64", "batch_size=4", "num_checked=16", "num_workers=0"]
        + ["ema.decay=0.8", "optim.lr=1e-2", "optim.warmup_steps=5"],
    )
    config = as_this_machine_computes(config, quiet=True)
    fresh = make_part(config).score()["psnr_db"]
    trainer, _ = train(config, make_part(config))
    scores, folder = trainer.finish()
    assert fresh < 11.5 and scores["psnr_db"] > fresh + 2.5, (fresh, scores)
    assert scores["psnr_things_db"] != scores["psnr_db"] and scores["psnr_things_db"] > 8
    vae = ImageAutoencoder.from_config(json.loads((folder / "config.json").read_text()))
    vae.model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    pixels = torch.cat([to_pixels(Image.fromarray(picture_of(seed, "train", 64))) for seed in range(16)])
    latents = vae.mean_latents(pixels)
    assert float(latents.mean()) == pytest.approx(0, abs=0.2) and float(latents.std()) == pytest.approx(1, abs=0.2)
    with torch.no_grad():
        module = trainer.part.module
        expected = module.decode(module.encode(pixels).latent_dist.mean).sample
    assert float((vae.decode(latents) - expected).norm() / expected.norm()) < 0.05  # stored in bf16


def test_a_pixel_of_a_thing_counts_more(tmp_path):
    """The loss of a made-up error: there and elsewhere, in the proportion of the weights."""
    config = PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, size_px=64, batch_size=2)
    part = make_part(config)
    batch = part.make(range(2))
    assert batch["pictures"].shape == (2, 64, 64, 3) and 0.01 < batch["there"].float().mean() < 0.6
    pixels, there = vae.as_pixels(batch["pictures"]), batch["there"][:, None].float()
    losses = []
    for error in (0.1 * there, 0.1 * (1 - there)):
        decoded = SimpleNamespace(sample=pixels + error)
        with mock.patch.object(part.module, "decode", return_value=decoded):
            losses.append(float(part.loss(batch, torch.Generator())[0].detach()))
    share = float(there.mean())
    assert losses[0] / losses[1] == pytest.approx(vae.THING_WEIGHT * share / (1 - share), rel=1e-2)


def test_the_autoencoder_may_start_from_exported_weights(parts, tmp_path):
    folder = parts / "vae" / "model"
    part = make_part(PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, seed=7, start=str(folder)))
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, stored[name].float()) and p.requires_grad for name, p in part.module.named_parameters())
    with pytest.raises(ValueError, match="only parts vae, vlm, semantic_encoder, redux start from .* not base"):
        PartConfig(part="base", run_dir=str(tmp_path), num_steps=1, start=str(folder))


def test_a_decoder_alone_leaves_the_latents_as_they_are(parts, tmp_path):
    folder = parts / "vae" / "model"
    config = PartConfig(
        part="vae", run_dir=str(tmp_path), num_steps=3, batch_size=2, start=str(folder), decoder_only=True,
        num_checked=32, optim=OptimConfig(lr=1e-2), num_workers=0, size_px=64,
    )  # fmt: skip
    trainer, _ = train(config, make_part(config))
    _, made = trainer.finish()
    before, after = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (folder, made))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("encoder.")} <= same
    assert not any(name.startswith("decoder.") and name.endswith("weight") and "norm" not in name for name in same)
    scaling = [json.loads((path / "config.json").read_text()) for path in (folder, made)]
    assert scaling[0] == scaling[1]
    with pytest.raises(ValueError, match="decoder_only=True: is of part vae with start"):
        PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, decoder_only=True)
