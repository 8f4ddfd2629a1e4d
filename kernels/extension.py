"""The compiled C++ core, `uniworld.kernels._core`, and why it is absent where it is."""

from types import ModuleType

import torch

HAS_ONEDNN = torch.backends.mkldnn.is_available()

try:
    import uniworld.kernels._core as _core
except ImportError as error:
    _core = None
    MISSING = f"the C++ core is not built ({error}); reinstall with a C++ compiler on the PATH"
else:
    MISSING = ""

# Of "avx512_bf16" and "amx_bf16", those that this CPU and its system have; none where the core is absent.
CPU_FEATURES = frozenset(_core.cpu_features()) if hasattr(_core, "cpu_features") else frozenset()


def core() -> ModuleType | None:
    """The pybind11 module built from `csrc/`, or None where it is absent; `MISSING` then says why."""
    return _core


def has(function: str) -> bool:
    """True where the core was built with this function (`ema_update_cuda` only exists in builds with nvcc).

    "onednn" stands for the GEMMs of torch's own oneDNN, the C++ version of the GEMM-shaped ops on the CPU.
    """
    if function == "onednn":
        return HAS_ONEDNN
    return _core is not None and hasattr(_core, function)
