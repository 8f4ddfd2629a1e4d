"""Never lose work: runs of the real trainer that are killed and go on bit by bit, and disks that are full."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from uniworld.train import checkpoints, writer
from uniworld.train.checkpoints import MANIFEST, choose, clean, complete_checkpoints, hidden, rotate, whats_wrong
from uniworld.train.resume import random_states, set_random_states
from uniworld.train.writer import Writer

HERE = Path(__file__).parent
EVERY = {"checkpoint": {"every_steps": 5, "keep": 2}}
KILLS = ("done 11", "file 0", "file 1", "file 2", "commit", "rename", "old")
STAGES = {1: ("bf16", "adamw"), 2: ("fp32", "adamw"), 3: ("bf16", "prodigy")}


def scenario(name, *attempts, **config):
    keys = ("ranks", "until", "kill")
    return {"id": name, "config": EVERY | config, "attempts": [dict(zip(keys, a)) for a in attempts]}


def killed(ranks, kill, **config):
    """Killed once, at the save of step 15 or after step 11, then run to the end."""
    until = 20 if kill.startswith("done") else 15
    asynchronous = {"checkpoint": EVERY["checkpoint"] | {"asynchronous": True}} if ranks == 2 else {}
    name = f"{ranks}-{kill.replace(' ', '')}"
    runs = scenario(name, (ranks, until, kill), (ranks, 20), **asynchronous, **config)
    return runs | {"slow": 0.1} if asynchronous and kill == "done 11" else runs  # steps pass before a file is written


def sharded(zero_stage):
    dtype, optimizer = STAGES[zero_stage]
    lr = 1.0 if optimizer == "prodigy" else 1e-3
    settings = {"sharding": {"zero_stage": zero_stage, "dtype": dtype}, "optim": {"name": optimizer, "lr": lr}}
    return settings | {"stage": {"preset": "stage2"}}


WHOLE = [scenario(f"{ranks}-whole", (ranks, 20)) for ranks in (1, 2)]
KILLED = [(ranks, kill) for ranks in (1, 2) for kill in KILLS]
QUICK_KILLED = [(1, "done 11"), (1, "file 1"), (2, "done 11"), (2, "file 1"), (2, "commit")]
CHANGED = [(z, before, after) for z in STAGES for before, after in ((2, 1), (1, 2))]
QUICK_STAGES = (2,)
# DeepSpeed then takes another optimizer wrapper, which keeps fp32 gradients between micro-batches.
ACCUMULATED = {
    "sharding": {"zero_stage": 1, "dtype": "bf16", "accumulation_steps": 2},
    "stage": {"preset": "stage2"},
}
ACCUMULATING = [
    scenario("accumulated-whole", (2, 8), **ACCUMULATED),
    scenario("accumulated-killed", (2, 8, "done 6"), (2, 8), **ACCUMULATED),
    scenario("accumulated-2to1", (2, 5), (1, 5), **ACCUMULATED),
]
OFFLOADED = {"sharding": {"zero_stage": 2, "dtype": "bf16", "offload_optimizer": True}, "stage": {"preset": "stage2"}}
OFFLOADING = [
    scenario("offloaded-whole", (2, 8), **OFFLOADED),
    scenario("offloaded-killed", (2, 8, "done 6"), (2, 8), **OFFLOADED),
    scenario("offloaded-2to1", (2, 5), (1, 5), **OFFLOADED),
]
GOES_ON = scenario("2to1-goes-on", (2, 10), (1, 12), (2, 14))


def divided(stages):
    """Runs of two ranks under the ZeRO stages, and of numbers of ranks that change."""
    whole = [scenario(f"zero{z}-whole", (2, 12), **sharded(z)) for z in stages]
    killed = [scenario(f"zero{z}-killed", (2, 12, "done 6"), (2, 12), **sharded(z)) for z in stages]
    changed = [scenario(f"zero{z}-{a}to{b}", (a, 7), (b, 7), **sharded(z)) for z, a, b in CHANGED if z in stages]
    return whole + killed + changed


def either(cases, quick):
    """Parameters of a test: those that are not quick are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(*c, marks=() if c in quick else slow, id="-".join(map(str, c))) for c in cases]


def run(scenarios, folder, timeout):
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, str(HERE / "killed_runs.py"), str(folder / "scenarios.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    pytest.importorskip("deepspeed")
    full = scenario("2-full", (2, 15, "full 1"), (2, 20))
    scenarios = [*WHOLE, *(killed(*case) for case in QUICK_KILLED), *divided(QUICK_STAGES), full]
    return run(scenarios, tmp_path_factory.mktemp("quick"), 280)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory):
    pytest.importorskip("deepspeed")
    scenarios = WHOLE + [killed(*case) for case in KILLED if case not in QUICK_KILLED] + [GOES_ON, *ACCUMULATING]
    scenarios += OFFLOADING
    return run(scenarios + divided([z for z in STAGES if z not in QUICK_STAGES]), tmp_path_factory.mktemp("slow"), 1100)


