"""The rules of the house, read from the source: who may import whom, what is imported in one place only, and sizes.

Floors: 0 kernels, config; 1 models; 2 checkpoint; 3 engine, data; 4 train, eval, serve; 5 the command line. Imports
point downward. Rooms of floor 4 do not know each other.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOM_FOLDERS = {"uniworld": "uniworld", "uniworld.engine": "engine", "uniworld.kernels": "kernels"}
FLOORS = {
    "uniworld": 0,
    "uniworld.version": 0,
    "uniworld.config": 0,
    "uniworld.kernels": 0,
    "uniworld.models": 1,
    "uniworld.checkpoint": 2,
    "uniworld.data": 3,
    "uniworld.engine": 3,
    "uniworld.train": 4,
    "uniworld.eval": 4,
    "uniworld.serve": 4,
    "uniworld.cli": 5,
    "uniworld.cli_options": 5,
    "uniworld.cli_draw": 5,
    "uniworld.cli_chat": 5,
    "uniworld.cli_train": 5,
    "uniworld.cli_train_part": 5,
    "uniworld.cli_train_tiny": 5,
    "uniworld.cli_ablate": 5,
    "uniworld.cli_ablate_tables": 5,
    "uniworld.cli_training": 5,
    "uniworld.cli_check_data": 5,
    "uniworld.cli_eval": 5,
    "uniworld.cli_measure": 5,
    "uniworld.cli_export": 5,
    "uniworld.cli_make_data": 5,
    "uniworld.cli_precompute": 5,
    "uniworld.cli_plan": 5,
    "uniworld.cli_plot": 5,
    "uniworld.environment": 5,
}
TOP_FLOOR_OF_STRANGERS = 4  # rooms here never import each other
IMPORTED_ONCE = ("deepspeed", "fastapi", "gradio")
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 400
NAMELESS = {"utils", "util", "common", "misc", "helpers"}


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, of everything that ships."""
    files = {}
    for package, folder in ROOM_FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            files[name] = path
    return files


FILES = source_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def imports_of(name: str) -> set[str]:
    """Modules that `name` imports anywhere, also inside functions; of our own, down to the module."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: imports are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in FILES else node.module)
    return found


def own_imports(name: str) -> set[str]:
    return {module for module in imports_of(name) if module in FILES and module != name}


def room(module: str) -> str:
    return max((r for r in FLOORS if module == r or module.startswith(r + ".")), key=len)


def test_every_module_has_a_floor():
    unplaced = [name for name in FILES if room(name) == "uniworld" and name != "uniworld"]
    assert not unplaced, f"give {unplaced} a floor in FLOORS"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name):
    here = room(name)
    for module in own_imports(name):
        there = room(module)
        if there == here:
            continue
        assert FLOORS[there] <= FLOORS[here], f"{name} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
        strangers = FLOORS[there] == FLOORS[here] == TOP_FLOOR_OF_STRANGERS
        assert not strangers, f"{name} imports {module}: rooms of floor {TOP_FLOOR_OF_STRANGERS} do not know each other"


def test_no_circles():
    finished, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, "a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        path.append(name)
        for module in sorted(own_imports(name)):
            visit(module)
        finished.add(path.pop())

    for name in FILES:
        visit(name)


def test_a_circle_would_be_found(monkeypatch):
    monkeypatch.setitem(TREES, "uniworld.version", ast.parse("def f():\n    from uniworld import __version__"))
    with pytest.raises(AssertionError, match="a circle: uniworld"):
        test_no_circles()


def test_an_upward_import_would_be_found(monkeypatch):
    monkeypatch.setitem(TREES, "uniworld.models", ast.parse("from uniworld.engine import Engine"))
    with pytest.raises(AssertionError, match=r"uniworld.models \(floor 1\) imports uniworld.engine \(floor 3\)"):
        test_imports_point_downward("uniworld.models")


@pytest.mark.parametrize("package", IMPORTED_ONCE)
def test_imported_in_one_file_only(package):
    importers = [name for name in FILES if any(m.split(".")[0] == package for m in imports_of(name))]
    assert len(importers) <= 1, f"{package} is imported in {importers}"


@pytest.mark.parametrize("name", FILES)
def test_sizes_and_names(name):
    path = FILES[name]
    assert path.stem not in NAMELESS, f"{path.name} says nothing about what is in it"
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{path.name} has {num_lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}: {node.name} has {length} lines"
