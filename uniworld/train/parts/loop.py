"""The loop that trains one part of `tiny` on one device: batches, steps, averages, checkpoints, a score at the end.

Step s sees the items of seeds s * batch_size ... and nothing else is random but what a part draws from the generator
of that step, so that a run that was killed goes on bit by bit from its last checkpoint.
"""

import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from uniworld.checkpoint.save import atomic_folder, write_json
from uniworld.config import to_yaml
from uniworld.kernels.ema_update import ema_update
from uniworld.train import checkpoints
from uniworld.train.ema import decay_at
from uniworld.train.metrics import Metrics, memory_gib
from uniworld.train.optim import Muon, learning_rate, make_optimizer, matrix_names, set_learning_rate
from uniworld.train.parts.config import PartConfig
from uniworld.train.signals import EXIT_STOPPED, StopSignals
from uniworld.train.writer import Writer

MAX_WORKERS = 12
WEIGHTS, AVERAGE, OPTIMIZER = "weights.safetensors", "average.safetensors", "optimizer.pt"


class Part(Protocol):
    """What is trained. `module` holds all its parameters.

    not_for_making: attributes, `module` among them, that `make` does without; they may be on a GPU, and stay out of
    loader processes.
    """

    module: nn.Module
    not_for_making: ClassVar[tuple[str, ...]]

    def make(self, seeds: range) -> Any:
        """A batch of the items of `seeds`: tensors in dicts, lists or tuples. Runs in loader processes."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of a batch, which is as `make` gave it, on the CPU; and what else to log."""

    def score(self) -> dict[str, float]:
        """How good the part is, on held-out items."""

    def export(self, folder: Path) -> None:
        """Write the part as a model folder holds it."""


