"""Training over many processes: the only file that knows DeepSpeed.

`init` joins the process group, also alone without a launcher. `Sharded` wraps the model in a DeepSpeed engine and gives
the rest of the trainer three things: a step that either happens on all ranks or on none, this rank's slices of the
trained parameters (the fp32 master weights where ZeRO holds them), and whole named tensors gathered from slices.

Letters: N ranks, P trained parameters of one rank's slices.
"""

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uniworld.config import TrainConfig
from uniworld.train.optim import make_optimizer
from uniworld.train.writer import Collected

BUCKET_NUMEL = 200_000_000  # gradients reduced together, at most
PERSISTENT_NUMEL = 100_000  # ZeRO 3 keeps parameters below this size whole on every rank
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    """CPU group for flags, so that agreeing on them does not wait for the GPU."""

    def agree(self, flag: int) -> int:
        """The largest `flag` of any rank; a collective."""
        if self.size == 1:
            return flag
        value = torch.tensor(flag)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks, one a number; a collective."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, group=self.control)
        return values.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def init(timeout_s: float = 1800) -> World:
    """Join the process group that torchrun or the deepspeed launcher describes, or make one of this process alone.

    NCCL on GPUs, gloo on CPUs. Raises: ValueError with what to install where DeepSpeed is missing.
    """
    deepspeed = _import_deepspeed()
    _describe_lone_process()
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Gloo serves on a CPU; DeepSpeed's own shared-memory op would first be compiled for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    control = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, control)


def exit_process(code: int) -> NoReturn:
    """Leave at once with `code`, after the group was closed.

    The threads of gloo and NCCL sometimes abort a process that exits in the ordinary way.
    """
    if dist.is_initialized() and code == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of names it still uses
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; training needs: pip install 'uniworld[train]'") from None
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns on every start
    return deepspeed


def _describe_lone_process() -> None:
    """Set the launcher's variables for a process without one; DeepSpeed would otherwise look for MPI."""
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in lone.items()})