@pytest.fixture
def runs(request):
    """The folder with the runs of a test's group."""
    is_slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("slow_runs" if is_slow else "quick_runs")


def seen(folder, rank):
    """(step, batch number, loss in hex) of every step, repeated ones too."""
    return [tuple(json.loads(line)) for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines()]


def assert_same_state(a, b):
    mine, theirs = torch.load(a), torch.load(b)
    assert mine.keys() == theirs.keys()
    assert {key.split()[0] for key in mine} >= {"master", "params", "ema", "exp_avg", "exp_avg_sq", "steps"}
    different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not different


def assert_same_run(folder, whole, ranks, last_step):
    """Every step, whenever it ran, had the losses and batches of the run that was never killed."""
    for rank in range(ranks):
        wanted = {s: (n, loss) for s, n, loss in seen(whole, rank)}
        assert list(wanted) == list(range(1, last_step + 1))
        assert len({number for number, _ in wanted.values()}) == len({loss for _, loss in wanted.values()}) == last_step
        found = seen(folder, rank)
        assert {s for s, _, _ in found} == set(wanted)
        for step, number, loss in found:
            assert (number, loss) == wanted[step], f"rank {rank}, step {step}"
    assert_same_state(folder / f"end-{ranks}.pt", whole / f"end-{ranks}.pt")


@pytest.mark.parametrize("ranks,kill", either(KILLED, QUICK_KILLED))
def test_killed_and_resumed_bit_by_bit(runs, ranks, kill):
    """On one rank checkpoints are written in turn, on two in the background."""
    folder = runs / f"{ranks}-{kill.replace(' ', '')}"
    assert_same_run(folder, runs / f"{ranks}-whole", ranks, 20)
    steps = [s for s, _, _ in seen(folder, 0)]
    again = {"done": 11, "file": 15, "commit": 15, "rename": None, "old": None}[kill.split()[0]]
    first = 11 if again else 16  # where the second process went on: step 10 or 15 was the last complete one
    restart = next((i for i in range(1, len(steps)) if steps[i] <= steps[i - 1]), None)
    assert (restart is None) == (again is None)
    if again:
        assert steps[restart] == first and steps[restart - 1] == again
    root = runs / folder.name / "run" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000015", "step-00000020"]


@pytest.mark.parametrize("zero_stage", either([(z,) for z in STAGES], [(z,) for z in QUICK_STAGES]))
def test_zero_stages_resume_bit_by_bit(runs, zero_stage):
    assert_same_run(runs / f"zero{zero_stage}-killed", runs / f"zero{zero_stage}-whole", 2, 12)


@pytest.mark.parametrize("zero_stage,before,after", either(CHANGED, [c for c in CHANGED if c[0] in QUICK_STAGES]))
def test_another_number_of_ranks(runs, zero_stage, before, after):
    """Parameters, master weights, optimizer state and EMA are the same, only divided otherwise."""
    folder = runs / f"zero{zero_stage}-{before}to{after}"
    assert_same_state(folder / f"end-{before}.pt", folder / f"end-{after}.pt")
    assert len(seen(folder, 0)) == 7, "the second process had nothing to do"


@pytest.mark.slow
def test_accumulating_runs_resume_bit_by_bit(runs):
    steps = [s for s, _, _ in seen(runs / "accumulated-killed", 1)]
    assert steps == [s for s in (*range(1, 7), *range(6, 9)) for _ in range(2)]
    assert_same_state(runs / "accumulated-killed" / "end-2.pt", runs / "accumulated-whole" / "end-2.pt")
    assert_same_state(runs / "accumulated-2to1" / "end-2.pt", runs / "accumulated-2to1" / "end-1.pt")


@pytest.mark.slow
def test_offloaded_optimizers_resume_bit_by_bit(runs):
    assert_same_run(runs / "offloaded-killed", runs / "offloaded-whole", 2, 8)
    assert_same_state(runs / "offloaded-2to1" / "end-2.pt", runs / "offloaded-2to1" / "end-1.pt")


@pytest.mark.slow
def test_going_on_with_another_number_of_ranks(runs):
    folder = runs / "2to1-goes-on"
    assert [s for s, _, _ in seen(folder, 0)] == list(range(1, 15))
    assert [s for s, _, _ in seen(folder, 1)] == [*range(1, 11), 13, 14]
    losses = [float.fromhex(loss) for _, _, loss in seen(folder, 0)]
    assert all(0 < loss < 100 for loss in losses)


