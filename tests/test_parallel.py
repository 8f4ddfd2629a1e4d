"""Sequence parallelism: several processes draw what one draws."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from denoise_jobs import FakeRecorder, draw, make_denoiser, make_dit, make_job
from parallel_worker import CACHED, CACHED_STEPS, PASSES, REQUESTS, prepared, small_flux
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from uniworld.checkpoint.tiny import random_tiny_dir
from uniworld.checkpoint.tiny_configs import DENOISER
from uniworld.engine import Engine, parallel
from uniworld.engine.denoiser import Denoiser
from uniworld.engine.graphs import StepGraphs, graphs_for_engine
from uniworld.engine.step_errors import StepErrors
from uniworld.models.flux import FluxConfig

HERE = Path(__file__).parent


def torchrun(*command, timeout=280):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout
    )


class Threads:
    """The collectives of `torch.distributed` among threads of this process."""

    def __init__(self, size):
        self.size, self.own = size, threading.local()
        self.barrier, self.box = threading.Barrier(size, timeout=60), [None] * size

    def get_rank(self, group):
        return self.own.rank

    def get_world_size(self, group):
        return self.size

    def exchanged(self, value):
        """What every thread brought."""
        self.box[self.own.rank] = value
        self.barrier.wait()
        brought = list(self.box)
        self.barrier.wait()
        return brought

    def all_to_all_single(self, received, sent, sizes_in, sizes_out, group):
        pieces = [brought[self.own.rank] for brought in self.exchanged(sent.split(sizes_out))]
        assert [len(piece) for piece in pieces] == sizes_in
        received.copy_(torch.cat(pieces))

    def all_gather_into_tensor(self, gathered, own, group):
        gathered.copy_(torch.cat(self.exchanged(own)))

    ReduceOp = torch.distributed.ReduceOp

    def all_reduce(self, tensor, op, group):
        assert op == self.ReduceOp.MAX
        tensor.copy_(torch.stack(self.exchanged(tensor.clone())).amax(0))

    def run(self, function):
        def of_rank(rank):
            self.own.rank = rank
            with torch.no_grad():
                return function()

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(of_rank, range(self.size)))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_24_heads_over_2_4_and_8(monkeypatch, size):
    """In fp64, with lengths that do not divide by the number of processes, alone and padded."""
    group = Threads(size)
    monkeypatch.setattr(parallel, "dist", group)
    model = small_flux(heads=24, dtype=torch.float64)
    monkeypatch.setitem(PASSES, "uneven", ((3, 7), 13, None))
    monkeypatch.setitem(PASSES, "padded", ((3, 7), 13, (5, 13, 11)))
    for name in ("uneven", "padded"):
        arguments = prepared(model, name)
        with torch.no_grad():
            expected = model.denoise(*arguments)
        found = group.run(lambda arguments=arguments: parallel.ParallelFlux(model, None).denoise(*arguments))
        assert len(found) == size
        for velocity in found:
            assert torch.equal(velocity, found[0])
            torch.testing.assert_close(velocity, expected, rtol=1e-11, atol=1e-11)


def test_shares_are_equal_up_to_one_token():
    for length, size in ((24, 8), (23, 8), (9, 2), (8, 8)):
        found = parallel.shares(length, size)
        counts = [part.stop - part.start for part in found]
        assert len(found) == size and sum(counts) == length and max(counts) - min(counts) <= 1
        assert [i for part in found for i in range(length)[part]] == list(range(length))


def drawn_by(group, model, jobs):
    """The jobs of each process; `jobs` makes them for a rank."""

    def of_rank():
        shared = parallel.ParallelFlux(model, None)
        graphs = graphs_for_engine("auto", torch.device("cpu"), parallel=True)
        return draw(Denoiser(shared, graphs=graphs), *jobs(group.get_rank(None)))

    return group.run(of_rank)


@pytest.mark.parametrize("settings", [{}, {"true_cfg_scale": 3.0}], ids=["one pass", "true cfg"])
def test_the_step_loop_draws_what_one_process_draws(monkeypatch, settings):
    group, model = Threads(2), make_dit()
    monkeypatch.setattr(parallel, "dist", group)

    def jobs(_):
        return [make_job(1, num_txt=5, **settings), make_job(2, num_txt=8, **settings)]

    expected = draw(make_denoiser(setting=False, model=model), *jobs(0))
    found = drawn_by(group, model, jobs)
    for mine, others, alone in zip(*found, expected):
        assert torch.equal(mine.latents, others.latents)
        torch.testing.assert_close(mine.latents, alone.latents, rtol=1e-5, atol=1e-5)
        assert mine.graphs == "eager: with sequence_parallel a step waits for other processes, which is not recorded"


CACHES = {
    "first block": {"cache": "first_block", "cache_threshold": 0.6},
    "taylor": {"cache": "taylor", "cache_interval": 2},
}


@pytest.mark.parametrize("size, cfg", [(2, 1.0), (2, 3.0), (4, 1.0)])
@pytest.mark.parametrize("cache", CACHES)
def test_step_caches_decide_as_one_process_does(monkeypatch, cache, size, cfg):
    """Over the tokens of all processes: no share alone knows the change of the whole."""
    group, model = Threads(size), make_dit()
    monkeypatch.setattr(parallel, "dist", group)
    settings = {"true_cfg_scale": cfg, "num_inference_steps": 10, **CACHES[cache]}

    def jobs(_):
        return [make_job(i, 5 + 3 * i, guidance_scale=(1.0, 3.5, 9.0)[i], **settings) for i in range(3)]

    expected = draw(make_denoiser(setting=False, model=model), *jobs(0))
    for found in drawn_by(group, model, jobs):
        for mine, alone in zip(found, expected):
            assert mine.step_cache.computed == alone.step_cache.computed
            known = [[c for c in job.step_cache.changes if c is not None] for job in (mine, alone)]
            assert known[0] == pytest.approx(known[1], rel=1e-4, abs=1e-6)
            torch.testing.assert_close(mine.latents, alone.latents, rtol=1e-4, atol=1e-4)
    assert any(job.step_cache.num_saved for job in expected)
    if cache == "first block" and cfg == 1:
        assert len({job.step_cache.computed for job in expected}) > 1, "all decided alike, so that nothing is shown"


def test_errors_of_a_step_cache_on_several_processes(monkeypatch):
    """Against the pass that all processes make together: nothing where nothing was left out, to the bit."""
    group, model = Threads(2), make_dit()
    monkeypatch.setattr(parallel, "dist", group)

    def of_rank():
        shared = parallel.ParallelFlux(model, None)
        return draw(Denoiser(shared, errors=StepErrors(shared)), make_job(1, **CACHES["taylor"]))

    (alone,) = draw(Denoiser(model, errors=StepErrors(model)), make_job(1, **CACHES["taylor"]))
    for (job,) in group.run(of_rank):
        assert [e == 0 for e in job.step_errors] == list(job.step_cache.computed)
        torch.testing.assert_close(torch.stack(job.step_errors), torch.stack(alone.step_errors), rtol=1e-3, atol=1e-5)


def test_cancelled_on_one_process_is_cancelled_on_all(monkeypatch):
    """After the same step, and no other job of the batch."""
    group, model, steps = Threads(2), make_dit(), []
    monkeypatch.setattr(parallel, "dist", group)

    def jobs(rank):
        def on_step(info):
            steps.append((rank, info.step))
            return not (rank == 1 and info.step == 2)

        return [make_job(1, on_step=on_step), make_job(2)]

    for stopped, running in drawn_by(group, model, jobs):
        assert stopped.cancelled and not running.cancelled
    assert sorted(steps) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_what_does_not_work_with_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "dist", Threads(1))
    parallel.dist.own.rank = 0
    shared = parallel.ParallelFlux(make_dit(), None)
    with pytest.raises(AttributeError, match="ParallelFlux has no forward"):
        shared.forward(None, None, None)
    with pytest.raises(ValueError, match="^cuda_graphs=True: with sequence_parallel a step waits for other"):
        Engine.from_pretrained("tiny", device="cuda", cuda_graphs=True, sequence_parallel=object())
    graphs = StepGraphs(True, recorder=FakeRecorder())
    with pytest.raises(ValueError, match="^cuda_graphs=True: steps wait"):
        graphs.forbid("steps wait")


def test_mistakes_are_told(monkeypatch):
    model = small_flux()
    monkeypatch.setattr(parallel, "dist", SimpleNamespace(get_rank=lambda g: 0, get_world_size=lambda g: 3))
    with pytest.raises(ValueError, match="sequence_parallel: 3 processes, must be a divisor of the DiT's 4 heads"):
        parallel.ParallelFlux(model, None)
    monkeypatch.setattr(parallel, "dist", SimpleNamespace(get_rank=lambda g: 0, get_world_size=lambda g: 4))
    monkeypatch.setitem(PASSES, "even", ((4, 4), 3, None))
    with pytest.raises(ValueError, match="sequence_parallel: 16 image and 3 text tokens, needs at least 4 tokens"):
        parallel.ParallelFlux(model, None).denoise(*prepared(model, "even"))


def test_two_processes_equal_one(tmp_path):
    done = torchrun(HERE / "parallel_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "results.safetensors")
    for name in PASSES:
        model = small_flux(dtype=found[name].dtype)
        with torch.no_grad():
            expected = model.denoise(*prepared(model, name))
        bound = 1e-5 if name != "bf16" else 0.02 * float(expected.abs().max())
        assert (found[name] - expected).abs().max() <= bound, name
    engine = Engine.from_pretrained(str(random_tiny_dir()), dtype="float32", device="cpu", progress=False)
    for index, result in enumerate(engine.run(REQUESTS)):
        torch.testing.assert_close(found[f"picture{index}"], result.latents, rtol=1e-5, atol=1e-5)
    for index, result in enumerate(engine.run(CACHED)):
        assert found[f"computed{index}"].tolist() == list(result.step_cache.computed)
        assert 0 < result.step_cache.num_saved < CACHED_STEPS
        torch.testing.assert_close(found[f"cached{index}"], result.latents, rtol=1e-4, atol=1e-4)
    assert found["stopped"].isfinite().all()


@pytest.mark.slow
def test_command_line_on_two_processes(tmp_path):
    """The first process writes and speaks; the picture, drawn with a LoRA, is that of one process."""
    dim, lora = FluxConfig.from_dict(DENOISER).dim, tmp_path / "style.safetensors"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, dim), (dim, 2)))
    linear = "transformer.transformer_blocks.0.attn.to_out.0"
    save_file({f"{linear}.lora_A.weight": a, f"{linear}.lora_B.weight": b}, lora)
    command = ["generate", "a cat", "--steps", 2, "--size", "64x48", "--seed", 3, "--device", "cpu"]
    command += ["--model", random_tiny_dir(), "--dtype", "float32"]
    command += ["--sequence-parallel", "--lora", f"{lora}:2", "-o", tmp_path / "two.png"]
    done = torchrun("-m", "uniworld.cli", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path / 'two.png'}\n"
    assert done.stderr.count("2 steps, seed 3") == 1 and done.stderr.count("are random") == 1

    engine = Engine.from_pretrained(str(random_tiny_dir()), dtype="float32", device="cpu", progress=False)

    def most_different():
        one = engine.generate("a cat", num_inference_steps=2, height=48, width=64, seed=3).images[0]
        return max(high for _, high in ImageChops.difference(one, Image.open(tmp_path / "two.png")).getextrema())

    assert most_different() > 1
    engine.load_lora(lora, scale=2.0)
    assert most_different() <= 1
