"""CUDA graphs of a step: the logic with a stand-in that records ops on a CPU, the real ones on a GPU."""

import pytest
import torch
from denoise_jobs import FakeRecorder, draw, make_denoiser, make_dit, make_job
from torch import nn

from uniworld.engine import Engine
from uniworld.engine.compiled import compile_blocks
from uniworld.engine.graphs import MIN_STEPS, StepGraphs
from uniworld.engine.quantize import FP8_CAPABILITY, quantized_copy

GPU = torch.cuda.is_available()


def latents_of(*jobs, **options):
    return torch.cat([job.latents for job in draw(make_denoiser(setting=False, **options), *jobs)])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_graph_gives_the_bits_of_eager(cfg):
    """Also the second request, whose values have to get to where the first one's were."""
    recorder = FakeRecorder()
    denoiser = make_denoiser(recorder)
    for seed in (1, 2, 3):
        job = make_job(seed, true_cfg_scale=cfg, guidance_scale=seed)
        (drawn,) = draw(denoiser, job)
        assert torch.equal(drawn.latents, latents_of(make_job(seed, true_cfg_scale=cfg, guidance_scale=seed)))
        assert drawn.graphs == ("graph, recorded for this shape" if seed == 1 else "graph")
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 5 + 6 + 6)


def test_a_batch_of_equal_lengths_is_a_graph():
    jobs = draw(make_denoiser(FakeRecorder()), make_job(1), make_job(2))
    assert torch.equal(torch.cat([job.latents for job in jobs]), latents_of(make_job(1), make_job(2)))
    assert all(job.graphs.startswith("graph") for job in jobs)


def test_the_number_of_steps_needs_no_graph_of_its_own():
    recorder = FakeRecorder()
    denoiser = make_denoiser(recorder)
    draw(denoiser, make_job(1))
    for steps in (9, 2):
        (drawn,) = draw(denoiser, make_job(2, num_inference_steps=steps))
        assert torch.equal(drawn.latents, latents_of(make_job(2, num_inference_steps=steps)))
    assert recorder.num_recorded == 1


@pytest.mark.parametrize(
    "other",
    [
        [make_job(2, num_txt=8)],
        [make_job(2, height=80, width=64)],  # as many tokens, at other positions
        [make_job(2), make_job(3)],
        [make_job(2, true_cfg_scale=2.0)],
    ],
    ids=["text", "size", "batch", "passes"],
)
def test_another_shape_is_another_graph(other):
    recorder = FakeRecorder()
    denoiser = make_denoiser(recorder)
    draw(denoiser, make_job(1))
    draw(denoiser, *other)
    assert recorder.num_recorded == 2 and len(denoiser.graphs) == 2


def test_the_scale_of_true_cfg_is_part_of_a_graph():
    denoiser = make_denoiser(FakeRecorder())
    for scale in (2.0, 5.0):
        (drawn,) = draw(denoiser, make_job(1, true_cfg_scale=scale))
        assert torch.equal(drawn.latents, latents_of(make_job(1, true_cfg_scale=scale)))


def test_changed_weights_are_seen():
    """In place by the same graph, and at a new address by a new one."""
    recorder, model = FakeRecorder(), make_dit()
    denoiser = make_denoiser(recorder, model=model)
    draw(denoiser, make_job(1))
    model.proj_out.weight.mul_(2)
    (drawn,) = draw(denoiser, make_job(1))
    assert torch.equal(drawn.latents, latents_of(make_job(1), model=model)) and recorder.num_recorded == 1
    model.proj_out.weight = nn.Parameter(model.proj_out.weight * 2, requires_grad=False)
    (drawn,) = draw(denoiser, make_job(1))
    assert torch.equal(drawn.latents, latents_of(make_job(1), model=model)) and recorder.num_recorded == 2


def test_weights_of_another_shape_at_the_same_address_are_seen():
    """As where one LoRA makes room for another."""
    recorder, model, memory = FakeRecorder(), make_dit(), torch.zeros(8)
    denoiser = make_denoiser(recorder, model=model)
    for length in (4, 8, 4):
        model.register_buffer("beside", memory[:length])
        draw(denoiser, make_job(1))
    assert recorder.num_recorded == 2 and len(denoiser.graphs) == 2


