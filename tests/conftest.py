"""Shared fixtures. Triton kernels run through the interpreter here unless a GPU is present."""

import os

import torch

# Before any kernel is decorated: the interpreter is chosen when `triton.jit` is applied.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, os.cpu_count() or 1))
