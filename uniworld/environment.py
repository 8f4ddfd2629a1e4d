"""What this machine has and what will run on it, and why: `uniworld env`."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from uniworld.version import __version__

REQUIRED = (
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "huggingface-hub",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "opencv-python-headless",
)
OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "deepspeed", "torchao", "bitsandbytes")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
NOT_INSTALLED = "not installed"

Report = dict[str, Any]


def gather() -> Report:
    """Everything that `uniworld env` shows, JSON-serializable."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "uniworld": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch itself also names its build, such as +cu130; the package's metadata does not always.
        "versions": {name: installed_version(name) for name in REQUIRED} | {"torch": torch.__version__},
        "optional": {name: installed_version(name) for name in OPTIONAL},
        "device": gpu(device) if device.type == "cuda" else cpu(),
        "core": core(),
        "ops": ops(device),
        "attention": attention(device),
        "cache": cache(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("UNIWORLD_")},
    }


def installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def gpu(device) -> Report:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "type": "cuda",
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "cuda": torch.version.cuda,
        "count": torch.cuda.device_count(),
    }


def cpu() -> Report:
    import torch

    return {
        "type": "cpu",
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature in CPU_FEATURES if feature in cpu_flags()],
        "why": "no CUDA device" if torch.version.cuda else "this torch is built without CUDA",
    }


def cpu_info(*keys: str) -> str:
    """The first line of /proc/cpuinfo under one of `keys`; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return ""
    return next((value.strip() for key, _, value in lines if key.strip() in keys), "")


def cpu_name() -> str:
    return cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    return set(cpu_info("flags", "Features").split())


def core() -> Report:
    """The C++ core: built or why not, and for which GPU architectures it holds code."""
    from uniworld.kernels import extension

    module = extension.core()
    if module is None:
        return {"built": False, "why": extension.MISSING, "cuda_archs": [], "functions": []}
    archs = [arch for arch in module.cuda_archs.split(";") if arch]
    functions = [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]
    return {
        "built": True,
        "why": "" if archs else "without CUDA sources: no nvcc when it was built, or UNIWORLD_CUDA=0",
        "cuda_archs": archs,
        "functions": functions,
    }


def ops(device) -> dict[str, Report]:
    """The backend that serves each op on `device` in the default dtype, and why."""
    import torch

    from uniworld.kernels import registry

    probe = torch.empty(1, dtype=torch.bfloat16, device=device)
    report = {}
    for name, op in sorted(registry.load_ops().items()):
        if name != "joint_attention" and not op.triton_builds and op.cpp is None:  # its kernels are backends
            report[name] = {"backend": "torch", "why": "no kernel of ours: torch's own"}
            continue
        try:
            backend = registry.backend_for(probe, cpp=op.cpp)
        except RuntimeError as error:  # a forced backend that cannot run here
            report[name] = {"backend": "none", "why": str(error)}
        else:
            report[name] = {"backend": backend, "why": why_backend(backend, device.type, op.cpp)}
    if registry.forced_backend() == "auto":
        report["joint_attention"]["why"] = f"see attention: {attention(device)['backend']}"
    return report


def why_backend(backend: str, device_type: str, cpp: str | None) -> str:
    from uniworld.kernels import extension, registry

    if registry.forced_backend() == backend:
        return "UNIWORLD_KERNELS asks for it"
    if device_type == "cuda":
        return "CUDA device"
    if backend == "cpp":
        return "oneDNN's GEMM on the CPU" if cpp == "onednn" else "C++ core on the CPU"
    if cpp is None:
        return "no C++ version: torch's own kernels"
    return "the C++ core is not built" if extension.MISSING else f"the C++ core has no {cpp}"


def attention(device) -> Report:
    """The attention backend that "auto" takes, and what became of the others."""
    import torch

    from uniworld.kernels.attention_backends import available_backends, choose_backend

    chosen = choose_backend("auto", device=device, dtype=torch.bfloat16, head_dim=128)
    return {
        "backend": chosen.name,
        "why": chosen.why,
        "unequal_lengths": chosen.ragged or f"{chosen.name}, once a sample",
        "backends": available_backends(device),
    }


def cache() -> Report:
    from uniworld.checkpoint.tiny import cache_root

    folder = cache_root()
    return {"folder": str(folder), "exists": folder.is_dir()}


def show(as_json: bool) -> None:
    """Print the report to stdout."""
    report = gather()
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)
        console.print()


def tables(report: Report) -> list[Table]:
    """The report as tables, one a subject."""
    return [
        rows(f"uniworld {report['uniworld']}", version_rows(report)),
        rows("device", device_rows(report["device"])),
        rows("C++ core", core_rows(report["core"])),
        rows("ops", [(name, op["backend"], op["why"]) for name, op in report["ops"].items()]),
        rows("attention", attention_rows(report["attention"])),
        rows("cache", [("folder", report["cache"]["folder"], "" if report["cache"]["exists"] else "not made yet")]),
    ]


def rows(title: str, cells: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    for _ in range(max(map(len, cells), default=0)):
        table.add_column(overflow="fold")  # a reason is shown whole, never cut
    for cell in cells:
        table.add_row(*map(str, cell))
    return table


def version_rows(report: Report) -> list[tuple[str, ...]]:
    installed = [("python", report["python"]), *report["versions"].items(), *report["optional"].items()]
    return [(name, number) for name, number in installed]


def device_rows(device: Report) -> list[tuple[str, ...]]:
    if device["type"] == "cuda":
        memory = f"{device['memory_gib']} GiB, {device['free_gib']} GiB free"
        return [
            ("name", f"{device['name']} (cuda, {device['count']} of them)"),
            ("capability", device["capability"]),
            ("memory", memory),
            ("CUDA of torch", device["cuda"]),
        ]
    features = ", ".join(device["features"]) or "none of interest"
    return [
        ("name", f"{device['name']} (cpu: {device['why']})"),
        ("threads", device["threads"]),
        ("features", features),
    ]


def core_rows(core: Report) -> list[tuple[str, ...]]:
    if not core["built"]:
        return [("built", "no", core["why"])]
    return [("built", "yes", ""), ("CUDA code for", ", ".join(core["cuda_archs"]) or "nothing", core["why"])]


def attention_rows(attention: Report) -> list[tuple[str, ...]]:
    others = [(name, "no" if why else "could run", why) for name, why in attention["backends"].items()]
    used = attention["backend"]
    unequal = ("unequal lengths", "used", attention["unequal_lengths"])
    return [(used, "used", attention["why"]), unequal] + [row for row in others if row[0] != used]
