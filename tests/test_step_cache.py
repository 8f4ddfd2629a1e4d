"""Step caching against the same rules written out on diffusers' blocks, and what must stay exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from denoise_jobs import draw, make_denoiser, make_dit, make_job

from uniworld.engine.denoiser import Denoiser
from uniworld.engine.request import Request
from uniworld.engine.scheduler import Scheduler
from uniworld.engine.step_cache import extrapolate
from uniworld.engine.step_errors import StepErrors
from uniworld.models import flow

NUM_STEPS = 10
SLOW = {"num_inference_steps": NUM_STEPS}


@pytest.fixture(scope="module")
def theirs():
    """diffusers' model on the weights of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
        from peers import diffusers_flux

        return diffusers_flux(make_dit(), "cpu")


class Reference:
    """One job, one sample, one pass after the other, on diffusers' blocks."""

    def __init__(self, model, job):
        self.model, self.job = model, job
        self.sigmas = flow.sigmas(job.request.num_inference_steps, (job.height // 16) * (job.width // 16)).tolist()
        self.conditionings = [job.conditioning] + ([job.negative] if job.negative else [])
        self.computed, self.changes = [], []

    @torch.no_grad()
    def run(self):
        job = self.job
        latents = flow.initial_noise(job.seed, job.height, job.width, 4)
        memory = [{} for _ in self.conditionings]
        for step, (sigma, following) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            streams = [self.begin(c, latents, sigma) for c in self.conditionings]
            velocities = self.step(step, streams, memory)
            velocity = velocities[0]
            if len(velocities) > 1:
                velocity = velocities[1] + job.request.true_cfg_scale * (velocities[0] - velocities[1])
            latents = latents + (following - sigma) * velocity
        return latents

    def begin(self, conditioning, latents, sigma):
        """(embedded image, text, modulation input, rope) of a pass."""
        model, job = self.model, self.job
        numbers = (torch.tensor([1000 * x]) for x in (sigma, job.request.guidance_scale))
        temb = model.time_text_embed(*numbers, conditioning.pooled)
        text_ids = torch.zeros(conditioning.txt.shape[1], 3)
        rope = model.pos_embed(torch.cat([text_ids, flow.image_ids(job.height, job.width)]))
        return model.x_embedder(latents), model.context_embedder(conditioning.txt), temb, rope

    def blocks(self, img, txt, temb, rope, blocks):
        for block in blocks:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=temb, image_rotary_emb=rope)
        return img, txt

    def head(self, img, temb):
        return self.model.proj_out(self.model.norm_out(img, temb))

    @property
    def all_blocks(self):
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]


def relative(new, old):
    return float((new - old).abs().sum() / old.abs().sum())


class FirstBlockReference(Reference):
    def step(self, step, streams, memory):
        firsts = [self.blocks(*s, self.all_blocks[:1]) for s in streams]
        updates = [img - s[0] for (img, _), s in zip(firsts, streams)]
        change = max(relative(u, m["update"]) for u, m in zip(updates, memory)) if step else None
        compute = change is None or change >= self.job.request.cache_threshold
        self.computed.append(compute)
        self.changes.append(change)
        velocities = []
        for (img, txt), (_, _, temb, rope), update, kept in zip(firsts, streams, updates, memory):
            if compute:
                last, _ = self.blocks(img, txt, temb, rope, self.all_blocks[1:])
                kept |= {"update": update, "rest": last - img}
            velocities.append(self.head(img + kept["rest"], temb))
        return velocities


class TaylorReference(Reference):
    def step(self, step, streams, memory):
        order, interval = self.job.request.cache_order, self.job.request.cache_interval
        compute = step <= order or (step - order) % interval == 0
        self.computed.append(compute)
        velocities, changes = [], []
        for (img, txt, temb, rope), kept in zip(streams, memory):
            points = kept.setdefault("points", [])
            predicted = self.polynomial(points[-order - 1 :], self.sigmas[step]) if step > order else None
            residual = predicted
            if compute:
                last, _ = self.blocks(img, txt, temb, rope, self.all_blocks)
                residual = last - img
                changes += [relative(predicted, residual)] if predicted is not None else []
                points.append((self.sigmas[step], residual))
            velocities.append(self.head(img + residual, temb))
        self.changes.append(max(changes) if changes else None)
        return velocities

    def polynomial(self, points, sigma):
        """Solved from the powers of sigma, in fp64."""
        powers = np.vander([p[0] for p in points], increasing=True)
        values = np.stack([p[1].double().numpy().ravel() for p in points])
        coefficients = np.linalg.solve(powers, values)
        value = sum(c * sigma**k for k, c in enumerate(coefficients))
        return torch.from_numpy(value).view_as(points[0][1]).float()


