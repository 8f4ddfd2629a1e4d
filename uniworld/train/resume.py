"""Saving a run and going on with it, bit by bit.

What is saved: trained parameters, master weights and optimizer (DeepSpeed's files), the EMA's slices, and for every
rank its random states and what the trainer adds, such as the data position. The folders are `train.checkpoints`'s.
"""

import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniworld.config import TrainConfig, to_yaml
from uniworld.train import checkpoints
from uniworld.train.checkpoints import CONFIG, DEEPSPEED, FORMAT, Checkpoint, checkpoints_dir, hidden
from uniworld.train.ema import ShardedEMA
from uniworld.train.saved import ema_file, rank_file, read_optimizer, read_rank, saved_ema
from uniworld.train.sharding import Sharded
from uniworld.train.writer import Writer, on_cpu
from uniworld.version import __version__

UNIVERSAL_STATES = ("exp_avg", "exp_avg_sq", "step")  # of an optimizer, what DeepSpeed's universal form carries


@dataclass(frozen=True)
class Restored:
    """Where the run goes on."""

    step: int
    """Steps done."""
    rank_state: dict[str, Any]
    """What the trainer gave to `save` on this rank; on rank 0 where the number of ranks changed."""
    world_changed: bool
    """Another number of ranks saved it: random states were not restored, and generators must be seeded anew."""
    folder: Path


