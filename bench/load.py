"""Reading weights from the page cache to the device: by several threads, by one, and by safetensors' own loader."""

import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from residents import free
from safetensors.torch import load_file, save_file
from timing import Samples, interleave
from torch import Tensor, nn

from uniworld.checkpoint import weights
from uniworld.checkpoint.weights import Plan, fill, module_targets, parameters_on_meta, read_headers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "load_dry_run" if DRY_RUN else "load"
WIDTH, NUM_LINEARS = (64, 4) if DRY_RUN else (3072, 64)  # as matrices of the DiT, of 18 MiB
CASE = f"{NUM_LINEARS} matrices of {WIDTH} x {WIDTH}"
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
OURS, ONE, PEER = "ours", "ours, one thread", "safetensors.torch.load_file"


@functools.cache
def measure() -> dict[str, Samples]:
    if sys.platform == "linux":  # memory is not used again, but new to the process, as that of a first load is
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).to(DTYPE)
        names = [f"{i}.weight" for i in range(NUM_LINEARS)]
        save_file({name: matrix.roll(i) for i, name in enumerate(names)}, path)
        calls = {side: [call] for side, call in sides(path).items()}
        truth = load_file(path)
        for call in calls.values():  # also brings the file into the page cache
            read = call[0]()
            assert all(torch.equal(read[name].cpu(), truth[name]) for name in names)
            del read
            free()
        return interleave(calls, sample_s=0.0, device=DEVICE, warmup=0)


def sides(path: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    def ours() -> dict[str, Tensor]:
        with parameters_on_meta():
            module = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LINEARS))
        targets = module_targets(module, lambda name: (name,))
        plan = Plan(CASE, read_headers([path]), targets, torch.device(DEVICE), DTYPE)
        plan.check()
        fill([plan])
        return dict(module.named_parameters())

    def one() -> dict[str, Tensor]:
        with mock.patch.object(weights, "MAX_READERS", 1):
            return ours()

    def peer() -> dict[str, Tensor]:
        # On a CPU its tensors are views of the mapped file, which nobody has read yet.
        return {name: tensor.to(DEVICE, copy=DEVICE == "cpu") for name, tensor in load_file(path, DEVICE).items()}

    return {OURS: ours, ONE: one, PEER: peer}


@pytest.mark.parametrize("side", (OURS, ONE, PEER))
def test_load(side, report):
    samples = measure()
    num_bytes = NUM_LINEARS * WIDTH**2 * DTYPE.itemsize
    more = {"gb_per_s": num_bytes / samples[side].median / 1e9}
    more |= {"times_longer": samples[side].median / samples[OURS].median}
    report(BENCH, CASE, side, DTYPE, samples[side], **more)