def assert_same_changes(ours, expected):
    assert [c is None for c in ours] == [c is None for c in expected]
    known = [[c for c in changes if c is not None] for changes in (ours, expected)]
    assert known[0] == pytest.approx(known[1], rel=1e-3, abs=1e-5)


def assert_same(job, reference):
    expected = reference.run()
    assert job.step_cache.computed == tuple(reference.computed)
    assert_same_changes(job.step_cache.changes, reference.changes)
    torch.testing.assert_close(job.latents, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.53, 0.57, 0.7])
def test_first_block_equals_reference(theirs, threshold, cfg):
    settings = {**SLOW, "cache": "first_block", "cache_threshold": threshold, "true_cfg_scale": cfg}
    (job,) = draw(make_denoiser(), make_job(1, **settings))
    assert_same(job, FirstBlockReference(theirs, job))
    assert all(abs(c - threshold) > 1e-3 for c in job.step_cache.changes[1:]), "a decision on the edge proves nothing"
    assert 0 < job.step_cache.num_saved < NUM_STEPS and job.step_cache.computed[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("interval, order", [(2, 0), (3, 1), (3, 2), (4, 1)])
def test_taylor_equals_reference(theirs, interval, order, cfg):
    settings = {**SLOW, "cache": "taylor", "cache_interval": interval, "cache_order": order, "true_cfg_scale": cfg}
    (job,) = draw(make_denoiser(), make_job(1, **settings))
    assert_same(job, TaylorReference(theirs, job))
    later = range(order + 1, NUM_STEPS)
    assert job.step_cache.computed == (True,) * (order + 1) + tuple((i - order) % interval == 0 for i in later)
    assert any(c is not None for c in job.step_cache.changes)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
        ),
    ],
)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    "lossless", [{"cache": "first_block", "cache_threshold": 0.0}, {"cache": "taylor", "cache_interval": 1}], ids=str
)
def test_settings_that_leave_nothing_out_give_the_same_bits(lossless, cfg, num_layers, device):
    sizes = {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)} if device == "cuda" else {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = make_dit(dtype, device, num_layers=num_layers, **sizes)
    denoiser = make_denoiser(model=model, setting=False)
    settings = {"true_cfg_scale": cfg, "model": model, **SLOW}
    jobs = [make_job(seed, num_txt=5 + seed, **settings) for seed in (1, 2)]
    cached = [make_job(seed, num_txt=5 + seed, **settings, **lossless) for seed in (1, 2)]
    for plain, same in zip(draw(denoiser, *jobs), draw(denoiser, *cached)):
        assert torch.equal(plain.latents, same.latents)
        assert plain.step_cache is None
        assert same.step_cache.computed == (True,) * NUM_STEPS and same.step_cache.num_saved == 0
        assert sum(c is not None for c in same.step_cache.changes) >= NUM_STEPS - 2, "changes are told all the same"


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    "cache", [{"cache": "first_block", "cache_threshold": 0.57}, {"cache": "taylor", "cache_interval": 2}], ids=str
)
def test_unequal_jobs_of_a_batch_decide_as_each_alone(cache, cfg):
    denoiser = make_denoiser()

    def jobs():
        scales = (1.0, 3.5, 9.0)
        return [make_job(i, 4 + 3 * i, guidance_scale=scales[i], true_cfg_scale=cfg, **SLOW, **cache) for i in range(3)]

    together = draw(denoiser, *jobs())
    for batched, alone in zip(together, jobs()):
        draw(denoiser, alone)
        assert batched.step_cache.computed == alone.step_cache.computed
        assert_same_changes(batched.step_cache.changes, alone.step_cache.changes)
        torch.testing.assert_close(batched.latents, alone.latents, atol=2e-4, rtol=2e-4)
    if cache["cache"] == "first_block":
        patterns = {job.step_cache.computed for job in together}
        assert len(patterns) > 1, "all decided alike, so that nothing is shown"


def test_first_block_works_with_one_double_block():
    denoiser = make_denoiser(model=make_dit(num_layers=1))
    settings = {**SLOW, "cache": "first_block", "cache_threshold": 0.57}
    together = draw(denoiser, make_job(1, 5, **settings), make_job(2, 9, **settings))
    for job, alone in zip(together, (make_job(1, 5, **settings), make_job(2, 9, **settings))):
        draw(denoiser, alone)
        assert job.step_cache.num_saved > 0
        torch.testing.assert_close(job.latents, alone.latents, atol=2e-4, rtol=2e-4)


def test_saved_steps_run_no_other_block():
    model = make_dit()
    ran = []
    for i, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for settings, always in (({"cache": "first_block", "cache_threshold": 1.0}, 1), ({"cache": "taylor"}, 0)):
        ran.clear()
        (job,) = draw(make_denoiser(model=model), make_job(1, **SLOW, **settings))
        computed = job.step_cache.num_computed
        assert len(ran) == 5 * computed + always * job.step_cache.num_saved < 5 * NUM_STEPS


