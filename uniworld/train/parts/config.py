"""Settings of the training of one part of `tiny`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from uniworld.config import CheckpointConfig, EMAConfig, OptimConfig, from_dict, read_yaml

STARTING = ("vae", "vlm", "semantic_encoder", "redux")  # from exported weights, if asked to


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A training run of one part, on one device."""

    part: Literal["vae", "vlm", "semantic_encoder", "base", "redux", "align", "task_head"]
    """What is trained; each part stands in a module of its name beside this one."""
    run_dir: str
    """Checkpoints, metrics and the part's weights go here."""
    num_steps: int
    start: str | None = None
    """Of parts vae, vlm and semantic_encoder: folder of exported weights to start from in place of random ones. Of part
    redux: a whole model, whose DiT and connector learn on in place of the base's."""
    decoder_only: bool = False
    """Of part vae with `start`: the encoder stays, and with it the latents that other parts have learned on."""
    seed: int = 0
    first_item: int = 0
    """Items are drawn from this number on: a run that goes on from another's weights by `start` begins behind its."""
    batch_size: int = 16
    """Items a step; an item of the scenes' world may hold several pictures."""
    size_px: int = 128
    parts: str = "runs/tiny"
    """Folder of the other parts' runs; a part that builds on another takes its weights from `PART/model` in it."""
    words: str = "runs/tiny/words"
    """Folder of the tokenizers, which the parts share; made from the words of the scenes where it is not there."""
    dtype: Literal["fp32", "bf16", "autocast"] = "fp32"
    """Of the computation: bf16 throughout, with weights rounded for every step, or torch's autocast to bf16. What is
    optimized and averaged is fp32. On a CPU without bf16 `train-part` computes in fp32."""
    num_items: int = 100000
    """Of parts base, redux, align, task_head and semantic_encoder: items that are trained on again and again, from what
    frozen parts make of them, which is kept in `run_dir` (19 KB an item, of redux 40, of align 34, of the task head
    0.4), or in memory for the semantic encoder (80 KB)."""
    look_items: int = 0
    """Of part vlm: items that it learns to see, to point in and to plan edits of, before it learns to answer."""
    words_share: float = 0.25
    """Of part redux: how much of a batch is drawn from words; the rest from semantic states."""
    plain_items: int = 0
    """Of part base: items after which guidance is learned."""
    num_workers: int | None = None
    """Processes that draw scenes; 0 draws in the training process, null takes most CPUs where there are 3 or more."""
    num_checked: int = 256
    """Held-out items that the score of the part is measured on."""
    log_every_steps: int = 20
    tensorboard: bool = False
    wandb_project: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "num_items", "num_checked", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.words_share < 1:
            raise ValueError(f"words_share={self.words_share}: must be at least 0 and below 1")
        if self.first_item < 0:
            raise ValueError(f"first_item={self.first_item}: must be at least 0")
        if self.size_px < 64 or self.size_px % 16:
            raise ValueError(f"size_px={self.size_px}: must be a multiple of 16 from 64 on")
        if self.start is not None and self.part not in STARTING:
            allowed = ", ".join(STARTING)
            raise ValueError(f"start={self.start}: only parts {allowed} start from exported weights, not {self.part}")
        if self.decoder_only and (self.part != "vae" or self.start is None):
            raise ValueError("decoder_only=True: is of part vae with start, whose encoder is kept")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: must be at least 0")


def load_part_config(path: str | Path, overrides: Sequence[str] = ()) -> PartConfig:
    """Read a YAML file such as `configs/tiny/vae.yaml`; overrides and errors are those of `load_config`."""
    return from_dict(PartConfig, read_yaml(path, overrides))
