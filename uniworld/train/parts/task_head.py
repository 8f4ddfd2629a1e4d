"""The task head of `tiny`: from the VLM's state of the last "assistant" token to "answer in text" or "draw".

Source: UniWorld-V1, section on the unified architecture. The VLM is trained before, and frozen.

Letters: B conversations, D width of the VLM.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.save import TASK_HEAD_FILE
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.tiny_configs import TASK_HEAD_HIDDEN
from uniworld.data.scenes.make import VERSION
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.engine.request import Turn
from uniworld.models.prompts import PromptProcessor, chat_text, instruction
from uniworld.models.task_head import DRAW_CLASS, TaskHead
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.latents import LatentCache, file_mark
from uniworld.train.parts.sizes import HIDDEN, PREPROCESSOR
from uniworld.train.parts.vlm import load_vlm
from uniworld.train.parts.words import IDS, open_tokenizers

# Every other conversation talks; the rest draw.
TASKS = ("understanding", "edit", "understanding", "t2i", "understanding", "perceive", "understanding", "compose")
CHAT = "understanding"
SCORED_AT_ONCE = 32


class Routing:
    """The part `task_head`."""

    not_for_making = ("module",)  # the VLM is, and stays on the CPU

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        words = open_tokenizers(config.words)
        tokenizer = load_tokenizer(words, "Qwen2Tokenizer")
        self.processor = PromptProcessor(tokenizer, VisionProcessor(PREPROCESSOR), own_turn=True)
        self.vlm_folder = Path(config.parts) / "vlm" / "model"
        self.vlm = load_vlm(self.vlm_folder)
        self.module: nn.Module = TaskHead(HIDDEN, TASK_HEAD_HIDDEN)
        self._cache: LatentCache | None = None

    def make(self, seeds: range) -> dict[str, Tensor]:
        """states [B, D], and labels [B] int64: 1 where a picture is asked for."""
        if self._cache is None:  # in the process that makes batches: open files do not travel
            self._cache = self._open_cache()
        states, labels = self._cache[[seed % self.config.num_items for seed in seeds]]
        return {"states": torch.from_numpy(states).float(), "labels": torch.from_numpy(labels)[:, 0].long()}

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        labels = batch["labels"].to(self._device)
        logits = self.module(batch["states"].to(self._device, self.module[0].weight.dtype)).float()
        return F.cross_entropy(logits, labels), {"right": (logits.argmax(-1) == labels).float().mean()}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Share of held-out conversations that are routed rightly."""
        right = []
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            states, labels = self._encode(range(start, start + SCORED_AT_ONCE), "held-out")
            drawn = self.module.draw_probability(states.to(self._device)).cpu() >= 0.5
            right.append((drawn.long() * DRAW_CLASS == labels).float().mean())
        return {"accuracy": float(torch.stack(right).mean())}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """The file `task_head_final.pt`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().to(STORED_DTYPE) for name, tensor in self.module.state_dict().items()}
        torch.save(state, folder / TASK_HEAD_FILE)

    @property
    def _device(self) -> torch.device:
        return self.module[0].weight.device

    def _open_cache(self) -> LatentCache:
        """Of this VLM: another one has a cache of its own. The frozen VLM reads a conversation once."""
        marks = (file_mark(path) for path in (*weight_files(self.vlm_folder), Path(self.config.words) / IDS))
        folder = Path(self.config.run_dir) / f"states-{'-'.join(marks)}-{VERSION}"
        return LatentCache(folder, self.config.num_items, (HIDDEN,), 1, self._make_items)

    def _make_items(self, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        states, labels = self._encode(seeds, "train")
        return states.half().numpy(), labels[:, None].short().numpy()

    @torch.no_grad()
    def _encode(self, seeds: Sequence[int], split: str) -> tuple[Tensor, Tensor]:
        """What the VLM makes of each conversation's last "assistant" [B, D], and the labels [B]."""
        items = [make_item(TASKS[s % len(TASKS)], s, split, size_px=self.config.size_px) for s in seeds]
        asked = [asked_at(item, turn=s % num_questions(item)) for s, item in zip(seeds, items)]
        inputs = self.processor.encode(*zip(*asked))
        states = self.vlm.encode(inputs).hidden_states
        labels = torch.tensor([0 if item.task == CHAT else DRAW_CLASS for item in items])
        return states[torch.arange(len(states)), list(inputs.assistant_positions)], labels


def num_questions(item: Item) -> int:
    return len(item.conversations) // 2


def asked_at(item: Item, turn: int) -> tuple[str, Sequence[Image.Image]]:
    """The prompt of a turn, as the engine writes it after the turns before, for a model whose `images_last` is true,
    and the pictures in it."""
    given = item.pictures if item.task == CHAT else item.pictures[:-1]
    pictures = tuple(Image.fromarray(np.ascontiguousarray(picture)) for picture in given)
    said = [instruction(message["value"]) for message in item.conversations]
    history = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(said[: 2 * turn])]
    return chat_text(said[2 * turn], len(pictures), history), pictures