def test_extrapolation_is_exact_for_polynomials():
    x = torch.linspace(-1, 1, 7)
    points = [0.9, 0.7, 0.65]
    for degree in range(3):
        value = lambda s: (1 + x) * s**degree - x * s  # noqa: E731, B023
        used = points[-max(degree, 1) - 1 :]
        torch.testing.assert_close(extrapolate(used, [value(p) for p in used], 0.4), value(0.4), atol=2e-6, rtol=2e-6)


LOSSY = [{"cache": "first_block", "cache_threshold": 0.57}, {"cache": "taylor", "cache_interval": 2}]
LOSSLESS = [{"cache": "first_block", "cache_threshold": 0.0}, {"cache": "taylor", "cache_interval": 1}]


def draw_measured(*jobs):
    model = make_dit()
    return draw(Denoiser(model, errors=StepErrors(model)), *jobs)


@torch.no_grad()
@pytest.mark.parametrize("cache", LOSSY, ids=str)
def test_errors_are_those_against_all_blocks_of_diffusers(theirs, cache):
    """The velocities are read off the latents of neighbouring steps."""
    seen = {1: [], 2: []}
    settings = [{"seed": seed, "on_step": lambda info, seed=seed: seen[seed].append(info.latents)} for seed in seen]
    for job in draw_measured(*(make_job(num_txt=4 + 3 * s["seed"], **s, **SLOW, **cache) for s in settings)):
        reference = Reference(theirs, job)
        latents = [flow.initial_noise(job.seed, job.height, job.width, 4), *seen[job.seed]]
        assert len(job.step_errors) == NUM_STEPS and 0 < job.step_cache.num_saved < NUM_STEPS
        for step, (error, computed) in enumerate(zip(job.step_errors, job.step_cache.computed)):
            sigma, following = reference.sigmas[step : step + 2]
            img, txt, temb, rope = reference.begin(job.conditioning, latents[step], sigma)
            truth = reference.head(reference.blocks(img, txt, temb, rope, reference.all_blocks)[0], temb)
            velocity = (latents[step + 1] - latents[step]) / (following - sigma)
            assert float(error) == pytest.approx(float((velocity - truth).norm() / truth.norm()), rel=1e-2, abs=1e-4)
            assert (float(error) < 1e-5) if computed else (float(error) > 1e-2)


@pytest.mark.parametrize("cache", LOSSLESS, ids=str)
def test_the_error_of_what_leaves_nothing_out_is_zero(cache):
    for job in draw_measured(*(make_job(seed, 4 + seed, **SLOW, **cache) for seed in (1, 2))):
        assert job.step_errors == [0.0] * NUM_STEPS


def test_errors_change_no_bit_and_cost_nothing_without_a_cache():
    for settings in (LOSSY[0], {}):
        (measured,), (plain,) = draw_measured(make_job(1, **settings)), draw(make_denoiser(), make_job(1, **settings))
        assert torch.equal(measured.latents, plain.latents) and plain.step_errors == []
        assert bool(measured.step_errors) == bool(settings)


def test_a_cancelled_job_reports_the_steps_that_ran():
    job = make_job(1, **SLOW, cache="taylor", on_step=lambda info: info.step < 3)
    draw(make_denoiser(), job)
    assert job.step_cache.computed == (True, True, False) and job.step_cache.changes == (None,) * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache": "teacache"}, "cache='teacache': must be first_block or taylor, or None"),
        ({"cache_threshold": -0.1}, r"cache_threshold=-0.1: must be from 0 \(computes every step\) to 1"),
        ({"cache_threshold": float("nan")}, "cache_threshold=nan"),
        ({"cache_interval": 0}, "cache_interval=0: must be a whole number from 1 to 1000"),
        ({"cache_interval": 1.5}, "cache_interval=1.5: must be a whole number"),
        ({"cache_order": 4}, "cache_order=4: must be a whole number from 0 to 3"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt="", **settings)


def test_jobs_of_unequal_caches_share_no_batch():
    jobs = [
        make_job(0),
        make_job(1, cache_threshold=0.5),  # has no effect
        make_job(2, cache="first_block"),
        make_job(3, cache="first_block", cache_interval=7),  # has no effect
        make_job(4, cache="first_block", cache_threshold=0.5),
        make_job(5, cache="taylor"),
        make_job(6, cache="taylor", cache_order=2),
    ]
    scheduler = Scheduler(max_batch_size=8)
    for job in jobs:
        scheduler.add(job)
    batches = []
    while batch := scheduler.next_batch():
        batches.append([job.seed for job in batch])
    assert batches == [[0, 1], [2, 3], [4], [5], [6]]
