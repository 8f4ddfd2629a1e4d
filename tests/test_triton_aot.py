"""Every registered Triton kernel compiles for sm_80 and sm_90 at full size, without a GPU, and spills no register.

pytest walks the builds; the compiling happens in one child process, because this process may run the interpreter,
which is chosen when a kernel is decorated. Run as a script, this file is that child: it prints one JSON line a build.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from uniworld.kernels.registry import load_ops

OPS = load_ops()
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}


def builds():
    return [(op, i, build) for op in OPS.values() for i, build in enumerate(op.triton_builds)]


def build_id(op, i, build, capability):
    name = getattr(build.kernel, "__name__", None) or build.kernel.fn.__name__
    return f"{op.name}-{i}-{name.lstrip('_')}-sm{capability}"


def spilled_bytes(ptx, architecture):
    """(registers, bytes spilled) as ptxas reports them."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    if not spills or not registers:
        raise RuntimeError(f"ptxas reported no register use: {report!r}")
    return max(registers), sum(spills)


def compile_build(build, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Without these hints the compiler assumes unaligned rows, and the register count means nothing.
    aligned = [i for i, t in enumerate(build.signature.values()) if t.startswith("*") or t == "i32"]
    source = ASTSource(
        fn=build.kernel,
        signature=build.signature,
        constexprs=build.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = spilled_bytes(kernel.asm["ptx"], ARCHITECTURES[capability])
    return {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}


def main():
    for op, i, build in builds():
        for capability in build.capabilities:
            try:
                report = compile_build(build, capability)
            except Exception:
                report = {"error": traceback.format_exc()[-3000:]}
            print(json.dumps({"id": build_id(op, i, build, capability), **report}), flush=True)


@pytest.fixture(scope="module")
def reports():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280)
    assert child.returncode == 0, child.stderr[-3000:]
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return {line["id"]: line for line in lines}


@pytest.mark.parametrize("name", [build_id(*b, capability) for b in builds() for capability in b[2].capabilities])
def test_compiles_without_spills(name, reports):
    report = reports[name]
    assert "error" not in report, report["error"]
    assert report["spilled"] == 0, f"{name} spills {report['spilled']} bytes with {report['registers']} registers"
    limit = 163 * 1024 if name.endswith("sm80") else 227 * 1024
    assert report["shared"] <= limit, f"{name} needs {report['shared']} bytes of shared memory"


if __name__ == "__main__":
    main()
