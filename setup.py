"""Builds the C++ core. Everything else is in pyproject.toml.

Nothing here needs torch: raw pointers, sizes and a stream handle cross the border, so one build serves every torch.
A missing compiler or a failed build leaves a pure-Python install, and `uniworld env` says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_CUDA_ARCHS = "80;90a;100a"


def cuda_sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))


def find_nvcc() -> str | None:
    if os.environ.get("UNIWORLD_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    return next((str(c) for c in candidates if c.is_file()), shutil.which("nvcc"))


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures asked for; of the default list, those this nvcc knows."""
    asked = os.environ.get("UNIWORLD_CUDA_ARCHS")
    archs = [a.strip() for a in (asked or DEFAULT_CUDA_ARCHS).split(";") if a.strip()]
    if asked:
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [a for a in archs if f"compute_{a.rstrip('a')}" in known]


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where the static CUDA runtime lies: below the toolkit that nvcc itself names (it may be a wrapper script)."""
    dry_run = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [Path(line.split("TOP=", 1)[1]) for line in dry_run.stderr.splitlines() if "TOP=" in line]
    top = tops[0] if tops else Path(nvcc).resolve().parent.parent
    found = [*top.glob("lib*/libcudart_static.a"), *top.glob("targets/*/lib*/libcudart_static.a")]
    return sorted({str(path.parent) for path in found})


class BuildCore(build_ext):
    """Compiles `csrc/*.cu` with nvcc first, then the C++ sources; either may fail without failing the install."""

    def build_extension(self, ext):
        nvcc = find_nvcc()
        if nvcc is None:
            print("uniworld: nvcc not found or UNIWORLD_CUDA=0, building without CUDA sources", file=sys.stderr)
        elif cuda_sources():
            try:
                self.add_cuda(ext, nvcc)
            except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                print(f"uniworld: CUDA sources not built: {error}", file=sys.stderr)
        super().build_extension(ext)

    def add_cuda(self, ext, nvcc: str) -> None:
        archs = cuda_archs(nvcc)
        library_dirs = cuda_library_dirs(nvcc)
        if not archs or not library_dirs:
            raise RuntimeError(f"nvcc has no libcudart_static.a, or knows none of the architectures {archs}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        objects = [self.compile_cuda(nvcc, archs, source) for source in cuda_sources()]
        ext.extra_objects = objects
        ext.define_macros.append(("UNIWORLD_WITH_CUDA", f'"{";".join(archs)}"'))
        ext.library_dirs += library_dirs
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]

    def compile_cuda(self, nvcc: str, archs: list[str], source: str) -> str:
        target = str(Path(self.build_temp) / (Path(source).stem + ".cu.o"))
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-cudart", "static"]
        subprocess.run([nvcc, *options, *gencode, "-c", source, "-o", target], check=True, cwd=ROOT)
        return target


def core_extension():
    from pybind11.setup_helpers import Pybind11Extension

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    return Pybind11Extension(
        "uniworld.kernels._core",
        sources,
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno"],
        extra_link_args=["-fopenmp"],
        optional=True,  # a missing compiler leaves a pure-Python install
    )


ROOMS = ("kernels", "models", "checkpoint", "engine", "data", "data.scenes", "eval", "train", "train.parts")

setup(
    packages=["uniworld", *(f"uniworld.{room}" for room in ROOMS)],
    package_dir={"uniworld": "uniworld", "uniworld.engine": "engine", "uniworld.kernels": "kernels"},
    ext_modules=[core_extension()],
    cmdclass={"build_ext": BuildCore},
)