def engine_config(config: TrainConfig, num_trained: int, on_gpu: bool) -> dict[str, Any]:
    """What DeepSpeed is told. Learning rate, schedule, loss scaling and logging stay with us."""
    sharding = config.sharding
    bf16 = sharding.dtype == "bf16"
    bucket = min(BUCKET_NUMEL, max(num_trained, 1))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": sharding.accumulation_steps,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": {
            "stage": sharding.zero_stage,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "sub_group_size": 10**12,  # one optimizer step over all parameters, which Prodigy needs
            "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if sharding.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if bf16 and sharding.accumulation_steps > 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


@dataclass(frozen=True)
class StepReport:
    """How an optimizer step ended, the same on all ranks."""

    grad_norm: float
    """Before clipping, over all trained parameters; infinite where the step was skipped."""
    skipped: bool
    """A loss or gradient of some rank was not finite: no parameter changed."""


@dataclass(frozen=True)
class Slice:
    """A piece of one trained parameter that this rank owns. Over all ranks the slices cover everything once."""

    name: str
    offset: int
    """Of the first element, in the flattened parameter."""
    flat_offset: int
    """Of the first element, in the vector of all trained parameters in model order, without padding."""
    tensor: Tensor
    """[numel], a view that stays at its place and shows the current values."""

    @property
    def numel(self) -> int:
        return self.tensor.numel()


class Sharded:
    """A model whose trained parameters are optimized under ZeRO; call it like the model.

    Args:
        model: parameters that require gradients are trained, the rest stays in the compute dtype.
        config: sections sharding, optim and data.
        world: from `init`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, world: World):
        self.model, self.world = model, world
        self.zero_stage = config.sharding.zero_stage
        self.dtype = DTYPES[config.sharding.dtype]
        model.to(self.dtype)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("stage: no parameter is trained")
        self.names = list(trained)
        self.shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self._parameters = trained
        self._accumulation_steps, self._num_losses = config.sharding.accumulation_steps, 0
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its memory use
            self.engine, *_ = _import_deepspeed().initialize(
                model=model,
                model_parameters=list(trained.values()),
                optimizer=make_optimizer(config.optim, list(trained.values())),
                config=engine_config(config, self.num_trained, world.device.type == "cuda"),
                dist_init_required=False,
            )
        self._owners = self._gather_owners()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    @property
    def num_trained(self) -> int:
        return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in self._parameters.values())

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def backward_and_step(self, loss: Tensor) -> StepReport | None:
        """Add the gradients of one micro-batch; after the last one of a step, clip and update.

        A loss that is not finite makes its own gradients NaN, so that the check of the reduced gradients, which ZeRO
        does in any case, finds it on all ranks without another collective.

        Returns: None until the last micro-batch of the step.
        """
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        self.engine.step()
        self._num_losses += 1
        if self._num_losses % self._accumulation_steps:
            return None
        return StepReport(float(self.engine.get_global_grad_norm()), not self.engine.was_step_applied())

    def slices(self, source: Literal["master", "params"] = "master") -> list[Slice]:
        """This rank's slices of the trained parameters, in model order: fp32 master weights or compute parameters.

        Masters are in host memory with `sharding.offload_optimizer`.
        """
        found, start = [], 0
        for name, parameter in self._parameters.items():
            piece = _zero3_slice(parameter, source, self.world) if self.zero_stage == 3 else _slice(parameter, source)
            if piece is not None:
                offset, tensor = piece
                found.append(Slice(name, offset, start + offset, tensor))
            start += torch.Size(self.shapes[name]).numel()
        return found

    def partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer updates on this rank, in the order in which they are saved."""
        optimizer = self.engine.optimizer
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))

    def optimizer_states(self) -> list[dict[str, Any]]:
        """What the optimizer keeps of each partition."""
        return [self.engine.optimizer.optimizer.state[partition] for partition in self.partitions()]

    def layout(self) -> list[tuple[str, int, int, int, int]]:
        """Where the master slices lie: (name, offset in the parameter, numel, partition, offset in the partition)."""
        partitions = self.partitions()
        found = []
        for piece in self.slices("master"):
            address = piece.tensor.untyped_storage().data_ptr()
            index = next(i for i, p in enumerate(partitions) if p.untyped_storage().data_ptr() == address)
            position = piece.tensor.storage_offset() - partitions[index].storage_offset()
            found.append((piece.name, piece.offset, piece.numel, index, position))
        return found

    def gather(
        self, tensors: Sequence[Tensor], *, dtype: torch.dtype = torch.float32, to_all: bool = False
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Whole tensors from slices, one parameter at a time; every rank must go through all of them.

        Args:
            tensors: one for each of `slices()`, of its size and of `dtype`, on this rank's device or in host memory.
            to_all: give every rank the tensor, else rank 0 alone and the others None.

        Yields: (name, tensor of the parameter's shape on this rank's device), in model order.
        """
        mine = iter(tensors)
        receives = to_all or self.world.rank == 0
        for name, owners in self._owners.items():
            shape = self.shapes[name]
            full = torch.empty(shape, dtype=dtype, device=self.world.device) if receives else None
            for rank, offset, numel in owners:
                own = next(mine) if rank == self.world.rank else None
                place = None if full is None else full.view(-1)[offset : offset + numel]
                self._move(rank, own, place, to_all)
            yield name, full

    def write_params(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Overwrite the compute parameters from slices, on all ranks; master weights stay.

        With fp32 under ZeRO 3 the compute parameters are the master weights: keep copies of `slices("params")` first.
        """
        with torch.no_grad():
            if self.zero_stage == 3:
                self._write_zero3(tensors)
                return
            for name, full in self.gather(tensors, dtype=dtype, to_all=True):
                self._parameters[name].copy_(full)

    def state_files(self, tag: str) -> dict[str, Any]:
        """What this rank saves in DeepSpeed's layout: trained parameters, master weights, optimizer; all ranks.

        Returns: objects for `torch.save` by path, which starts with `tag`. Their tensors are those of the training.
        """
        files = Collected()
        writes, self.engine.checkpoint_engine = self.engine.checkpoint_engine, files
        self.engine._copy_recovery_script = lambda folder: None  # it would write at once
        try:
            self.engine.save_checkpoint(".", tag=tag, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self.engine.checkpoint_engine = writes
        return files.states

    def load(self, folder: str | Path, tag: str, *, universal: bool = False) -> None:
        """Restore what `state_files` gave, for as many ranks and the same ZeRO stage; all ranks.

        Args:
            folder: `folder/tag` holds the files.
            universal: it holds DeepSpeed's universal checkpoint instead, which any number of ranks can load.
        """
        self.engine._config.load_universal_checkpoint = universal
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"{folder}/{tag}: DeepSpeed found no checkpoint there")

    def _gather_owners(self) -> dict[str, list[tuple[int, int, int]]]:
        """For each trained parameter, (rank, offset, numel) of the slices, by rank."""
        mine = [(s.name, s.offset, s.numel) for s in self.slices("params")]
        everyone: list[list[tuple[str, int, int]]] = [mine]
        if self.world.size > 1:
            everyone = [[] for _ in range(self.world.size)]
            dist.all_gather_object(everyone, mine, group=self.world.control)
        owners: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self.names}
        for rank, pieces in enumerate(everyone):
            for name, offset, numel in pieces:
                owners[name].append((rank, offset, numel))
        return owners

    def _move(self, rank: int, own: Tensor | None, place: Tensor | None, to_all: bool) -> None:
        """Bring the slice of `rank` (`own` there) to `place` on the ranks that have one."""
        if own is not None and place is not None:
            place.copy_(own)
        if to_all and self.world.size > 1:
            dist.broadcast(place, src=rank)
        elif not to_all and rank != 0:
            if self.world.rank == 0:
                dist.recv(place, src=rank)
            elif own is not None:
                dist.send(own.to(self.world.device).contiguous(), dst=0)

    def _write_zero3(self, tensors: Sequence[Tensor]) -> None:
        optimizer = self.engine.optimizer
        optimizer.parameter_offload.partition_all_parameters()
        for piece, tensor in zip(self.slices("params"), tensors):
            piece.tensor.copy_(tensor)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _slice(parameter: nn.Parameter, source: str) -> tuple[int, Tensor] | None:
    """(offset, values) of this rank's slice under ZeRO 1 and 2; None where the parameter is another rank's."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    tensor = mapping.hp_fragment if source == "master" else parameter.data.view(-1)[start : start + numel]
    return start, tensor.detach()


def _zero3_slice(parameter: nn.Parameter, source: str, world: World) -> tuple[int, Tensor] | None:
    """The same under ZeRO 3, which cuts every parameter into equal parts; the last ones may hold padding."""
    shard = parameter.ds_tensor
    start = world.rank * shard.numel()
    numel = min(shard.numel(), parameter.ds_numel - start)
    if numel <= 0:
        return None
    tensor = parameter._z3_optimizer.get_local_fp32_param(parameter) if source == "master" else shard
    return start, tensor.detach()[:numel]
