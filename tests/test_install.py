"""The package as it is installed: imports from the repository root, metadata, and what setup.py ships."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

OURS = "from uniworld.kernels import registry; registry.load_ops(); import uniworld.models.flux"
THEIRS = (
    "from transformers import Qwen2_5_VLForConditionalGeneration, SiglipVisionModel, T5EncoderModel; "
    "from diffusers import AutoencoderKL, FluxTransformer2DModel"
)


def fresh_python(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter that starts at the repository root, with the root on `sys.path`."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("first, second", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours first", "theirs first"])
def test_imports_from_the_repository_root(first, second):
    """transformers and diffusers look for another package called `kernels` and find ours there."""
    done = fresh_python(f"{first}\n{second}\nprint('fine')")
    assert done.stdout == "fine\n", done.stderr


def test_importing_the_package_is_light():
    done = fresh_python("import sys, uniworld; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_no_gpu_is_touched_by_importing_the_kernels():
    done = fresh_python(f"{OURS}\nimport torch; print(torch.cuda.is_initialized())")
    assert done.stdout == "False\n", done.stderr


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert {"test", "train", "serve", "eval", "flash", "xformers", "quant"} <= extras.keys()
    assert any(dependency.startswith("flash-attn") for dependency in extras["flash"])
    assert PROJECT["scripts"] == {"uniworld": "uniworld.cli:main"}


def package_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_constraints_pin_what_the_quick_start_installs():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["test"] + extras["train"]
    assert {package_name(requirement) for requirement in wanted} <= pins.keys()
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"


def packages_of_setup() -> set[str]:
    """The `packages` argument of setup.py, read from its source: what it imports need not be installed here."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    names = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                names[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # not a literal
                continue
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    packages = next(keyword.value for keyword in calls[0].keywords if keyword.arg == "packages")
    return set(eval(compile(ast.Expression(packages), "setup.py", "eval"), names))


def test_setup_ships_every_folder_with_code():
    """A package that setup.py forgets works in a checkout and is missing after a plain install."""
    folders = {path.parent for path in (ROOT / "uniworld").rglob("*.py")}
    needed = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"uniworld.engine", "uniworld.kernels"}
    assert packages_of_setup() == needed
