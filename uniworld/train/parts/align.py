"""The VLM's connector of `tiny`, aligned with the semantic one before any stage.

The states of a picture behind an instruction say what is to be at each place of the wanted picture (`vlm`). The DiT has
learned to read the semantic encoder's states (`redux`), and these mean nothing to it. So the connector first learns to
give, of the tokens of an edit's picture, what the semantic connector gives of the wanted picture at the same places:
both are in the DiT's terms then, a patch's place included.

Letters: B edits, N tokens of a picture to the VLM, T to the semantic encoder, D widths of their states.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.connector_files import override_connectors, read_connector, write_connector
from uniworld.checkpoint.locate import weight_files
from uniworld.data.scenes.tasks import make_item
from uniworld.models.connectors import Connector
from uniworld.models.prompts import PromptProcessor
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.conversations import conversation_text
from uniworld.train.parts.latents import LatentCache, file_mark
from uniworld.train.parts.sizes import HIDDEN, PREPROCESSOR, SIGLIP, SIGLIP_PREPROCESSOR
from uniworld.train.parts.trained import fill_encoder, trained
from uniworld.train.parts.vlm import load_vlm
from uniworld.train.parts.vlm_batches import NUM_TOKENS, TOKENS_PER_SIDE
from uniworld.train.parts.words import open_tokenizers

CONNECTOR, SEMANTIC = "denoise_projector", "siglip_projector"
PATCHES_PER_SIDE = SIGLIP["image_size"] // SIGLIP["patch_size"]
SHAPES = (NUM_TOKENS, HIDDEN), (PATCHES_PER_SIDE**2, SIGLIP["hidden_size"])  # of an item's states
NUM_VALUES = [math.prod(shape) for shape in SHAPES]
SCORED_AT_ONCE = 32


class Alignment:
    """The part `align`."""

    not_for_making = ("module", "semantic")  # VLM and semantic encoder are, and stay on the CPU

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        self.vlm_folder, self.siglip_folder, self.redux_folder = (
            trained(config, name) for name in ("vlm", "semantic_encoder", "redux")
        )
        words = open_tokenizers(config.words)
        self.processor = PromptProcessor(load_tokenizer(words, "Qwen2Tokenizer"), VisionProcessor(PREPROCESSOR))
        self.vlm = load_vlm(self.vlm_folder)
        self.encoder = SemanticEncoder.from_config(read_config(self.siglip_folder), SIGLIP_PREPROCESSOR)
        fill_encoder(self.siglip_folder, self.encoder.model)
        self.semantic = Connector(SIGLIP["hidden_size"], 3 * HIDDEN, HIDDEN).requires_grad_(False)
        override_connectors({SEMANTIC: self.semantic}, self.redux_folder)
        self.module: nn.Module = Connector(HIDDEN, 3 * HIDDEN, HIDDEN)
        self._cache: LatentCache | None = None

    def make(self, seeds: range) -> dict[str, Tensor]:
        """plans [B, N, D] of the VLM, and wanted [B, T, D] of the semantic encoder."""
        if self._cache is None:  # in the process that makes batches: open files do not travel
            folder = Path(self.config.run_dir) / f"states-{self._made_with}"
            self._cache = LatentCache(folder, self.config.num_items, (sum(NUM_VALUES),), 1, self._make_items)
        rows, _ = self._cache[[seed % self.config.num_items for seed in seeds]]
        return _as_batch(torch.from_numpy(rows).float())

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The squared error, as a share of the variance."""
        given, wanted = self._given_and_wanted(batch)
        loss = (given.float() - wanted).square().mean() / wanted.var()
        return loss, {"explained": 1 - loss.detach()}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Of edits of held-out scenes: the share of the variance that is explained."""
        pairs = []
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            batch = _as_batch(self._encode(range(start, start + SCORED_AT_ONCE), "held-out"))
            pairs.append(self._given_and_wanted(batch))
        given, wanted = (torch.cat(parts) for parts in zip(*pairs))
        return {"explained": 1 - float((given.float() - wanted).square().mean() / wanted.var())}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Both connectors, as the authors' stages export them."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: tensor.detach().float().cpu() for name, tensor in self.module.named_parameters()}
        write_connector(folder, CONNECTOR, own)
        write_connector(folder, SEMANTIC, read_connector(self.redux_folder / f"{SEMANTIC}.bin", SEMANTIC))

    @property
    def _made_with(self) -> str:
        files = (*weight_files(self.vlm_folder), *weight_files(self.siglip_folder))
        return "-".join(file_mark(path) for path in files)

    def _given_and_wanted(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both [B, N, D]; the semantic tokens are averaged to the places of the VLM's."""
        plans, wanted = (batch[name].to(self.module[0].weight) for name in ("plans", "wanted"))
        seen = self.semantic.to(plans)(wanted.flatten(0, 1)).float().unflatten(0, wanted.shape[:2])
        grid = seen.transpose(1, 2).unflatten(2, (PATCHES_PER_SIDE, -1))
        grid = F.interpolate(grid, size=(TOKENS_PER_SIDE, TOKENS_PER_SIDE), mode="bilinear", antialias=True)
        return self.module(plans.flatten(0, 1)).unflatten(0, plans.shape[:2]), grid.flatten(2).transpose(1, 2)

    def _make_items(self, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self._encode(seeds, "train").half().numpy(), np.zeros((len(seeds), 1), np.int16)

    @torch.no_grad()
    def _encode(self, seeds: Sequence[int], split: str) -> Tensor:
        """[B, all values of SHAPES]"""
        items = [make_item("edit", seed, split, size_px=self.config.size_px) for seed in seeds]
        prompts = [conversation_text(item.conversations[:-1]) for item in items]
        inputs = self.processor.encode(prompts, [[Image.fromarray(item.pictures[0])] for item in items])
        of_pictures = inputs.input_ids == self.processor.tokens.image_pad
        plans = self.vlm.encode(inputs).hidden_states[of_pictures].view(len(items), -1)
        wanted = self.encoder(self.encoder.preprocess([Image.fromarray(item.pictures[-1]) for item in items]))
        return torch.cat([plans, wanted.flatten(1)], dim=1)


def _as_batch(rows: Tensor) -> dict[str, Tensor]:
    plans, wanted = rows.split(NUM_VALUES, dim=1)
    return {"plans": plans.unflatten(1, SHAPES[0]), "wanted": wanted.unflatten(1, SHAPES[1])}