def test_steps_handed_out_keep_their_values():
    seen = []
    (drawn,) = draw(make_denoiser(FakeRecorder()), make_job(1, on_step=lambda info: seen.append(info.latents)))
    later = draw(make_denoiser(FakeRecorder()), make_job(1))[0].latents
    assert torch.equal(seen[-1], drawn.latents) and torch.equal(later, drawn.latents)
    assert len({step.data_ptr() for step in seen}) == len(seen)
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_cancelling_leaves_a_graph_usable():
    denoiser = make_denoiser(FakeRecorder())
    (stopped,) = draw(denoiser, make_job(1, on_step=lambda info: info.step < 2))
    assert stopped.cancelled
    (drawn,) = draw(denoiser, make_job(2))
    assert drawn.graphs == "graph" and torch.equal(drawn.latents, latents_of(make_job(2)))


def test_the_least_recently_used_goes_first():
    recorder = FakeRecorder()
    denoiser = make_denoiser(recorder, max_graphs=2)
    for num_txt in (5, 6, 5, 7):  # 7 puts out 6
        draw(denoiser, make_job(1, num_txt=num_txt))
    assert recorder.num_recorded == 3 and len(denoiser.graphs) == 2
    draw(denoiser, make_job(1, num_txt=5))
    assert recorder.num_recorded == 3
    draw(denoiser, make_job(1, num_txt=6))
    assert recorder.num_recorded == 4 and len(denoiser.graphs) == 2


def test_memory_is_bounded():
    recorder = FakeRecorder(num_bytes=1_000_000)
    denoiser = make_denoiser(recorder, max_bytes=2_500_000)
    for num_txt in (5, 6, 7):
        draw(denoiser, make_job(1, num_txt=num_txt))
        assert denoiser.graphs.num_bytes <= 2_500_000
    assert len(denoiser.graphs) == 2
    draw(denoiser, make_job(1, num_txt=7))
    assert recorder.num_recorded == 3


def test_buffers_count_as_memory():
    denoiser = make_denoiser(FakeRecorder())
    draw(denoiser, make_job(1, num_txt=7))
    latents, txt, modulation, rope = 20 * 16, 7 * 64, (2 * 12 + 3 * 3 + 2) * 64, 2 * 20 * 8
    assert denoiser.graphs.num_bytes == 4 * (latents + 1 + txt + modulation + rope)


def test_a_graph_that_is_too_large_is_not_kept_nor_tried_again():
    recorder = FakeRecorder(num_bytes=3 * 2**30)
    denoiser = make_denoiser(recorder, max_bytes=2**30)
    for _ in range(2):
        (drawn,) = draw(denoiser, make_job(1))
        assert drawn.graphs == "eager: a graph of this size takes 3.00 GiB, more than the 1.00 GiB allowed"
        assert torch.equal(drawn.latents, latents_of(make_job(1)))
    assert recorder.num_recorded == 1 and len(denoiser.graphs) == 0


def test_what_fails_while_recording_is_eager_and_says_so():
    denoiser = make_denoiser(FakeRecorder(error=RuntimeError("operation not permitted\nlong trace")))
    for num_txt in (5, 6):
        (drawn,) = draw(denoiser, make_job(1, num_txt=num_txt))
        assert drawn.graphs == "eager: recording failed: operation not permitted"
        assert torch.equal(drawn.latents, latents_of(make_job(1, num_txt=num_txt)))


def test_no_memory_while_recording_concerns_that_shape_only():
    recorder = FakeRecorder(error=torch.OutOfMemoryError("no memory"))
    denoiser = make_denoiser(recorder)
    (drawn,) = draw(denoiser, make_job(1, num_txt=5))
    assert drawn.graphs == "eager: no memory left for a graph of this size"
    assert torch.equal(drawn.latents, latents_of(make_job(1, num_txt=5)))
    recorder.error = None
    assert draw(denoiser, make_job(1, num_txt=5))[0].graphs.startswith("eager: no memory")
    assert draw(denoiser, make_job(1, num_txt=6))[0].graphs.startswith("graph")


