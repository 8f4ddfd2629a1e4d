"""The semantic encoder of `tiny`: a vision tower that learns which caption belongs to which picture.

The loss is SigLIP's (Zhai et al., 2023, equation 1): every pair of picture and caption in the batch is a yes-or-no
question. SigLIP2 adds losses on single patches, so that its states hold detail; here each patch's state must give back
its pixels at half resolution, the image autoencoder's latents of it, what its points show (`dense`), which patch it is,
and where its things end and what they look like alone (`cutouts`), through one linear layer each: the DiT draws those
latents from these states, to which it gives no positions. The latents of things count more. The text tower and those
layers are thrown away.

Letters: B pictures, T patches of one, L tokens of a caption, D width, E width of the common space, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.save import save_module, with_prefix, write_json
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.data.scenes.tasks import make_item
from uniworld.models.flow import pack
from uniworld.models.known_world import KnownWorld
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.tokenizers import load_tokenizer
from uniworld.train.parts.attention import use_fast_attention
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.cutouts import CutoutHead, alone, cover_labels
from uniworld.train.parts.dense import NOTHING, DenseHead, PlaceHead, dense_labels
from uniworld.train.parts.kept import KeptItems
from uniworld.train.parts.sizes import DENOISER, SIGLIP, SIGLIP_PREPROCESSOR
from uniworld.train.parts.trained import fill_encoder, trained
from uniworld.train.parts.vae import as_pixels, load_vae, picture, psnr
from uniworld.train.parts.words import caption, open_tokenizers

TASKS = ("t2i", "edit", "understanding")
EMBEDDING = 128
MAX_TOKENS = 96
TEXT_LAYERS, TEXT_HEADS = 2, 4
RECONSTRUCTION_WEIGHT, LATENTS_WEIGHT, PLACE_WEIGHT = 2.0, 20.0, 0.5
THING_WEIGHT = 6.0  # of the latents of a patch that is all thing
POINTS_PER_SIDE = 4  # of a patch
FIRST_SCALE, FIRST_BIAS = 10.0, -10.0  # SigLIP's: at first nearly every pair is a no
SCORED_AT_ONCE = 32
KNOWN_RATIO = 16  # training pictures that the known world is made of, for every held-out one that its limit is


class TextTower(nn.Module):
    """Captions to the common space: a small transformer and the mean of its states."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, dim))
        layer = nn.TransformerEncoderLayer(dim, TEXT_HEADS, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, TEXT_LAYERS, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L] -> [B, D]."""
        states = self.layers(self.tokens(ids) + self.places[: ids.shape[1]], src_key_padding_mask=~mask)
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


class TwoTowers(nn.Module):
    """Vision tower, text tower, and what brings both together."""

    def __init__(self, vocab_size: int):
        super().__init__()
        dim, patch = SIGLIP["hidden_size"], SIGLIP["patch_size"]
        self.vision = SemanticEncoder.from_config(SIGLIP, SIGLIP_PREPROCESSOR).model.requires_grad_(True)
        table = next(weight for name, weight in self.vision.named_parameters() if "position_embedding" in name)
        with torch.no_grad():
            table.copy_(place_waves(SIGLIP["image_size"] // patch, dim))
        self.text = TextTower(vocab_size, EMBEDDING)
        self.attend = nn.Linear(dim, 1)
        self.project = nn.Linear(dim, EMBEDDING)
        self.pixels = nn.Linear(dim, 3 * (patch // 2) ** 2)
        self.latents = nn.Linear(dim, DENOISER["in_channels"])
        self.cutouts = CutoutHead(dim, DENOISER["in_channels"])
        self.dense = DenseHead(dim, POINTS_PER_SIDE)
        self.place = PlaceHead(dim, (SIGLIP["image_size"] // patch) ** 2)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))

    def embed_pictures(self, states: Tensor) -> Tensor:
        """[B, T, D] -> [B, E] of length 1: a weighted mean of the patches."""
        weights = self.attend(states).softmax(1)
        return F.normalize(self.project((weights * states).sum(1)), dim=-1)

    def embed_captions(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(self.text(ids, mask), dim=-1)


class Contrastive:
    """The part `semantic_encoder`: SigLIP's vision tower in the sizes of `sizes.SIGLIP`."""

    not_for_making = ("module",)

    def __init__(self, config: PartConfig):
        if config.size_px != SIGLIP["image_size"]:
            raise ValueError(f"size_px={config.size_px}: must be {SIGLIP['image_size']}, which the tower sees")
        torch.manual_seed(config.seed)
        self.config = config
        self.tokenizer = load_tokenizer(open_tokenizers(config.words), "Qwen2Tokenizer")
        self.module: nn.Module = TwoTowers(len(self.tokenizer))
        if config.start is not None:
            fill_encoder(Path(config.start), self.module.vision)
            self.module.vision.requires_grad_(True)
        use_fast_attention(self.module.vision)
        self.vae = load_vae(trained(config, "vae"))
        self.vae.use_channels_last()  # with one CPU core in bf16 the encoder takes 0.20 s, not 0.33
        self.items = KeptItems(config.num_items)

    def make(self, seeds: range) -> dict[str, Any]:
        """levels uint8 [B, H, W, 3]; latents fp16 [B, T, C], and those of the things alone; ids and mask
        [B, MAX_TOKENS] of a caption of each picture; the labels of `cutouts` and `dense`."""
        return self.items.take(seeds, self._batch)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        module = self.module
        batch = {name: tensor.to(module.bias.device) for name, tensor in batch.items()}
        pixels = as_pixels(batch["levels"])
        states = module.vision(pixels).last_hidden_state
        logits = self._logits(states, batch)
        same = 2 * torch.eye(len(logits), device=logits.device) - 1
        contrastive = -F.logsigmoid(same * logits).sum() / len(logits)
        squared = (module.pixels(states) - patches(pixels)).square().mean()
        found = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        dense, right = module.dense(states, batch)
        more = {"contrastive": contrastive.detach(), "psnr_db": psnr(squared.detach()), "found": found, **right}
        place, more["place_right"] = module.place(states)
        latents, errors = self._read_latents(states, batch)
        cutouts, read = module.cutouts(states, batch["alone_latents"], batch["cover"])
        loss = contrastive + RECONSTRUCTION_WEIGHT * squared + LATENTS_WEIGHT * latents + dense + PLACE_WEIGHT * place
        return loss + cutouts, more | errors | read

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Of 32 held-out captions, how often a picture's own is the nearest; PSNR of the patches' pixels; the errors of
        the latents and of what things cover; and how often what a point shows is read rightly."""
        found, squares, rights = [], [], []
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            batch = self._batch(range(start, start + SCORED_AT_ONCE), "held-out")
            batch = {name: tensor.to(self.module.bias.device) for name, tensor in batch.items()}
            pixels = as_pixels(batch["levels"])
            states = self.module.vision(pixels).last_hidden_state
            nearest = self._logits(states, batch).argmax(1).cpu()
            found.append((nearest == torch.arange(SCORED_AT_ONCE)).float().mean())
            squares.append((self.module.pixels(states) - patches(pixels)).square().mean())
            read = self.module.dense(states, batch)[1] | self._read_latents(states, batch)[1]
            read |= self.module.cutouts(states, batch["alone_latents"], batch["cover"])[1]
            rights.append(read | {"place_right": self.module.place(states)[1]})
        read = {name: float(torch.stack([right[name] for right in rights]).mean()) for name in rights[0]}
        return {"found": float(torch.stack(found).mean()), "psnr_db": float(psnr(torch.stack(squares).mean())), **read}

    def export(self, folder: Path) -> None:
        """The folder `siglip`."""
        tensors = self.module.vision.named_parameters()
        named = ((with_prefix(name, "vision_model."), tensor) for name, tensor in tensors)
        save_module(folder, named, SIGLIP, dtype=STORED_DTYPE)
        write_json(folder / "preprocessor_config.json", SIGLIP_PREPROCESSOR)
        num = self.config.num_checked
        KnownWorld.of(self._states(KNOWN_RATIO * num, "train"), self._states(num, "held-out")).save(folder)

    @torch.no_grad()
    def _states(self, num: int, split: str) -> Tensor:
        """Of pictures of all tasks, maps and styles among them [num, T, D]."""
        found = []
        for start in range(0, num, SCORED_AT_ONCE):
            seeds = range(start, min(start + SCORED_AT_ONCE, num))
            levels = np.stack([picture(seed, split, self.config.size_px) for seed in seeds])
            pixels = as_pixels(torch.from_numpy(levels).to(self.module.bias.device))
            found.append(self.module.vision(pixels).last_hidden_state.float().cpu())
        return torch.cat(found)

    def _read_latents(self, states: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of the latents, weighted by how much of a patch shows things; and its mean over all
        patches and over those that are mostly thing."""
        errors = (self.module.latents(states).float() - batch["latents"]).square().mean(-1)
        share = (self.module.dense.by_token(batch["points"])[..., 0] != NOTHING).float().mean(-1)
        weights = 1 + (THING_WEIGHT - 1) * share
        found = {"latents_error": errors.detach().mean(), "things_error": errors.detach()[share > 0.5].mean()}
        return (weights * errors).sum() / weights.sum(), found

    def _batch(self, seeds: Sequence[int], split: str = "train") -> dict[str, Any]:
        items = [make_item(TASKS[s % len(TASKS)], s, split, size_px=self.config.size_px) for s in seeds]
        tokens = self.tokenizer(
            [caption(item) for item in items],
            add_special_tokens=False,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        levels = torch.from_numpy(np.stack([item.pictures[-1] for item in items]))
        scenes, side = [item.scenes[-1] for item in items], self.config.size_px // SIGLIP["patch_size"]
        cutouts = torch.from_numpy(np.stack([alone(scene, self.config.size_px) for scene in scenes]))
        labels = dense_labels(scenes, POINTS_PER_SIDE * side) | {"cover": cover_labels(scenes, side)}
        latents = {"latents": self._latents(levels), "alone_latents": self._latents(cutouts)}
        said = {"ids": tokens.input_ids, "mask": tokens.attention_mask.bool()}
        return {"levels": levels, **latents, **said, **labels}

    @torch.no_grad()
    def _latents(self, levels: Tensor) -> Tensor:
        """fp16 [B, T, C]: what the autoencoder makes of pictures, with the noise of its encoder left out."""
        pixels = as_pixels(levels).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.dtype == "autocast"):
            return pack(self.vae.mean_latents(pixels)).half()

    def _logits(self, states: Tensor, batch: dict[str, Any]) -> Tensor:
        """[B, B]: row a picture, column a caption."""
        module = self.module
        ids, mask = (batch[name][:, : int(batch["mask"].sum(1).max())] for name in ("ids", "mask"))
        similarity = module.embed_pictures(states) @ module.embed_captions(ids, mask).T
        return (module.log_scale.exp() * similarity + module.bias).float()


def place_waves(side: int, dim: int) -> Tensor:
    """[side^2, dim], where the position table starts: sine and cosine of row and column at dim / 4 frequencies.

    The DiT's rotary embedding is made of such waves; here they are to be linear in the states, and not only decodable.
    Source: the tables of Vaswani et al., 2017, section 3.5, in two dimensions as in He et al., 2022, MAE.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    waves = get_2d_sincos_pos_embed(dim, side, base_size=side, output_type="pt")
    return waves.roll(dim // 2, 1).float()  # diffusers has columns first


def patches(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, T, 3 (patch / 2)^2], at half resolution."""
    side = SIGLIP["patch_size"] // 2
    return F.unfold(F.avg_pool2d(pixels, 2), side, stride=side).transpose(1, 2)
