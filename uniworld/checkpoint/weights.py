"""Strict, memory-mapped reading of safetensors weights into modules whose parameters do not exist yet.

A `Plan` says which tensor of which file goes where. All plans are checked from the file headers before the first
weight is read; then each tensor goes straight from the mapped file to its device and dtype.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

MAX_LISTED = 10
MAX_READERS = 8  # threads: one alone waits for the pages of a mapped file, and copies no faster than a core can
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the dtypes that weights may have


class Header(NamedTuple):
    """What a safetensors file says about one tensor."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 1)


class Target(NamedTuple):
    """Block `row` of `rows` equal row blocks of a parameter, which `names` (several where it is tied) reach."""

    module: nn.Module
    names: tuple[str, ...]
    shape: tuple[int, ...]
    row: int = 0
    rows: int = 1

    @property
    def identity(self) -> tuple:
        return id(self.module), self.names, self.row


@dataclass
class Plan:
    """Where the tensors of one set of files go."""

    title: str
    """The folder, for errors and the progress bar."""
    headers: dict[str, Header]
    """By the name that `targets` knows the tensor under, which may differ from its key in the file."""
    targets: dict[str, Target]
    device: torch.device
    dtype: torch.dtype
    homes: Mapping[nn.Module, torch.device] = field(default_factory=dict)
    """Modules that stay somewhere else than on `device`."""

    def __post_init__(self):
        self.title = str(self.title)
        if self.device.type == "cuda" and self.device.index is None:  # each thread has a current device of its own
            self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def num_bytes(self) -> int:
        return sum(h.num_bytes for h in self.headers.values())

    def split(self, part: nn.Module) -> tuple["Plan", "Plan"]:
        """This plan without the targets in `part`, and those alone."""
        inside = {name for name, target in self.targets.items() if target.module is part}
        halves = []
        for names in (self.targets.keys() - inside, inside):
            headers = {name: header for name, header in self.headers.items() if name in names}
            targets = {name: target for name, target in self.targets.items() if name in names}
            halves.append(replace(self, headers=headers, targets=targets))
        return halves[0], halves[1]

    def names_by_file(self) -> dict[Path, list[str]]:
        """Names of the tensors in the order in which they lie in each file."""
        found: dict[Path, list[str]] = {}
        for name, header in self.headers.items():
            found.setdefault(header.path, []).append(name)
        return found

    def device_of(self, module: nn.Module) -> torch.device:
        return self.homes.get(module, self.device)

    def check(self) -> None:
        """Raise one ValueError that lists missing and unexpected keys, wrong shapes and wrong dtypes."""
        filled = {self.targets[key].identity for key in self.targets.keys() & self.headers.keys()}
        problems = [f"missing {key}" for key, target in self.targets.items() if target.identity not in filled]
        problems += [f"unexpected {h.key}" for name, h in self.headers.items() if name not in self.targets]
        for name in self.headers.keys() & self.targets.keys():
            header, shape = self.headers[name], self.targets[name].shape
            if header.dtype not in ITEMSIZE:
                problems.append(f"dtype {header.dtype} of {header.key} (must be {', '.join(ITEMSIZE)})")
            elif header.shape != shape:
                problems.append(f"shape {list(header.shape)} of {header.key} (must be {list(shape)})")
        if problems:
            raise ValueError(f"{self.title}: {listed(problems)}")


def listed(items: list[str]) -> str:
    """Up to ten items in one line, and how many more there are."""
    more = f"; and {len(items) - MAX_LISTED} more ({len(items)} in all)" if len(items) > MAX_LISTED else ""
    return "; ".join(items[:MAX_LISTED]) + more


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """The headers of all tensors in `files`, by key.

    Raises:
        ValueError: a file is truncated or no safetensors file, or two files hold the same key.
    """
    headers = {}
    for path in files:
        with open_weights(path) as file:
            for key in file.offset_keys():  # in the order in which they lie in the file
                if key in headers:
                    raise ValueError(f"{path}: {key} is also in {headers[key].path.name}")
                view = file.get_slice(key)
                headers[key] = Header(path, key, str(view.get_dtype()), tuple(view.get_shape()))
    return headers