def test_a_full_disk_ends_the_run_on_all_ranks(quick_runs):
    """Rank 1 cannot write its part of step 15: both stop with an error, and the run goes on from step 10."""
    folder = quick_runs / "2-full"
    messages = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
    for message in messages:
        assert message.startswith("OSError: ") and "the disk is full" in message and "make room there" in message
    assert_same_run(folder, quick_runs / "2-whole", 2, 20)
    assert [s for s, _, _ in seen(folder, 1)] == [*range(1, 16), *range(11, 21)]


def test_metrics_of_a_killed_run_are_those_of_a_whole_one(runs):
    def losses(folder):
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in map(json.loads, lines)]

    assert losses(runs / "2-done11") == losses(runs / "2-whole")
    assert len(losses(runs / "2-whole")) == 20


def test_a_checkpoint_holds_trained_parameters_only(runs):
    """Stage 1 trains the connector: the frozen DiT is in no file."""
    folder = runs / "1-whole" / "run" / "checkpoints" / "step-00000020"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert all(name.startswith("denoise_projector.") for name in manifest["trained"])
    saved = torch.load(folder / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)
    assert set(saved["module"]) == set(manifest["trained"])
    assert (folder / "config.yaml").read_text().startswith("run_dir:")


def test_random_states_of_every_library_come_back():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random_states()
    first = drawn()
    assert drawn() != first
    set_random_states(states)
    assert drawn() == first


@pytest.mark.slow
@pytest.mark.parametrize("ranks,asynchronous", [(1, False), (2, True)])
def test_random_kills(tmp_path, ranks, asynchronous):
    """At least 20 kills at random instants of runs that save every step."""
    pytest.importorskip("deepspeed")
    config = {"checkpoint": {"every_steps": 1, "keep": 2, "asynchronous": asynchronous}}
    attempts = [{"ranks": ranks, "until": 20}]
    random_ones = {"id": "random", "config": config, "attempts": attempts, "num_kills": 20, "seed": ranks}
    folder = run(
        [{"id": "whole", "config": config, "attempts": attempts}, random_ones | {"longest_s": 1.0}], tmp_path, 1100
    )
    report = json.loads((folder / "random" / "kills.json").read_text())
    assert report["kills"] == 20
    assert report["mid_save"] >= 2, "too few of the kills came while a checkpoint was written"
    for name in report["runs"]:
        assert_same_run(folder / "random" / name, folder / "whole", ranks, 20)


def written(folder, step, *, keep=2, world_size=1, rank=0, content=None, start=True):
    """Write a checkpoint with little in it; returns the writer."""
    target = folder / checkpoints.folder_name(step)
    hidden(target, "writing").mkdir(exist_ok=True, parents=True)
    files = {f"ranks/{rank}.pt": {"x": torch.arange(1000)}, f"ema/{rank}.safetensors": {"x": torch.ones(500)}}
    manifest = {"format": checkpoints.FORMAT, "step": step, "world_size": world_size}
    done = Writer(target=target, rank=rank, world_size=world_size, files=content or files, manifest=manifest, keep=keep)
    if start:
        done.start()
        done.wait()
    return done


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_rotation_and_choice(tmp_path):
    root = checkpoints.checkpoints_dir(tmp_path)
    assert choose(tmp_path, "auto") is None
    assert choose(tmp_path, "never") is None
    for step in (5, 10, 15):
        assert written(root, step).error is None
    assert names(root) == ["step-00000010", "step-00000015"]
    assert choose(tmp_path, "auto").step == 15
    assert choose("elsewhere", str(root / "step-00000010")).step == 10
    assert choose("elsewhere", str(tmp_path)).step == 15
    for resume in ("never", str(root / "step-00000010")):
        with pytest.raises(
            ValueError, match=f"checkpoint.resume={resume}: .* holds step-00000015; delete what is newer"
        ):
            choose(tmp_path, resume)
    assert choose(tmp_path, str(root / "step-00000015")).step == 15
    other = checkpoints.checkpoints_dir(tmp_path / "other")
    written(other, 3)
    assert choose(tmp_path / "other", str(tmp_path)).step == 3, "the start gives way to what the run has done since"
    with pytest.raises(FileNotFoundError, match="checkpoint.resume=/nowhere: no such folder"):
        choose(tmp_path, "/nowhere")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        choose(tmp_path, str(HERE))


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    root = checkpoints.checkpoints_dir(tmp_path)
    for step in (1, 2, 3, 4):
        written(root, step, keep=9)
    (root / "step-00000004" / "ranks" / "0.pt").unlink()
    os.truncate(root / "step-00000003" / "ema" / "0.safetensors", 100)
    (root / "step-00000002" / MANIFEST).write_text('{"format": 1, "fi')
    assert "ranks/0.pt is missing" in whats_wrong(root / "step-00000004")
    assert "has 100 bytes, must have" in whats_wrong(root / "step-00000003")
    assert "cannot be read" in whats_wrong(root / "step-00000002")
    assert choose(tmp_path, "auto").step == 1
    with pytest.raises(ValueError, match=r"step-00000004: is no complete checkpoint: ranks/0.pt is missing"):
        choose(tmp_path, str(root / "step-00000004"))


