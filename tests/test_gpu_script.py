"""bench/gpu.sh: its two calls hold every section, and their limits fit into the deadline."""

import re
from pathlib import Path

SCRIPT = (Path(__file__).resolve().parent.parent / "bench" / "gpu.sh").read_text(encoding="utf-8")
DEADLINE_S = 530
ON_REQUEST = {"cold_start", "tiny"}


def test_the_limits_of_a_call_fit_into_its_deadline():
    limits = {name: int(limit) for name, limit in re.findall(r"^section (\w+) (\d+) ", SCRIPT, re.MULTILINE)}
    calls = {name: re.search(rf'^{name}="(.+)"$', SCRIPT, re.MULTILINE)[1].split() for name in ("KERNELS", "MODELS")}
    assert f"|| echo {DEADLINE_S})" in SCRIPT and f"&& echo {2 * DEADLINE_S} ||" in SCRIPT
    for name, sections in calls.items():
        assert sum(limits[section] for section in sections) <= DEADLINE_S, name
    everywhere = [section for sections in calls.values() for section in sections if section != "build"]
    assert sorted(everywhere) == sorted(limits.keys() - ON_REQUEST - {"build"})


def test_bench_files_of_sections_exist_and_are_collected():
    root = Path(__file__).resolve().parent.parent
    collected = (root / "pyproject.toml").read_text(encoding="utf-8")
    files = set(re.findall(r"bench/\w+\.py", SCRIPT))
    assert len(files) > 5
    for file in files:
        assert (root / file).is_file() and f'"{file}"' in collected, file
