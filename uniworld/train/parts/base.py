"""The base DiT of `tiny` with its text encoders, trained together from text to image.

What FLUX.1 brings to UniWorld: a DiT that draws what T5's states say. The noise levels and the loss are those of the
later stages. In the middle of its depth the DiT must also know what will stand where (`dense`): one that has to agree
with a representation learns many times faster (Yu et al., 2025, REPA), and here the scene graph is at hand. And what a
text speaks of must be read from T5's states and the pooled text, or colours and numbers, a few pixels, are not heeded.

Guidance, as FLUX.1-dev has it distilled, is learned from the model itself (Tang et al., 2025, "Diffusion Models without
Classifier-free Guidance"), once pictures are drawn: with v(g) the velocity at guidance g and v_0 that without words,
the target v becomes v + (1 - 1/g) (v(g) - v_0), whose fixed point is v_0 + g (v(1) - v_0).

Letters: B pictures, T tokens of a prompt, P width of the pooled text.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.names import diffusers_names
from uniworld.checkpoint.save import save_module, with_prefix, write_json
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.tiny_configs import MODEL_INDEX, SCHEDULER, clip_config
from uniworld.config import FlowConfig
from uniworld.data.scenes.graph import COLOURS, SHAPES
from uniworld.data.scenes.make import VERSION
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.kernels.flow_noise import flow_noise
from uniworld.kernels.flow_step import flow_step
from uniworld.models.blocks import AdaLinear
from uniworld.models.flow import LATENT_SCALE, TOKEN_PX, image_ids, initial_noise, sigmas, unpack
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.models.text_encoders import TextEncoders, token_ids
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vae import to_pil
from uniworld.train.noise import draw_sigma
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.dense import NOTHING, OF_A_SCENE, OF_A_THING, DenseHead, SaidHead, dense_labels, said_labels
from uniworld.train.parts.latents import LatentCache, file_mark
from uniworld.train.parts.sizes import DENOISER, VAE, t5_config
from uniworld.train.parts.vae import DIFFUSERS_STEM, as_pixels, load_vae
from uniworld.train.parts.words import IDS, caption, open_tokenizers, read_ids

# Of ten pictures five are drawn for prompts; the rest are the targets of the other tasks, maps and styles among them.
TASKS = ("t2i", "edit", "t2i", "perceive", "t2i", "edit", "t2i", "understanding", "t2i", "compose")
FLOW = FlowConfig()
GUIDANCE = (1.0, 5.0)
NO_POOLED_RATE = 0.5  # of prompts whose pooled embedding is that of "", as the later stages have it
NO_TEXT_RATE = 0.1  # of pictures that are drawn without any words
SAID_WEIGHT = 0.05
THING_WEIGHT = 3.0  # of the velocity's error where a thing is, in multiples of that elsewhere
POINTS_PER_SIDE = 2  # of a token: one for each latent
DENSE_WEIGHT = 0.2
DENSE_BLOCK = 2  # the single block before which the states are read
SCORED_AT_ONCE = 32
SCORED_SIGMAS = (0.2, 0.5, 0.8)
NUM_SAMPLES, SAMPLE_STEPS, DRAWN_GUIDANCE = 16, 28, 3.5


class BaseModel(nn.Module):
    """What learns: the DiT, both text encoders, and what reads the DiT's states."""

    def __init__(self, text: TextEncoders):
        super().__init__()
        self.denoiser = FluxTransformer(FluxConfig.from_dict(DENOISER))
        self.clip, self.t5 = text.clip.requires_grad_(True), text.t5.requires_grad_(True)
        self.said = nn.ModuleList([SaidHead(self.t5.config.d_model), SaidHead(self.clip.config.hidden_size)])
        self.dense = DenseHead(self.denoiser.config.dim, POINTS_PER_SIDE, reads_surface=False)
        start_as_identity(self.denoiser)


def start_as_identity(denoiser: FluxTransformer) -> None:
    """adaLN-Zero (Peebles and Xie, 2023): every block and the output start at zero, and open while training."""
    for module in denoiser.modules():
        if isinstance(module, AdaLinear):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)