@contextlib.contextmanager
def open_weights(path: Path):
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
    with file as opened:
        yield opened


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; their buffers are real, since no file holds those."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def module_targets(module: nn.Module, sources: Callable[[str], tuple[str, ...]]) -> dict[str, Target]:
    """The targets of a module: `sources` gives the source names (one, or one a row block) of a parameter name.

    A tied parameter is a target under each of its names, and any one of them fills it.
    """
    names_of: dict[int, list[str]] = {}
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    targets = {}
    for name, tensor in tensors.items():
        keys = sources(name)
        shape = (tensor.shape[0] // len(keys), *tensor.shape[1:]) if tensor.ndim else ()
        for row, key in enumerate(keys):
            targets[key] = Target(module, tuple(names_of[id(tensor)]), tuple(shape), row, len(keys))
    return targets


def fill(plans: list[Plan], *, check_finite: bool = False, advance: Callable[[int], None] = lambda _: None) -> None:
    """Read every tensor of checked plans into its module; parameters become frozen, buffers follow to the device.

    The tensors of a file are read by several threads, file after file.

    Args:
        plans: plans that `Plan.check` accepts.
        check_finite: raise a ValueError that names a tensor with a NaN or an infinity.
        advance: called with the bytes just read, by the calling thread.
    """
    # Inference mode is of one thread: with the caller's, tensors made here could not be written to there.
    with torch.inference_mode(False), ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        for plan in plans:
            _make_room_for_rows(plan)
            for num_bytes in _read(plan, readers, check_finite):
                advance(num_bytes)
            for module in {id(t.module): t.module for t in plan.targets.values()}.values():
                move_buffers(module, plan.device_of(module))


class _Stopped(Exception):
    """Ends a reading that nobody waits for any more."""


@contextlib.contextmanager
def filling(
    plans: list[Plan], *, check_finite: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Iterator[None]:
    """`fill` by a thread of its own while the body runs. Leaving waits for it; an error of the body ends it soon."""
    stopped = threading.Event()

    def go_on(num_bytes: int) -> None:
        if stopped.is_set():
            raise _Stopped
        advance(num_bytes)

    with ThreadPoolExecutor(1) as background:
        filled = background.submit(fill, plans, check_finite=check_finite, advance=go_on)
        try:
            yield
            filled.result()
        except BaseException:
            stopped.set()
            raise


def _read(plan: Plan, readers: ThreadPoolExecutor, check_finite: bool) -> Iterator[int]:
    """Fill a plan's parameters, file after file; the bytes of each tensor when it is there."""
    # Of a tied parameter that a file has twice the last counts, as if they were read one after the other.
    last = {plan.targets[name].identity: name for name in plan.headers}
    for path, names in plan.names_by_file().items():
        used = [name for name in names if last[plan.targets[name].identity] == name]
        yield sum(plan.headers[name].num_bytes for name in set(names).difference(used))
        with open_weights(path) as file:
            reads = [readers.submit(_fill_one, plan, name, file, check_finite) for name in used]
            try:
                for read in as_completed(reads):
                    yield read.result()
            except BaseException:
                readers.shutdown(cancel_futures=True)  # before the file is closed
                raise


def _make_room_for_rows(plan: Plan) -> None:
    """Parameters that several tensors fill, whichever of them comes first."""
    for name in plan.headers:
        target = plan.targets[name]
        parameter = target.module.get_parameter(target.names[0])
        if target.rows > 1 and parameter.is_meta:
            assign(target, torch.empty(parameter.shape, dtype=plan.dtype, device=plan.device_of(target.module)))


def _fill_one(plan: Plan, name: str, file, check_finite: bool) -> int:
    """Returns the bytes that were read."""
    header, target = plan.headers[name], plan.targets[name]
    try:
        tensor = file.get_tensor(header.key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{header.path}: {header.key} cannot be read ({error})") from None
    if check_finite and not torch.isfinite(tensor).all():
        raise ValueError(f"{header.path}: {header.key} holds NaN or infinite values")
    if target.rows == 1:
        assign(target, moved(tensor, plan.device_of(target.module), plan.dtype))
    else:
        rows = target.shape[0]
        parameter = target.module.get_parameter(target.names[0])
        parameter.data[target.row * rows : (target.row + 1) * rows].copy_(tensor)
    return header.num_bytes


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of `tensor` on `device` in `dtype`.

    Also where neither changes: a tensor read from a safetensors file is a view of the mapped file, whose pages would
    be evicted, be faulted in during the first step, and fail when the file changes.
    """
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)


def assign(target: Target, value: Tensor) -> None:
    """Put `value` in place of the parameter, under all of its names, without a copy."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in target.names:
        owner, _, attribute = name.rpartition(".")
        target.module.get_submodule(owner)._parameters[attribute] = parameter


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers keep their dtype: rotary frequencies stay fp32."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)
