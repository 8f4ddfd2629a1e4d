"""Runs the real trainer on a small model again and again, killing it at chosen or random instants.

    python killed_runs.py SCENARIOS.json FOLDER

A scenario is {"id", "config", "attempts": [{"ranks", "until", "kill"}]}: its attempts are processes of one run folder,
one after the other. All are forked from this one process, which has DeepSpeed imported and trains nothing itself.
`kill` is null or an instant: seconds after training began, "done 11" (after step 11), or one in the attempt's last
save, which is at step `until`: "file 1" (halfway through the second file that a rank writes), "full 1" (no kill: rank 1
finds the disk full), "commit" (before the folder is renamed), "rename" (right after), "old" (while the oldest
checkpoint is deleted). With "slow" in the scenario every file is written so many seconds later, while training goes on.

FOLDER/ID holds the run folder `run`, `seen-RANK.jsonl` with every loss and batch number, and `end-RANKS.pt`, the state
at the end of the last attempt with so many ranks.
"""

import errno
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401
import torch
from train_fakes import small_batch, small_model

from uniworld.config import from_dict
from uniworld.train import build, checkpoints, sharding, trainer, writer
from uniworld.train.trainer import Trainer

READY = "ready"


class Numbers:
    """Batch numbers of a rank, in an order that no other rank has."""

    def __init__(self, rank):
        self.rank, self.next_number = rank, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next_number += 1
        return 1000 * self.rank + self.next_number

    def state_dict(self):
        return {"next_number": self.next_number}

    def load_state_dict(self, state):
        self.next_number = state["next_number"]


def make_config(scenario, attempt, folder):
    tree = {"sharding": {"dtype": "bf16"}, **scenario["config"]}
    tree["run_dir"] = str(folder / "run")
    return from_dict(trainer.TrainConfig, {"num_steps": attempt["until"], **tree, **attempt.get("config", {})})


def open_numbers(log, dtype):
    """Batches by number; what each gave is noted in `log`."""

    def opened(config, parts, world, shown):
        source = Numbers(world.rank)

        def encode(number):
            log.number = number
            return small_batch(config, number, dtype)

        return build.Batches(source, encode, lambda: 0)

    return opened


class Log:
    """Loss and batch number of every step, in full precision."""

    def __init__(self, path):
        self.file, self.number = path.open("a"), None

    def __call__(self, step, loss):
        self.file.write(json.dumps([step, self.number, float(loss.detach()).hex()]) + "\n")
        self.file.flush()


