"""Shared fixtures. Triton kernels run through the interpreter here unless a GPU is present."""

import os

import pytest
import torch

# Before any kernel is decorated: the interpreter is chosen when `triton.jit` is applied.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, os.cpu_count() or 1))

SLOW_TIMEOUT_S = 1200  # a fixture with many runs counts for the first test that uses it


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