def test_true_raises_where_recording_fails():
    denoiser = make_denoiser(FakeRecorder(error=RuntimeError("not permitted")), setting=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        draw(denoiser, make_job(1))


@pytest.mark.parametrize(
    "jobs, why",
    [
        ([make_job(1, num_txt=5), make_job(2, num_txt=6)], "texts of unequal length share the batch"),
        ([make_job(1, cache="taylor")], "cache='taylor' chooses what a step computes"),
        ([make_job(1, num_inference_steps=MIN_STEPS - 1)], f"fewer than {MIN_STEPS} steps do not pay for recording"),
    ],
    ids=["padded", "cache", "steps"],
)
def test_eager_says_why(jobs, why):
    recorder = FakeRecorder()
    assert all(job.graphs == f"eager: {why}" for job in draw(make_denoiser(recorder), *jobs))
    assert recorder.num_recorded == 0


def test_eager_on_this_machine_says_why():
    assert draw(make_denoiser(), make_job(1))[0].graphs == "eager: the model is on cpu, not on a CUDA device"
    assert draw(make_denoiser(setting=False), make_job(1))[0].graphs == "eager: CUDA graphs are switched off"


def test_weights_elsewhere_are_eager():
    """As where blocks are fetched from host memory for each step."""
    model = make_dit()
    model.rarely_used = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    (drawn,) = draw(make_denoiser(FakeRecorder(), model=model), make_job(1))
    assert drawn.graphs == "eager: not all weights are on cpu"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="cuda_graphs='always': must be 'auto', True or False"):
        StepGraphs("always")
    with pytest.raises(ValueError, match="cuda_graphs=True: needs a CUDA device, the model is on cpu"):
        Engine.from_pretrained("tiny", device="cpu", progress=False, cuda_graphs=True)


def test_clear_forgets():
    recorder = FakeRecorder()
    denoiser = make_denoiser(recorder)
    draw(denoiser, make_job(1))
    denoiser.graphs.clear()
    draw(denoiser, make_job(1))
    assert recorder.num_recorded == 2


def test_forbidden_is_eager():
    denoiser = make_denoiser(FakeRecorder())
    draw(denoiser, make_job(1))
    denoiser.graphs.forbid("steps wait for another process")
    assert draw(denoiser, make_job(1))[0].graphs == "eager: steps wait for another process"
    assert len(denoiser.graphs) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("num_jobs", [1, 2])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_on_a_gpu(cfg, num_jobs, quantize):
    """Bits of eager, several shapes in turn, so that one graph's memory is not another's."""
    sizes = {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
    model = make_dit(torch.bfloat16, "cuda", **sizes)
    if quantize:
        if torch.cuda.get_device_capability() < FP8_CAPABILITY:
            pytest.skip("this GPU has no e4m3")
        model = quantized_copy(model, quantize)
    graphed, eager = make_denoiser(setting=True, model=model), make_denoiser(setting=False, model=model)

    def jobs(seed, num_txt):
        return [make_job(seed + i, num_txt, model, true_cfg_scale=cfg) for i in range(num_jobs)]

    for round_, (seed, num_txt) in enumerate([(1, 7), (2, 12), (3, 7), (4, 12)]):
        expected = draw(eager, *jobs(seed, num_txt))
        drawn = draw(graphed, *jobs(seed, num_txt))
        for mine, theirs in zip(drawn, expected):
            assert mine.graphs == ("graph, recorded for this shape" if round_ < 2 else "graph")
            assert torch.equal(mine.latents, theirs.latents)
            assert mine.latents.isfinite().all()
    assert len(graphed.graphs) == 2 and graphed.graphs.num_bytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_compiled_blocks_on_a_gpu():
    model = make_dit(torch.bfloat16, "cuda", attention_head_dim=64, axes_dims_rope=(8, 28, 28))
    compile_blocks(model)
    graphed, eager = make_denoiser(setting=True, model=model), make_denoiser(setting=False, model=model)
    for seed, how in ((1, "graph, recorded for this shape"), (2, "graph")):
        (expected,), (drawn,) = (draw(d, make_job(seed, model=model)) for d in (eager, graphed))
        assert drawn.graphs == how and torch.equal(drawn.latents, expected.latents)
