"""The task head of `tiny`: from the VLM's state of the last "assistant" token to "answer in text" or "draw".

Source: UniWorld-V1, section on the unified architecture. The VLM is trained before, and frozen.

Letters: B conversations.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.names import VLM, authors_names
from uniworld.checkpoint.save import TASK_HEAD_FILE
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.tiny_configs import TASK_HEAD_HIDDEN
from uniworld.checkpoint.weights import Plan, fill, module_targets, read_headers
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.engine.request import Turn
from uniworld.models.prompts import PromptProcessor, VLMInputs, chat_text, instruction
from uniworld.models.task_head import DRAW_CLASS, TaskHead
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.sizes import HIDDEN, PREPROCESSOR
from uniworld.train.parts.words import open_tokenizers

# Every other conversation talks; the rest draw.
TASKS = ("understanding", "edit", "understanding", "t2i", "understanding", "perceive", "understanding", "compose")
CHAT = "understanding"
SCORED_AT_ONCE = 32


class Routing:
    """The part `task_head`."""

    not_for_making = ("module", "vlm")

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        tokenizer = load_tokenizer(open_tokenizers(config.words), "Qwen2Tokenizer")
        self.processor = PromptProcessor(tokenizer, VisionProcessor(PREPROCESSOR))
        self.vlm = load_vlm(Path(config.parts) / "vlm" / "model")
        self.module: nn.Module = TaskHead(HIDDEN, TASK_HEAD_HIDDEN)

    def make(self, seeds: range) -> dict[str, Any]:
        """The fields of VLMInputs, and labels [B] int64: 1 where a picture is asked for."""
        return self._batch(seeds, "train")

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        labels = batch["labels"].to(self._device)
        logits = self.module(self._states(batch)).float()
        return F.cross_entropy(logits, labels), {"right": (logits.argmax(-1) == labels).float().mean()}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Share of held-out conversations that are routed rightly."""
        right = []
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            batch = self._batch(range(start, start + SCORED_AT_ONCE), "held-out")
            drawn = self.module.draw_probability(self._states(batch)).cpu() >= 0.5
            right.append((drawn.long() * DRAW_CLASS == batch["labels"]).float().mean())
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

    def _batch(self, seeds: range, split: str) -> dict[str, Any]:
        items = [make_item(TASKS[s % len(TASKS)], s, split, size_px=self.config.size_px) for s in seeds]
        asked = [asked_at(item, turn=s % num_questions(item)) for s, item in zip(seeds, items)]
        prompts, pictures = zip(*asked)
        inputs = self.processor.encode(prompts, pictures)
        labels = torch.tensor([0 if item.task == CHAT else DRAW_CLASS for item in items])
        return {f.name: getattr(inputs, f.name) for f in fields(inputs)} | {"labels": labels}

    @torch.no_grad()
    def _states(self, batch: dict[str, Any]) -> Tensor:
        """[B, D]: what the VLM makes of each conversation's last "assistant"."""
        self.vlm.to(self._device)
        inputs = VLMInputs(**{name: value for name, value in batch.items() if name != "labels"})
        states = self.vlm.encode(inputs).hidden_states
        return states[torch.arange(len(states)), list(inputs.assistant_positions)]


def num_questions(item: Item) -> int:
    return len(item.conversations) // 2


def asked_at(item: Item, turn: int) -> tuple[str, Sequence[Image.Image]]:
    """The prompt of a turn, as the engine writes it after the turns before, and the pictures in it."""
    given = item.pictures if item.task == CHAT else item.pictures[:-1]
    pictures = tuple(Image.fromarray(np.ascontiguousarray(picture)) for picture in given)
    said = [instruction(message["value"]) for message in item.conversations]
    history = [
        Turn("user" if i % 2 == 0 else "assistant", text, pictures if i == 0 else ())
        for i, text in enumerate(said[: 2 * turn])
    ]
    return chat_text(said[2 * turn], 0 if turn else len(pictures), history), pictures


def load_vlm(folder: Path) -> VisionLanguageModel:
    """The trained VLM, fp32 and frozen. Raises: FileNotFoundError where it is not trained yet."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"parts: {folder} is not there; train it first (configs/tiny/vlm.yaml)")
    vlm = VisionLanguageModel.from_config(read_config(folder))
    targets = module_targets(vlm.model, lambda name: authors_names(VLM, name))
    plan = Plan(folder, read_headers(weight_files(folder)), targets, torch.device("cpu"), torch.float32)
    plan.check()
    fill([plan])
    return vlm
