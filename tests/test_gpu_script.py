"""bench/gpu.sh: one call holds every section, three hold them in full, and all of a call's time is given out."""

import os
import re
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "bench" / "gpu.sh"
SCRIPT = PATH.read_text(encoding="utf-8")
DEADLINE_S = 515
GROUPS = ("KERNELS", "MODELS", "REST")
ON_REQUEST = {"tiny"}
REST = ("cold_start", "train_memory", "offload")


def limits(table: str = "LIMITS") -> dict[str, int]:
    table = re.search(rf"^declare -A {table}=\((.+?)\)$", SCRIPT, re.MULTILINE | re.DOTALL)[1]
    return {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", table)}


def test_the_limits_of_a_call_fit_into_its_deadline():
    calls = {name: re.search(rf'^{name}="(.+)"$', SCRIPT, re.MULTILINE)[1].split() for name in GROUPS}
    assert f"DEADLINE=${{DEADLINE:-{DEADLINE_S}}}" in SCRIPT
    for name, sections in calls.items():
        assert sum(limits()[section] for section in sections) == DEADLINE_S, name
    run = re.findall(r"^section (\w+) ", SCRIPT, re.MULTILINE)
    assert sorted(run) == sorted(limits())
    assert tuple(run[-len(REST) - 1 : -1]) == REST and limits("LEAST").keys() == set(REST)
    everywhere = [section for sections in calls.values() for section in sections if section != "build"]
    assert sorted(everywhere) == sorted(limits().keys() - ON_REQUEST - {"build"})


def test_bench_files_of_sections_exist_and_are_collected():
    root = Path(__file__).resolve().parent.parent
    collected = (root / "pyproject.toml").read_text(encoding="utf-8")
    files = set(re.findall(r"bench/\w+\.py", SCRIPT))
    assert len(files) > 5
    for file in files:
        assert (root / file).is_file() and f'"{file}"' in collected, file


@pytest.mark.parametrize(
    "sections, expected",
    [
        ("models", "build steps requests dit_step generate decode load"),
        ("kernels", "build kernel_tests gpu_tests ops ema alone train_step region_mask"),
        ("rest", "build cold_start train_memory offload"),
        ("build requests", "build requests"),
        (
            None,
            "build kernel_tests gpu_tests ops ema alone train_step region_mask steps requests dit_step generate decode "
            "load cold_start train_memory offload",
        ),
    ],
)
def test_sections_that_a_call_runs(tmp_path, sections, expected):
    """With a stand-in for Python that says until when it may run, and fails in one section."""
    stand_in = 'echo "until $UNIWORLD_BENCH_UNTIL now $(date +%s)"\ncase "$*" in *request*) exit 3;; esac\n'
    rows = summary_of_call(tmp_path, stand_in, SECTIONS=sections)
    assert set(rows) == set(expected.split())
    assert {name for name, row in rows.items() if row[1] != "0"} == {"requests"} & set(rows)
    kept = rows.keys() - set(REST) if len(rows) > len(REST) + 1 else rows.keys()  # for the others the rest gets nothing
    together = sum(limits()[name] for name in kept if name != "build")
    given = {name: int(row[row.index("until") + 1]) - int(row[row.index("now") + 1]) for name, row in rows.items()}
    assert 0 < given["build"] <= limits()["build"]
    for name in kept - {"build"}:  # sections end at once here, so that later ones have more than their part
        assert limits()[name] * (DEADLINE_S - 60) // together <= given[name] <= DEADLINE_S, name
    assert given[list(rows)[-1]] > DEADLINE_S - 30


def test_the_rest_runs_where_enough_is_left(tmp_path):
    rows = summary_of_call(tmp_path, "exit 0\n", SECTIONS="build ema rest", DEADLINE="130")
    assert rows["ema"][1] == "0" and "cold_start" in rows
    assert {name for name in REST if rows[name][1:3] == ["not", "run"]} == {"cold_start"}
    assert rows["cold_start"][-2:] == ["150", "wanted"]


def summary_of_call(folder: Path, stand_in: str, **settings: str | None) -> dict[str, list[str]]:
    """The words of each section's line, with a shell script in the place of Python."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{stand_in}")
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("DEADLINE", "DRY_RUN", "SECTIONS", "WHEELS")}
    env |= {"PYTHON": str(python), "OUT": str(folder / "out")}
    env |= {key: value for key, value in settings.items() if value}
    done = subprocess.run(["bash", str(PATH)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (folder / "out" / "summary.txt").read_text().splitlines()[1:-1]
    return {line.split()[0]: line.split() for line in lines}