def test_rotation_leaves_what_is_not_complete(tmp_path):
    for step in (1, 2, 3):
        written(tmp_path, step, keep=9)
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert [c.step for c in complete_checkpoints(tmp_path)] == [3]


def test_clean_removes_leftovers_and_restores_what_was_being_replaced(tmp_path):
    written(tmp_path, 1)
    for name in (".step-00000009.writing", ".step-00000001.old", ".step-00000001.universal", ".mine"):
        (tmp_path / name / "ema").mkdir(parents=True)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")
    clean(tmp_path)
    assert names(tmp_path) == [".mine", "step-00000001"]
    assert whats_wrong(tmp_path / "step-00000001") is None
    clean(tmp_path / "nowhere")


def test_the_same_step_again_replaces_the_older_one(tmp_path):
    written(tmp_path, 1)
    before = (tmp_path / "step-00000001" / "ranks" / "0.pt").stat().st_size
    assert written(tmp_path, 1, content={"ranks/0.pt": {"x": torch.arange(5000)}}).error is None
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "ranks" / "0.pt").stat().st_size > before
    assert whats_wrong(tmp_path / "step-00000001") is None


def test_ranks_write_together(tmp_path):
    """Rank 0 gives the name when the last rank is done, and one that fails is known to all who wait for it."""
    ranks = [written(tmp_path, 1, world_size=3, rank=r, start=False) for r in range(3)]
    for r in (0, 2):
        ranks[r].start()
    ranks[2].wait()
    assert ranks[0].running and names(tmp_path) == [".step-00000001.writing"]
    ranks[1].start()
    for r in ranks:
        r.wait()
        assert r.error is None
    assert names(tmp_path) == ["step-00000001"]
    files = json.loads((tmp_path / "step-00000001" / MANIFEST).read_text())["files"]
    assert set(files) == {f"{d}/{r}.{e}" for r in range(3) for d, e in (("ranks", "pt"), ("ema", "safetensors"))}
    assert all((tmp_path / "step-00000001" / name).stat().st_size == size for name, size in files.items())
    assert names(tmp_path / "step-00000001") == [MANIFEST, "ema", "ranks"]


@pytest.mark.parametrize("broken", [0, 1])
def test_disk_full(tmp_path, monkeypatch, broken):
    """The older checkpoint stays, nothing half-written is left, and one line says what to do."""
    written(tmp_path, 1)
    write_file = writer.write_file

    def full(path, content):
        if path.name == f"{broken}.safetensors":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_file(path, content)

    monkeypatch.setattr(writer, "write_file", full)
    ranks = [written(tmp_path, 2, world_size=2, rank=r, start=False) for r in range(2)]
    for r in ranks:
        r.start()
    for r in ranks:
        r.wait()
    message = str(ranks[0].error)
    assert "step-00000002: not saved, older checkpoints are untouched: the disk is full" in message
    assert "make room there, or lower checkpoint.keep=2" in message and "\n" not in message
    assert isinstance(ranks[broken].error, OSError)
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(writer, "write_file", write_file)
    assert written(tmp_path, 3).error is None
    assert choose(tmp_path, str(tmp_path)).step == 3


def test_a_rank_without_room_for_its_report(tmp_path, monkeypatch):
    """Its empty marker is enough for rank 0 not to wait for ever."""
    ranks = [written(tmp_path, 1, world_size=2, rank=r, start=False) for r in range(2)]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def on_rank_1(original):
        return lambda *a: full() if threading.current_thread() is ranks[1]._thread else original(*a)

    monkeypatch.setattr(writer, "write_file", on_rank_1(writer.write_file))
    monkeypatch.setattr(writer, "_mark", on_rank_1(writer._mark))
    for r in ranks:
        r.start()
    for r in ranks:
        r.wait()
    assert "rank 1 could not write" in str(ranks[0].error)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        assert written(disk, 1).error is None
        for size in (150_000, 400_000):  # the first fits once but not twice
            for name in ("a.pt", "a.safetensors"):
                content = {"ranks/small.pt": {"x": 1}, name: {"x": torch.zeros(size)}}
                failed = written(disk, 2, content=content | {f"second-{name}": {"x": torch.zeros(size)}})
                assert "the disk is full: a checkpoint takes about" in str(failed.error)
                assert names(disk) == ["step-00000001"]
        assert whats_wrong(disk / "step-00000001") is None
        assert shutil.disk_usage(disk).free > 900_000
        assert written(disk, 3).error is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)