class TextToImage:
    """The part `base`: FLUX's DiT, CLIP and T5 in the sizes of `sizes`."""

    not_for_making = ("module", "text")  # the autoencoder is, and stays on the CPU

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        self.words = open_tokenizers(config.words)
        self.clip_tokenizer = load_tokenizer(self.words / "flux" / "tokenizer", "CLIPTokenizer")
        self.t5_tokenizer = load_tokenizer(self.words / "flux" / "tokenizer_2", "T5Tokenizer")
        configs = clip_config(read_ids(self.words, "clip")), t5_config(read_ids(self.words, "t5"))
        self.text = TextEncoders.from_config(configs[0], self.clip_tokenizer, configs[1], self.t5_tokenizer)
        self.module: nn.Module = BaseModel(self.text)
        self.module.denoiser.single_transformer_blocks[DENSE_BLOCK].register_forward_pre_hook(self._keep_states)
        self.vae_folder = Path(config.parts) / "vae" / "model"
        self.vae = load_vae(self.vae_folder)
        self.vae.use_channels_last()
        self._cache: LatentCache | None = None

    def make(self, seeds: range) -> dict[str, Tensor]:
        """mean and std [B, C, h, w] of the latents; t5_ids [B, T] and clip_ids [B, 77] of what is said of them; the
        labels of `dense`."""
        if self._cache is None:  # in the process that makes batches: open files do not travel
            self._cache = self._open_cache()
        moments, numbers = self._cache[[seed % self.config.num_items for seed in seeds]]
        batch = self._as_batch(torch.from_numpy(moments), torch.from_numpy(numbers))
        return batch | {"guided": torch.tensor(seeds.start - self.config.first_item >= self.config.plain_items)}

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        B, device = len(batch["mean"]), self._device
        latents = self._latents(batch, generator)
        sigma = draw_sigma(FLOW, B, latents.shape[2] * latents.shape[3] // 4, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        low, high = GUIDANCE
        guidance = (low + (high - low) * torch.rand(B, generator=generator)).to(device)
        without, silent = (
            (torch.rand(B, generator=generator) < rate).to(device) for rate in (NO_POOLED_RATE, NO_TEXT_RATE)
        )
        labels = {name: batch[name].to(device) for name in ("points", "whole", "said")}
        states, pooled = self._condition(batch, without | silent, silent)
        pred, target = self._predict(states, pooled, latents, noise, sigma, guidance)
        dense, read = self.module.dense(self._states[:, : pred.shape[1]], labels)
        if batch["guided"]:
            every = torch.ones_like(silent)
            with torch.no_grad():
                nothing = self._condition(batch, every, every)
                alone, _ = self._predict(*nothing, latents, noise, sigma, torch.ones_like(guidance))
            share = torch.where(silent, 0.0, 1 - 1 / guidance)[:, None, None]
            target = target + share * (pred.detach() - alone).float()
        squared = (pred.float() - target).square().mean(-1)
        weights = thing_weights(labels["points"])
        said, found = self._read_said(states, pooled, labels, silent, without | silent)
        loss = (weights * squared).sum() / weights.sum() + DENSE_WEIGHT * dense + SAID_WEIGHT * said
        return loss, {"flow": squared.detach().mean(), "said": said.detach(), "said_right": found, **read}

    def _read_said(
        self, states: Tensor, pooled: Tensor, labels: dict[str, Tensor], silent: Tensor, without: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is read from T5's states and from the pooled text, where there are words: loss, share that T5's tell."""
        of_t5, of_clip = self.module.said
        said, background = labels["said"], labels["whole"][:, 0]
        if silent.all() or without.all():
            return states.new_zeros((), dtype=torch.float32), states.new_zeros(())
        loss, found = of_t5(states[~silent], said[~silent], background[~silent])
        return loss + of_clip(pooled[~without][:, None], said[~without], background[~without])[0], found

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The loss on held-out pictures at three noise levels; and `samples.png` beside the checkpoints, to look at."""
        found: dict[str, list[float]] = {f"loss_at_{sigma}": [] for sigma in SCORED_SIGMAS}
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            made = self._make_items(range(start, start + SCORED_AT_ONCE), "held-out")
            batch = self._as_batch(*map(torch.from_numpy, made))
            generator = torch.Generator().manual_seed(start)
            latents = self._latents(batch, generator)
            for sigma in SCORED_SIGMAS:
                noise = torch.randn(latents.shape, generator=generator).to(self._device)
                levels = torch.full((len(latents),), sigma, device=self._device)
                ones, none = torch.ones_like(levels), torch.zeros_like(levels, dtype=torch.bool)
                pred, target = self._predict(*self._condition(batch, none, none), latents, noise, levels, ones)
                found[f"loss_at_{sigma}"].append(float((pred.float() - target).square().mean()))
        self._save_samples(Path(self.config.run_dir) / "samples.png")
        return {name: float(np.mean(values)) for name, values in found.items()}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """A FLUX.1 folder: transformer, text encoders, tokenizers, scheduler, and the autoencoder it learned on."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "model_index.json", MODEL_INDEX)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(self.words / "flux" / name, folder / name)
        shutil.copytree(self.vae_folder, folder / "vae")
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        denoiser = _denoiser_tensors(self.module.denoiser)
        save_module(folder / "transformer", denoiser, DENOISER, DIFFUSERS_STEM, STORED_DTYPE)
        clip, t5 = clip_config(read_ids(self.words, "clip")), t5_config(read_ids(self.words, "t5"))
        named = ((with_prefix(name, "text_model."), tensor) for name, tensor in self.module.clip.named_parameters())
        save_module(folder / "text_encoder", named, clip, dtype=STORED_DTYPE)
        save_module(folder / "text_encoder_2", self.module.t5.named_parameters(), t5, dtype=STORED_DTYPE)

    @property
    def _device(self) -> torch.device:
        return self.module.denoiser.proj_out.weight.device

    def _open_cache(self) -> LatentCache:
        """Of this autoencoder and these words: other ones have a cache of their own."""
        marks = (file_mark(path) for path in self._made_with)
        folder = Path(self.config.run_dir) / f"latents-{'-'.join(marks)}-{VERSION}"
        return LatentCache(folder, self.config.num_items, self._shape, sum(self._numbers), self._make_items)

    @property
    def _made_with(self) -> tuple[Path, ...]:
        """Files that the cache depends on."""
        return self.vae_folder / f"{DIFFUSERS_STEM}.safetensors", self.words / IDS

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of an item's moments."""
        side = self.config.size_px // LATENT_SCALE
        return 2, VAE["latent_channels"], side, side

    @property
    def _lengths(self) -> tuple[int, int]:
        """Token ids of T5 and of CLIP."""
        return self.t5_tokenizer.model_max_length, self.clip_tokenizer.model_max_length

    @property
    def _numbers(self) -> tuple[int, ...]:
        """How many of T5's ids, of CLIP's, and of labels of points, of the whole, and of what is said."""
        points = self._points_per_side**2 * len(OF_A_THING)
        return *self._lengths, points, len(OF_A_SCENE), len(SHAPES) * len(COLOURS)

    @property
    def _points_per_side(self) -> int:
        """Of a picture."""
        return POINTS_PER_SIDE * self.config.size_px // TOKEN_PX

    def _make_items(self, seeds: Sequence[int], split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        return self._encode([make_item(TASKS[s % len(TASKS)], s, split, size_px=self.config.size_px) for s in seeds])

    @torch.no_grad()
    def _encode(self, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
        """Moments of the scaled latents [B, 2, C, h, w], and `_numbers` in a row, as the cache holds them."""
        said = [what_is_said(item) for item in items]
        levels = torch.from_numpy(np.stack([item.pictures[-1] for item in items]))
        mean, std = self.vae.encode_moments(as_pixels(levels).to(memory_format=torch.channels_last))
        moments = torch.stack([(mean - self.vae.shift) * self.vae.scale, std * self.vae.scale], dim=1)
        tokenizers = self.t5_tokenizer, self.clip_tokenizer
        ids = [token_ids(tokenizer, said, length) for tokenizer, length in zip(tokenizers, self._lengths)]
        scenes = [item.scenes[-1] for item in items]
        dense = dense_labels(scenes, self._points_per_side)
        numbers = torch.cat([*ids, dense["points"].flatten(1), dense["whole"], said_labels(scenes)], dim=1)
        return moments.half().numpy(), numbers.short().numpy()

    def _as_batch(self, moments: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        mean, std = moments.float().unbind(1)
        t5_ids, clip_ids, points, whole, said = numbers.long().split(self._numbers, dim=1)
        points = points.view(len(points), self._points_per_side, self._points_per_side, len(OF_A_THING))
        labels = {"points": points, "whole": whole, "said": said}
        return {"mean": mean, "std": std, "t5_ids": t5_ids, "clip_ids": clip_ids, **labels}

    def _keep_states(self, block: nn.Module, inputs: tuple) -> None:
        """Normalized states of the joint sequence [B, S, D], the picture's tokens first."""
        self._states = inputs[0]

    def _latents(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """A sample of the posterior."""
        noise = torch.randn(batch["mean"].shape, generator=generator)
        return (batch["mean"] + batch["std"] * noise).to(self._device)

    def _condition(self, batch: dict[str, Tensor], without: Tensor, silent: Tensor) -> tuple[Tensor, Tensor]:
        """T5's states [B, T, D] and the pooled text [B, P]: those of "" where `silent` and `without` [B] are true."""
        device, tokenizers = self._device, (self.t5_tokenizer, self.clip_tokenizer)
        t5_ids, clip_ids = (
            torch.where(empty[:, None], token_ids(tokenizer, [""], length).to(device), batch[name].to(device))
            for tokenizer, length, name, empty in zip(
                tokenizers, self._lengths, ("t5_ids", "clip_ids"), (silent, without)
            )
        )
        return self.module.t5(t5_ids).last_hidden_state, self.module.clip(clip_ids).pooler_output

    def _predict(
        self, states: Tensor, pooled: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The DiT's velocity and its target, both packed."""
        noisy, target = flow_noise(latents, noise, sigma, dtype=self.module.denoiser.proj_out.weight.dtype)
        ids = image_ids(self.config.size_px, self.config.size_px, latents.device)
        return self.module.denoiser(noisy, states, pooled, sigma, guidance, ids), target

    def _save_samples(self, path: Path) -> None:
        """A sheet of pictures drawn from held-out prompts."""
        items = [make_item("t2i", seed, "held-out", size_px=64) for seed in range(NUM_SAMPLES)]
        prompts = [what_is_said(item) for item in items]
        pictures = to_pil(self.vae.decode(self.draw(prompts)))
        size, columns = self.config.size_px, int(NUM_SAMPLES**0.5)
        sheet = Image.new("RGB", (columns * size, -(-NUM_SAMPLES // columns) * size))
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (i % columns * size, i // columns * size))
        sheet.save(path)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")

    def draw(self, prompts: list[str]) -> Tensor:
        """Latents [B, C, h, w] of pictures of these prompts, as the engine samples them; seeds 0, 1, ..."""
        size, device, denoiser = self.config.size_px, self._device, self.module.denoiser
        states, pooled = self.text.t5_states(prompts), self.text.pooled(prompts)
        latents = torch.cat([initial_noise(seed, size, size, VAE["latent_channels"]) for seed in range(len(prompts))])
        latents, ids = latents.to(device), image_ids(size, size, device)
        levels = sigmas(SAMPLE_STEPS, latents.shape[1]).to(device)
        ones = torch.ones(len(prompts), device=device)
        guidance = DRAWN_GUIDANCE * ones
        for step, change in enumerate(levels.diff()):
            velocity = denoiser(latents, states, pooled, levels[step] * ones, guidance, ids)
            latents = flow_step(latents, velocity, change[None])
        return unpack(latents, size, size)


def thing_weights(points: Tensor) -> Tensor:
    """What each token's error weighs, [B, T], by the labels [B, P, P, 4] of its points."""
    things = F.max_pool2d((points[..., 0] != NOTHING).float(), POINTS_PER_SIDE)
    return 1 + (THING_WEIGHT - 1) * things.flatten(1)


def what_is_said(item: Item) -> str:
    """The text that a picture is drawn from: of a prompt its words, of a map its instruction, else a caption."""
    if item.task == "t2i":
        return item.conversations[0]["value"]
    if item.task == "perceive":
        return f"{item.facts.instruction} {caption(item)}"
    return caption(item)


def _denoiser_tensors(denoiser: FluxTransformer) -> Iterator[tuple[str, Tensor]]:
    """Under diffusers' names: fused q, k and v come apart."""
    for name, tensor in denoiser.named_parameters():
        keys = diffusers_names(name)
        yield from zip(keys, tensor.detach().chunk(len(keys)))