class Checkpointer:
    """Saves and restores a run. Every method but `poll` is called by all ranks together.

    Args:
        config: `run_dir`, section checkpoint, and what is saved beside the weights.
        sharded: the model and its optimizer.
        ema: or None without one.
    """

    def __init__(self, config: TrainConfig, sharded: Sharded, ema: ShardedEMA | None):
        self.config, self.sharded, self.ema, self.world = config, sharded, ema, sharded.world
        self.root = checkpoints_dir(config.run_dir)
        self._writer: Writer | None = None

    def save(self, step: int, rank_state: dict[str, Any]) -> None:
        """Save step `step`; returns when it is on the disk, or with `checkpoint.asynchronous` when it is copied.

        Args:
            rank_state: what else this rank needs to go on: plain objects and tensors.

        Raises: OSError on all ranks where this or the checkpoint before it could not be written; what was complete
            stays.
        """
        self.wait()
        target = self.root / checkpoints.folder_name(step)
        self._prepare(target)
        files = self.sharded.state_files(DEEPSPEED) | self._own_files(rank_state)
        asynchronous = self.config.checkpoint.asynchronous
        self._writer = Writer(
            target=target,
            rank=self.world.rank,
            world_size=self.world.size,
            files=on_cpu(files) if asynchronous else files,
            manifest=self._manifest(step),
            keep=self.config.checkpoint.keep,
        )
        self._writer.start()
        if not asynchronous:
            self.wait()

    def poll(self) -> None:
        """Raise the OSError of a background save of this rank that failed; call it every step."""
        if self._writer is not None and not self._writer.running:
            writer, self._writer = self._writer, None
            if writer.error is not None:
                raise writer.error

    def wait(self) -> None:
        """Return when the checkpoint being written is complete. Raises: OSError on all ranks if it failed."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.wait()
        error = None if writer is None else writer.error
        if self.world.agree(int(error is not None)):
            raise error or OSError(f"{self.root}: a checkpoint was not saved; see the errors of the other ranks")

    def restore(self) -> Restored | None:
        """Go on from what `checkpoint.resume` says; None where the run starts anew.

        Raises: ValueError where the checkpoint does not fit the config; FileNotFoundError where it is not there.
        """
        if self.world.rank == 0:
            checkpoints.clean(self.root)
        self.world.barrier()
        checkpoint = checkpoints.choose(self.config.run_dir, self.config.checkpoint.resume)
        if checkpoint is None:
            return None
        self._check(checkpoint)
        world_changed = checkpoint.world_size != self.world.size
        if world_changed:
            self._load_universal(checkpoint)
            self._restore_other_states(checkpoint)
        else:
            self.sharded.load(checkpoint.folder, DEEPSPEED)
        self._restore_ema(checkpoint)
        state = read_rank(checkpoint, 0 if world_changed else self.world.rank)
        if not world_changed:
            set_random_states(state["random"])
        self.world.barrier()
        return Restored(checkpoint.step, state["trainer"], world_changed, checkpoint.folder)

    def _prepare(self, target: Path) -> None:
        """Make the folder that all ranks write into."""
        error = None
        if self.world.rank == 0:
            temporary = hidden(target, "writing")
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as failure:
                error = OSError(f"{target}: cannot be written ({failure.strerror})")
        if self.world.agree(int(error is not None)):
            raise error or OSError(f"{target}: cannot be written by rank 0")

    def _own_files(self, rank_state: dict[str, Any]) -> dict[str, Any]:
        state = {"random": random_states(), "trainer": rank_state, "layout": self.sharded.layout()}
        files: dict[str, Any] = {rank_file(self.world.rank): state}
        if self.world.rank == 0:
            files[CONFIG] = to_yaml(self.config).encode()
        if self.ema is not None:
            files[ema_file(self.world.rank)] = {f"{s.name}@{s.offset}": s.tensor for s in self.ema.slices()}
        return files

    def _manifest(self, step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "uniworld": __version__,
            "step": step,
            "world_size": self.world.size,
            "zero_stage": self.sharded.zero_stage,
            "dtype": self.config.sharding.dtype,
            "optimizer": self.config.optim.name,
            "trained": {name: list(shape) for name, shape in self.sharded.shapes.items()},
            "ema_updates": None if self.ema is None else self.ema.num_updates,
        }

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another kind of run."""
        manifest, title = checkpoint.manifest, f"checkpoint.resume={checkpoint.folder}"
        mine = {
            "sharding.zero_stage": ("zero_stage", self.sharded.zero_stage),
            "sharding.dtype": ("dtype", self.config.sharding.dtype),
            "optim.name": ("optimizer", self.config.optim.name),
        }
        for field, (key, value) in mine.items():
            if manifest[key] != value:
                raise ValueError(f"{title}: was saved with {field}={manifest[key]}, not {value}")
        if checkpoint.world_size != self.world.size and self.config.optim.name == "adamw8bit":
            ranks = f"{checkpoint.world_size} ranks, not {self.world.size}"
            raise ValueError(
                f"{title}: was saved by {ranks}, and the state of optim.name=adamw8bit cannot be re-divided"
            )
        saved = {name: tuple(shape) for name, shape in manifest["trained"].items()}
        if saved != self.sharded.shapes:
            different = sorted(dict(saved.items() ^ self.sharded.shapes.items()))
            raise ValueError(f"{title}: trains other parameters: {different[0]} and {len(different) - 1} more differ")

    def _load_universal(self, checkpoint: Checkpoint) -> None:
        """Load what another number of ranks saved, by way of DeepSpeed's universal checkpoint."""
        folder = hidden(self.root / checkpoint.folder.name, "universal")
        error = None
        if self.world.rank == 0:
            error = _convert_to_universal(checkpoint, folder)
        if self.world.agree(int(error is not None)):
            raise error or ValueError(f"{checkpoint.folder}: rank 0 could not convert it")
        self.sharded.load(folder, "all", universal=True)
        self.world.barrier()
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _restore_other_states(self, checkpoint: Checkpoint) -> None:
        """What the optimizer keeps of each element besides Adam's moments, which the universal form leaves out."""
        partitions, states = self.sharded.partitions(), self.sharded.optimizer_states()
        mine = {name: (offset, numel, index, at) for name, offset, numel, index, at in self.sharded.layout()}
        for rank in range(checkpoint.world_size):
            saved = read_optimizer(checkpoint, rank).states
            for name, offset, numel, index, at in read_rank(checkpoint, rank)["layout"]:
                if name not in mine:
                    continue
                my_offset, my_numel, my_index, my_at = mine[name]
                first, last = max(offset, my_offset), min(offset + numel, my_offset + my_numel)
                for key, values in saved[index].items():
                    if key in UNIVERSAL_STATES or not isinstance(values, Tensor) or not values.ndim or first >= last:
                        continue
                    partition = partitions[my_index]
                    whole = states[my_index].setdefault(key, torch.zeros_like(partition, dtype=values.dtype))
                    place = whole[my_at + first - my_offset : my_at + last - my_offset]
                    place.copy_(values[at + first - offset : at + last - offset])

    def _restore_ema(self, checkpoint: Checkpoint) -> None:
        if self.ema is None:
            return
        if checkpoint.manifest["ema_updates"] is None:  # it was off until now
            self.ema.restart()
        else:
            self.ema.load(saved_ema(checkpoint), checkpoint.manifest["ema_updates"])


def random_states() -> dict[str, Any]:
    """The states of every random generator that a library may draw from."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _convert_to_universal(checkpoint: Checkpoint, folder: Path) -> Exception | None:
    """Run DeepSpeed's converter; returns the error where it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    paths = ["--input_folder", str(checkpoint.folder / DEEPSPEED), "--output_folder", str(folder / "all")]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
    return ValueError(f"{checkpoint.folder}: cannot be converted for {checkpoint.world_size} -> other ranks: {last}")
