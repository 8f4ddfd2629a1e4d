"""The training run: builds the parts, goes on where an earlier process stopped, and sequences the steps.

A step is: batches -> encoder states -> loss -> `Sharded.backward_and_step` -> EMA -> metrics, and from time to time
validation and a checkpoint. All ranks take the same turns: whether to stop, and whether one of them failed, is agreed
once a step.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniworld.checkpoint.precision import emulates_bf16
from uniworld.config import TrainConfig, to_yaml
from uniworld.models.unified import UniWorld
from uniworld.train import build, sharding, validate
from uniworld.train.checkpoints import checkpoints_dir, complete_checkpoints, write_config
from uniworld.train.ema import ShardedEMA
from uniworld.train.flops import StepFlops, peak_flops, sample_tokens
from uniworld.train.metrics import Metrics, memory_gib
from uniworld.train.optim import learning_rate
from uniworld.train.resume import Checkpointer
from uniworld.train.sharding import Sharded, StepReport
from uniworld.train.signals import EXIT_STOPPED, StopSignals
from uniworld.train.stages import patterns_of
from uniworld.train.step import drop_states, rank_generator, rolls_out, training_loss

GO_ON, STOP, FAILED = 0, 1, 2  # what ranks agree on; FAILED + r: rank r failed


class Trainer:
    """One process of a training run.

    Args:
        config: of the run.
        quiet: no progress on stderr.

    Attributes:
        step: steps done; sharded, ema: of the run, once `run` has built them.
    """

    def __init__(self, config: TrainConfig, *, quiet: bool = False):
        self.config, self.quiet = config, quiet
        self.step = self.skipped_steps = self.skipped_in_row = 0

    def run(self) -> int:
        """Train to `num_steps`, or until a signal; returns the exit code, 0 or 143.

        Raises: ValueError after `max_bad_steps` skipped steps in a row, or where data, config or checkpoint are at
            fault; OSError where a checkpoint could not be written.
        """
        self._build()
        self._restore()
        self.metrics = Metrics(self.config, rank=self.world.rank, first_step=self.step, quiet=self.quiet)
        self._announce()
        with StopSignals() as signals:
            try:
                return self._train(signals)
            finally:
                self.metrics.close()

    def _build(self) -> None:
        config = self.config
        validate.check(config)
        build.check(config)
        self.world = sharding.init()
        shown = self.world.rank == 0 and not self.quiet
        self.parts = build.load_parts(config, self.world, shown)
        model = build.build_train_model(config, self.parts)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._flops, self._peak = StepFlops(model), peak_flops(self.world.device)
        self.batches = build.open_batches(config, self.parts, self.world, shown)
        self._iterator = iter(self.batches.source)
        self.sharded = Sharded(model, config, self.world)
        self.ema = ShardedEMA(self.sharded, config.ema) if config.ema.enabled else None
        self.checkpointer = Checkpointer(config, self.sharded, self.ema)
        self.generator = rank_generator(config.seed, self.world.rank)

    def _restore(self) -> None:
        """Go on from a checkpoint where there is one; a new run folder gets the resolved config."""
        self.restored = self.checkpointer.restore()
        if self.restored is not None:
            self.step, state = self.restored.step, self.restored.rank_state
            self.skipped_steps, self.skipped_in_row = state["skipped_steps"], state["skipped_in_row"]
            self.batches.source.load_state_dict(state["batches"])
            if self.restored.world_changed:
                self.generator = rank_generator(self.config.seed + self.step, self.world.rank)
            else:
                self.generator.set_state(state["generator"])
        if self.world.rank == 0:
            folder = Path(self.config.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, to_yaml(self.config))

    def _announce(self) -> None:
        config, sharding_config, world = self.config, self.config.sharding, self.world
        accumulated, batch_size = sharding_config.accumulation_steps, config.data.batch_size
        patterns = patterns_of(config)
        more = f" and {len(patterns) - 3} patterns more" if len(patterns) > 3 else ""
        start = "starts anew" if self.restored is None else f"goes on from {self.restored.folder.name}"
        lines = [
            f"{config.stage.preset}: trains {self.sharded.num_trained:,} of {self.num_parameters:,} parameters of "
            f"{config.model.path} ({', '.join(patterns[:3])}{more})",
            f"{world.size} x {world.device.type}, ZeRO {sharding_config.zero_stage}, {sharding_config.dtype}: "
            f"{batch_size} x {accumulated} x {world.size} = {batch_size * accumulated * world.size} samples a step",
            f"{config.run_dir}: {start}, {config.num_steps:,} steps in all",
        ]
        if sharding_config.dtype == "bf16" and emulates_bf16(world.device):
            lines.append("sharding.dtype=bf16: this CPU does not compute in bf16 and is far faster with fp32")
        for line in lines:
            self.metrics.note(line)

    def _train(self, signals: StopSignals) -> int:
        config = self.config
        window = _Window(self.world.device)
        saved = self.step
        while self.step < config.num_steps:
            batches, stop = self._next_batches(signals)
            report = self._train_step(batches, window)
            self._count_skipped(report)
            if self.step % config.log_every_steps == 0:
                self._log(report, window)
                window = _Window(self.world.device)
            paused_s = time.perf_counter()
            self._validate()
            if stop or self.step % config.checkpoint.every_steps == 0 or self.step == config.num_steps:
                self._save()
                saved = self.step
            window.start_s += time.perf_counter() - paused_s  # pictures and checkpoints are no part of a step
            if stop:
                self.checkpointer.wait()
                self.metrics.note(f"stopped by signal after step {saved}; run again to go on")
                return EXIT_STOPPED
        self.checkpointer.wait()
        self.metrics.note(f"finished after step {self.step}; make a model of it with: uniworld export {config.run_dir}")
        return 0

    def _next_batches(self, signals: StopSignals) -> tuple[list[Any], bool]:
        """The micro-batches of a step, and whether it is the last one because some rank was signalled.

        Raises: what failed on this rank, reading data or writing a checkpoint in the background; on the others a
            ValueError naming that rank.
        """
        batches, error, flag = [], None, GO_ON
        try:
            self.checkpointer.poll()
            batches = [next(self._iterator) for _ in range(self.config.sharding.accumulation_steps)]
        except Exception as failure:
            error, flag = failure, FAILED + self.world.rank
        agreed = self.world.agree(max(flag, STOP if signals.received else GO_ON))
        if agreed >= FAILED:
            raise error or ValueError(f"rank {agreed - FAILED} failed; see its error")
        return batches, agreed == STOP

    def _train_step(self, batches: list[Any], window: "_Window") -> StepReport:
        """One optimizer step over its micro-batches."""
        self.step += 1
        self.lr = learning_rate(self.config, self.step)
        self.sharded.set_lr(self.lr)
        report = None
        for number, batch in enumerate(batches):
            encoded = drop_states(self.batches.encode(batch), self.config, self.step, number)
            rollout = rolls_out(self.config, self.step, number)
            loss = training_loss(self.sharded, encoded, self.config.flow, self.generator, rollout=rollout)
            report = self.sharded.backward_and_step(loss)
            window.add(loss, encoded, self._flops(encoded))
        assert report is not None
        if self.ema is not None and not report.skipped:
            self.ema.update()
        return report

    def _count_skipped(self, report: StepReport) -> None:
        """Count skipped steps; too many in a row end the run."""
        self.skipped_steps += report.skipped
        self.skipped_in_row = self.skipped_in_row + 1 if report.skipped else 0
        if self.skipped_in_row < self.config.max_bad_steps:
            return
        good = complete_checkpoints(checkpoints_dir(self.config.run_dir))
        where = f"the last good checkpoint is {good[-1].folder}" if good else "no checkpoint was saved before"
        raise ValueError(
            f"max_bad_steps={self.config.max_bad_steps}: loss or gradient was not finite in as many steps in a row, up "
            f"to step {self.step}; {where}"
        )

    def _log(self, report: StepReport, window: "_Window") -> None:
        """Metrics over the steps since the last time, over all ranks."""
        loss, losses, images, tokens, flops, bad = self.world.total([*window.sums(), self.batches.num_bad()])
        seconds = time.perf_counter() - window.start_s
        peak = None if self._peak is None else self._peak * self.world.size
        record = {
            "loss": loss / losses,
            "grad_norm": report.grad_norm,
            "lr": self.lr,
            "skipped_steps": self.skipped_steps,
            "bad_samples": int(bad),
            "step_s": seconds / self.config.log_every_steps,
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "memory_gib": memory_gib(self.world.device),
            "mfu": None if peak is None else flops / seconds / peak,
        }
        self.metrics.log(self.step, record)

    def _validate(self) -> None:
        """Pictures with the averaged weights."""
        every = self.config.validation.every_steps
        if every and self.step % every == 0:
            model = self.parts if isinstance(self.parts, UniWorld) else None
            path = validate.run(self.config, model, self.ema, self.world, self.step)
            self.metrics.note(f"step {self.step}: drew {path}")

    def _save(self) -> None:
        state = {
            "generator": self.generator.get_state(),
            "batches": self.batches.source.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self.skipped_in_row,
        }
        self.checkpointer.save(self.step, state)


@dataclass
class _Window:
    """Sums of this rank over the steps since the last log."""

    device: torch.device

    def __post_init__(self):
        self.start_s = time.perf_counter()
        self._loss = torch.zeros((), device=self.device)  # read only when it is logged
        self._losses = self._images = self._tokens = self._flops = 0.0

    def add(self, loss: Tensor, batch: Any, flops: float) -> None:
        self._loss += loss.detach()
        self._losses += 1
        self._images += len(batch)
        self._tokens += sum(img + txt for img, txt in sample_tokens(batch))
        self._flops += flops

    def sums(self) -> tuple[float, ...]:
        """Loss, number of losses, images, tokens, FLOPs."""
        return float(self._loss), self._losses, self._images, self._tokens, self._flops
