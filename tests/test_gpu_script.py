"""bench/gpu.sh: one call holds every section, two hold them in full, and all of a call's time is given out."""

import os
import re
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "bench" / "gpu.sh"
SCRIPT = PATH.read_text(encoding="utf-8")
DEADLINE_S = 515
ON_REQUEST = {"cold_start", "offload", "train_memory", "tiny"}


def limits() -> dict[str, int]:
    table = re.search(r"^declare -A LIMITS=\((.+?)^\)", SCRIPT, re.MULTILINE | re.DOTALL)[1]
    return {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", table)}


def test_the_limits_of_a_call_fit_into_its_deadline():
    calls = {name: re.search(rf'^{name}="(.+)"$', SCRIPT, re.MULTILINE)[1].split() for name in ("KERNELS", "MODELS")}
    assert f"DEADLINE=${{DEADLINE:-{DEADLINE_S}}}" in SCRIPT
    for name, sections in calls.items():
        assert sum(limits()[section] for section in sections) == DEADLINE_S, name
    run = re.findall(r"^section (\w+) ", SCRIPT, re.MULTILINE)
    assert sorted(run) == sorted(limits())
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
        ("models", "build steps requests dit_step generate decode"),
        ("kernels", "build kernel_tests gpu_tests ops ema alone train_step region_mask"),
        ("build requests", "build requests"),
        (
            None,
            "build kernel_tests gpu_tests ops ema alone train_step region_mask steps requests dit_step generate decode",
        ),
    ],
)
def test_sections_that_a_call_runs(tmp_path, sections, expected):
    """With a stand-in for Python that says until when it may run, and fails in one section."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "until $UNIWORLD_BENCH_UNTIL now $(date +%s)"\ncase "$*" in *request*) exit 3;; esac\n'
    )
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("DEADLINE", "DRY_RUN", "SECTIONS", "WHEELS")}
    env |= {"PYTHON": str(python), "OUT": str(tmp_path / "out")} | ({"SECTIONS": sections} if sections else {})
    done = subprocess.run(["bash", str(PATH)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()[1:-1]
    rows = {line.split()[0]: line.split() for line in lines}
    assert set(rows) == set(expected.split())
    assert {name for name, row in rows.items() if row[1] != "0"} == {"requests"} & set(rows)
    together = sum(limits()[name] for name in rows if name != "build")
    given = {name: int(row[row.index("until") + 1]) - int(row[row.index("now") + 1]) for name, row in rows.items()}
    assert 0 < given["build"] <= limits()["build"]
    for name in rows.keys() - {"build"}:  # sections end at once here, so that later ones have more than their part
        assert limits()[name] * (DEADLINE_S - 60) // together <= given[name] <= DEADLINE_S, name
    assert given[lines[-1].split()[0]] > DEADLINE_S - 30