def state_of(run):
    """Masters, compute parameters, EMA and optimizer state by name, whole, on rank 0."""
    sharded, found = run.sharded, {}

    def take(prefix, tensors, dtype=torch.float32):
        found.update({f"{prefix} {name}": t for name, t in sharded.gather(tensors, dtype=dtype)})

    take("master", [s.tensor for s in sharded.slices()])
    take("params", [s.tensor for s in sharded.slices("params")], sharded.dtype)
    take("ema", [s.tensor for s in run.ema.slices()])
    states, layout = sharded.optimizer_states(), sharded.layout()
    for key in sorted(k for k, v in states[0].items() if isinstance(v, torch.Tensor) and v.ndim):
        take(key, [states[index][key][at : at + numel] for _, _, numel, index, at in layout])
    found["steps"] = torch.tensor([run.step, run.ema.num_updates, int(states[0]["step"])])
    return found


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def plan_death(kill, last_step, rank):
    """Arrange that this process kills itself, or fails, at the instant that `kill` names."""
    if not isinstance(kill, str) or kill.startswith("done"):
        return
    write_file, commit, delete = writer.write_file, writer.commit, checkpoints.delete
    target = checkpoints.folder_name(last_step)
    written = []

    def cut_off(path, content):
        if target in str(path):
            written.append(path)
            if len(written) == int(kill.split()[1]) + 1:
                path.parent.mkdir(parents=True, exist_ok=True)
                size = write_file(path, content)
                os.truncate(path, size // 2)
                die()
        return write_file(path, content)

    def cut_off_commit(temporary, folder, manifest):
        if folder.name == target and kill == "commit":
            die()
        commit(temporary, folder, manifest)
        if folder.name == target and kill == "rename":
            die()

    def cut_off_delete(folder):
        if kill == "old":
            old = checkpoints.hidden(folder, "old")
            folder.rename(old)
            (old / checkpoints.CONFIG).unlink()
            die()
        delete(folder)

    def full(path, content):
        if target in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_file(path, content)

    if kill.startswith("file"):
        writer.write_file = cut_off
    if kill == f"full {rank}":
        writer.write_file = full
    writer.commit, checkpoints.delete = cut_off_commit, cut_off_delete


def slow_down(seconds):
    """Have files of checkpoints written only after a while."""
    write_file = writer.write_file

    def late(path, content):
        time.sleep(seconds)
        return write_file(path, content)

    writer.write_file = late


def rank_process(scenario, attempt, rank, folder):
    """One rank of an attempt, in a process of its own; never returns."""
    config = make_config(scenario, attempt, folder)
    kill = attempt.get("kill")
    plan_death(kill, attempt["until"], rank)
    slow_down(scenario.get("slow", 0))
    log = Log(folder / f"seen-{rank}.jsonl")
    dtype = sharding.DTYPES[config.sharding.dtype]
    build.check = lambda config: None
    build.load_parts = lambda config, world, shown: None
    build.build_train_model = lambda config, parts: small_model(config)
    build.open_batches = open_numbers(log, dtype)
    run = Trainer(config, quiet=True)
    loss_of = trainer.training_loss

    def noted(*arguments, **options):
        loss = loss_of(*arguments, **options)
        log(run.step, loss)
        return loss

    trainer.training_loss = noted
    restore = run._restore

    def restored():
        restore()
        (folder / f"{READY}-{rank}").touch()

    run._restore = restored
    if isinstance(kill, str) and kill.startswith("done"):
        step_to_die = int(kill.split()[1])
        count = run._count_skipped

        def counted(report):
            count(report)
            if run.step == step_to_die:
                run.checkpointer.wait()
                die()

        run._count_skipped = counted
    code = run.run()
    state = state_of(run)
    if rank == 0:
        torch.save(state, folder / f"end-{attempt['ranks']}.pt")
    sharding.exit_process(code)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(scenario, attempt, folder):
    """Fork the ranks of an attempt; returns their process ids."""
    size, port, pids = attempt["ranks"], free_port(), []
    for rank in range(size):
        (folder / f"{READY}-{rank}").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            try:
                rank_process(scenario, attempt, rank, folder)
            except BaseException as error:
                (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        pids.append(pid)
    return pids


def kill_all(pids):
    """SIGKILL, as an out-of-memory killer would; the ids are those of our own unreaped children."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def attempt_run(scenario, attempt, folder):
    """Run one attempt to its end or its death; returns whether it ended by itself."""
    pids = start(scenario, attempt, folder)
    kill = attempt.get("kill")
    if isinstance(kill, (int, float)):
        while not all((folder / f"{READY}-{rank}").exists() for rank in range(attempt["ranks"])):
            time.sleep(0.002)
        deadline = time.monotonic() + kill
        while time.monotonic() < deadline:
            done = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids]
            if all(done):
                return reap(pids, scenario)
            time.sleep(0.001)
        kill_all(pids)
        return False
    if kill is not None and kill.startswith("full"):
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [1] * len(pids), f"{scenario['id']}: exit codes {codes}"
        return False
    if kill is not None:  # one rank kills itself, and as launchers do, the others follow
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        kill_all(pids)
        return False
    return reap(pids, scenario)


def reap(pids, scenario):
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert not any(codes), f"{scenario['id']}: exit codes {codes}"
    return True


def random_kills(scenario, folder):
    """Kill at `num_kills` random instants over as many runs as that takes; each run's end must be there to compare.

    Writes `kills.json`: how many kills came, how many while a checkpoint was being written, the folders of the runs.
    """
    rng = random.Random(scenario["seed"])
    kills, mid_save, runs = 0, 0, []
    while kills < scenario["num_kills"]:
        run = folder / f"run-{len(runs)}"
        run.mkdir()
        runs.append(run.name)
        finished = False
        while not finished:
            attempt = dict(scenario["attempts"][0])
            if kills < scenario["num_kills"]:
                attempt["kill"] = rng.uniform(0, scenario["longest_s"])
            finished = attempt_run(scenario, attempt, run)
            if not finished:
                kills += 1
                mid_save += any(run.glob("run/checkpoints/.*"))
    (folder / "kills.json").write_text(json.dumps({"kills": kills, "mid_save": mid_save, "runs": runs}))


def main(scenarios, folder):
    torch.set_num_threads(1)
    for scenario in json.loads(Path(scenarios).read_text()):
        home = Path(folder) / scenario["id"]
        home.mkdir(parents=True)
        if "num_kills" in scenario:
            random_kills(scenario, home)
            continue
        for attempt in scenario["attempts"]:
            ended = attempt_run(scenario, attempt, home)
            assert ended == (attempt.get("kill") is None), f"{scenario['id']}: {attempt} ended by itself: {ended}"


if __name__ == "__main__":
    main(*sys.argv[1:])