class PartTrainer:
    """Trains `part` as `config` says.

    Attributes: step, steps done.
    """

    def __init__(self, config: PartConfig, part: Part, *, quiet: bool = False):
        self.config, self.part, self.quiet = config, part, quiet
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        part.module.to(self.device, torch.float32).train()
        self.parameters = [p for p in part.module.parameters() if p.requires_grad]
        self.masters = self.parameters  # what is optimized
        if config.dtype == "bf16":
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
            part.module.to(torch.bfloat16)
        self.average = [p.detach().clone() for p in self.masters]
        self.optimizer = self._make_optimizer()
        self.root = checkpoints.checkpoints_dir(config.run_dir)
        self.step = 0

    def run(self, seconds: float | None = None) -> int:
        """Train to `num_steps`, until a signal, or for `seconds`; returns the exit code, 0 where it is finished.

        Raises: ValueError where checkpoint and config do not fit, or where the loss is not finite; OSError where a
            checkpoint could not be written.
        """
        self._restore()
        started = time.monotonic()
        metrics = Metrics(self.config, rank=0, first_step=self.step, quiet=self.quiet)
        count = sum(p.numel() for p in self.parameters)
        metrics.note(f"{self.config.part}: {count:,} parameters, step {self.step} of {self.config.num_steps}")
        try:
            self._window = Window()
            with StopSignals() as signals:
                for batch in self._batches():
                    self._train_step(batch, metrics)
                    late = seconds is not None and time.monotonic() - started > seconds
                    stop = signals.received or late
                    if stop or self.step % self.config.checkpoint.every_steps == 0 or self._done:
                        self._save()
                    if stop and not self._done:
                        metrics.note(f"stopped after step {self.step}; run again to go on")
                        return EXIT_STOPPED
        finally:
            metrics.close()
        return 0

    def _make_optimizer(self) -> Optimizer | Muon:
        if self.config.optim.name != "muon":
            return make_optimizer(self.config.optim, self.masters)
        names = matrix_names(self.part.module)
        by_kind: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, master in zip(self._names(), self.masters):
            by_kind[name in names].append(master)
        return Muon(self.config.optim, by_kind[True], by_kind[False])

    @property
    def _done(self) -> bool:
        return self.step >= self.config.num_steps

    def finish(self) -> tuple[dict[str, float], Path]:
        """Score and export the averaged weights; returns the scores, also in `scores.json`, and the exported folder."""
        with torch.no_grad():
            self.part.module.float().eval()
            for parameter, average in zip(self.parameters, self.average):
                parameter.copy_(average)
        scores = self.part.score()
        folder = Path(self.config.run_dir)
        with atomic_folder(folder / "model", overwrite=True) as temporary:
            self.part.export(temporary)
        write_json(folder / "scores.json", scores)
        return scores, folder / "model"

    def _batches(self) -> Iterator[Any]:
        config = self.config
        dataset = _Steps(self.part, config)
        num = most_workers() if config.num_workers is None else config.num_workers
        workers = {"num_workers": num, "multiprocessing_context": "spawn"} if num else {}
        sampler = range(self.step, config.num_steps)
        return iter(DataLoader(dataset, batch_size=None, sampler=sampler, **workers))

    def _train_step(self, batch: Any, metrics: Metrics) -> None:
        config = self.config
        self.step += 1
        lr = learning_rate(config, self.step)
        set_learning_rate(self.optimizer, lr, config.optim)
        generator = torch.Generator().manual_seed(config.seed * 2**32 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "autocast"):
            loss, more = self.part.loss(batch, generator)
        loss.backward()
        limit = config.optim.clip_norm or float("inf")
        self._widen_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.masters, limit))
        if not norm < float("inf"):
            value = float(loss.detach())
            raise ValueError(f"step {self.step}: loss {value:g}, its gradient is not finite; lower optim.lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round_masters()
        ema_update(self.average, self.masters, decay_at(self.step, config.ema))
        self._window.add({"loss": loss, **more})
        if self.step % config.log_every_steps == 0:
            self._log(norm, lr, metrics)
            self._window = Window()

    def _widen_gradients(self) -> None:
        """Move the gradients of bf16 weights to their masters."""
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters):
                master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None

    @torch.no_grad()
    def _round_masters(self) -> None:
        if self.masters is not self.parameters:
            torch._foreach_copy_(self.parameters, self.masters)

    def _log(self, norm: float, lr: float, metrics: Metrics) -> None:
        seconds = self._window.seconds_a_step()
        record = {
            **self._window.means(),
            "grad_norm": norm,
            "lr": lr,
            "step_s": seconds,
            "images_per_s": self.config.batch_size / seconds,
            "memory_gib": memory_gib(self.device),
        }
        metrics.log(self.step, record)

    def _restore(self) -> None:
        folder = Path(self.config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clean(self.root)
        found = checkpoints.choose(folder, self.config.checkpoint.resume)
        if found is not None:
            self._load(found.folder)
            averages = load_file(found.folder / AVERAGE, str(self.device))
            for average, name in zip(self.average, self._names()):
                average.copy_(averages[name])
            state = torch.load(found.folder / OPTIMIZER, map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(state)
            self.step = found.step
        checkpoints.write_config(folder, to_yaml(self.config))

    def _load(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS, str(self.device))
        wrong = sorted(self._weights().keys() ^ weights.keys())
        try:
            self.part.module.load_state_dict(weights, strict=False)  # a tied weight has one of its names there
        except RuntimeError as error:
            wrong = wrong or [" ".join(str(error).split())]
        if wrong:
            raise ValueError(f"{folder}: is of another model ({wrong[0]})")
        with torch.no_grad():
            for master, name in zip(self.masters, self._names()):
                master.copy_(weights[name])

    def _weights(self) -> dict[str, Tensor]:
        """Parameters, unrounded, and persistent buffers, each once."""
        module = self.part.module
        once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        rounded = {name: tensor for name, tensor in module.state_dict().items() if name in once}
        found = rounded | dict(zip(self._names(), self.masters))
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def _names(self) -> list[str]:
        return [name for name, p in self.part.module.named_parameters() if p.requires_grad]

    def _save(self) -> None:
        target = self.root / checkpoints.folder_name(self.step)
        checkpoints.hidden(target, "writing").mkdir(parents=True, exist_ok=True)
        writer = Writer(
            target=target,
            rank=0,
            world_size=1,
            files={
                WEIGHTS: self._weights(),
                AVERAGE: dict(zip(self._names(), self.average)),
                OPTIMIZER: self.optimizer.state_dict(),
            },
            manifest={"format": checkpoints.FORMAT, "step": self.step, "world_size": 1},
            keep=self.config.checkpoint.keep,
        )
        writer.run()
        if writer.error is not None:
            raise writer.error


class Window:
    """What is measured between two lines of the log. Each measure is a mean of the steps that have it: batches may take
    turns, and a single one would always be of the same kind."""

    def __init__(self):
        self.start, self.num_steps = time.perf_counter(), 0
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, measures: dict[str, Tensor | float]) -> None:
        self.num_steps += 1
        for name, value in measures.items():
            value = value.detach() if isinstance(value, Tensor) else value  # no graph lives on in a sum
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def seconds_a_step(self) -> float:
        return (time.perf_counter() - self.start) / self.num_steps


class _Steps(Dataset):
    """The batch of each step."""

    def __init__(self, part: Part, config: PartConfig):
        self.maker, self.config = copy.copy(part), config
        for name in part.not_for_making:
            setattr(self.maker, name, None)

    def __len__(self) -> int:
        return self.config.num_steps

    def __getitem__(self, step: int) -> Any:
        start = self.config.first_item + step * self.config.batch_size
        return self.maker.make(range(start, start + self.config.batch_size))


def most_workers() -> int:
    """All CPUs but one, at most MAX_WORKERS; on two CPUs none, where training itself needs both."""
    num = (os.cpu_count() or 1) - 1
    return min(num, MAX_WORKERS) if num > 1 else 0
