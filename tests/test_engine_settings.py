"""Settings of an engine that meet: fewer bits, weights in host memory, LoRA, CUDA graphs, caches, several processes."""

from pathlib import Path

import pytest
import torch
from denoise_jobs import FakeRecorder, draw, make_denoiser, make_dit, make_job
from safetensors.torch import save_file
from test_parallel import Threads

from uniworld.checkpoint.load import load_uniworld
from uniworld.engine import Engine, parallel
from uniworld.engine.denoiser import Denoiser
from uniworld.engine.graphs import graphs_for_engine
from uniworld.engine.lora import Loras
from uniworld.engine.offload import Stream, place, streamed_modules, turns_of
from uniworld.engine.quantize import quantized_copy
from uniworld.engine.step_errors import StepErrors
from uniworld.models.queries import LearnedQueries

CAT = Path(__file__).resolve().parent.parent / "examples" / "cat.jpg"
CPU = torch.device("cpu")
FAST = {"num_inference_steps": 2, "height": 48, "width": 48, "seed": 1}


def streamed(model):
    for turns in turns_of(model, "cpu"):
        Stream(turns, CPU)
    return model


MODELS = {
    "fp8": lambda: quantized_copy(make_dit(), "fp8"),
    "offloaded": lambda: streamed(make_dit()),
    "both": lambda: streamed(quantized_copy(make_dit(), "fp8")),
}


@pytest.mark.parametrize("name", MODELS)
def test_several_processes_draw_what_one_draws(monkeypatch, name):
    group, models = Threads(2), [MODELS[name]() for _ in range(3)]
    monkeypatch.setattr(parallel, "dist", group)

    def jobs():
        return [make_job(1, num_txt=5), make_job(2, num_txt=8)]

    def of_rank():
        return draw(Denoiser(parallel.ParallelFlux(models[group.get_rank(None)], None)), *jobs())

    for mine, others, alone in zip(*group.run(of_rank), draw(make_denoiser(model=models[2]), *jobs())):
        assert torch.equal(mine.latents, others.latents)
        if name == "offloaded":
            torch.testing.assert_close(mine.latents, alone.latents, rtol=1e-5, atol=1e-5)
        else:  # a sum in another order moves values across the middle between two e4m3 numbers
            assert (mine.latents - alone.latents).norm() < 0.01 * alone.latents.norm()


def test_quantized_steps_are_recorded():
    model, recorder = MODELS["fp8"](), FakeRecorder()
    graphed, eager = make_denoiser(recorder, model=model), make_denoiser(setting=False, model=model)
    for seed in (1, 2):
        (drawn,), (expected,) = (draw(d, make_job(seed)) for d in (graphed, eager))
        assert drawn.graphs.startswith("graph") and torch.equal(drawn.latents, expected.latents)
    assert recorder.num_recorded == 1


def test_modulation_in_host_memory_leaves_graphs_alone():
    model = make_dit()
    expected = draw(make_denoiser(setting=False, model=model), make_job(1))[0].latents
    for turns in turns_of(model, "modulation"):
        Stream(turns, CPU)
    denoiser = make_denoiser(FakeRecorder(), model=model)
    for how in ("graph, recorded for this shape", "graph"):
        (drawn,) = draw(denoiser, make_job(1))
        assert drawn.graphs == how and torch.equal(drawn.latents, expected)


FORBIDDEN = {
    "several processes": ({"parallel": True}, "with sequence_parallel a step waits for other processes"),
    "blocks in host memory": ({"offload": "cpu"}, "with offload='cpu' weights arrive during a step"),
    "errors": ({"report_error": True}, "report_error compares every step with the unquantized DiT"),
}


@pytest.mark.parametrize("settings, why", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_is_not_recorded_says_so(settings, why):
    """Also where the weights are on the device all the time, as the slots of offloaded ones are."""
    denoiser = make_denoiser()
    denoiser.graphs = graphs_for_engine("auto", CPU, **settings)
    assert draw(denoiser, make_job(1))[0].graphs.startswith(f"eager: {why}")
    with pytest.raises(ValueError, match=f"^cuda_graphs=True: {why}"):
        graphs_for_engine(True, torch.device("cuda"), **settings)
    for level in (None, "modulation", "parts"):
        graphs_for_engine(True, torch.device("cuda"), offload=level)


def test_engines_pass_their_settings_to_graphs():
    """Before anything is loaded."""
    for settings in ({"offload": "cpu"}, {"quantize": "fp8", "report_error": True}, {"sequence_parallel": object()}):
        with pytest.raises(ValueError, match="^cuda_graphs=True: "):
            Engine.from_pretrained("tiny", device="cuda", cuda_graphs=True, **settings)
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, offload="cpu", cuda_graphs="auto")
    assert engine.generate("a cat", **FAST).graphs == (
        "eager: with offload='cpu' weights arrive during a step, which is not recorded"
    )


@pytest.mark.parametrize("name", MODELS)
def test_step_caches(name):
    """A sample that computes while its neighbour does not is drawn as it would be alone."""
    model, settings = MODELS[name](), {"cache": "first_block", "cache_threshold": 0.57, "num_inference_steps": 10}
    together = draw(make_denoiser(model=model), make_job(1, **settings), make_job(2, **settings))
    decisions = list(zip(*(job.step_cache.computed for job in together)))
    assert (True, False) in decisions or (False, True) in decisions
    for job, seed in zip(together, (1, 2)):
        (alone,) = draw(make_denoiser(model=model), make_job(seed, **settings))
        assert job.step_cache.computed == alone.step_cache.computed
        assert (job.latents - alone.latents).norm() < 0.01 * alone.latents.norm()


@torch.inference_mode()
def test_errors_are_those_of_each_job_and_step():
    """Recomputed from the latents of the steps, with a step cache, whose error is part of them."""
    exact, model, seen = make_dit(), MODELS["fp8"](), {1: [], 2: []}

    def jobs():
        return [
            make_job(seed, cache="taylor", true_cfg_scale=2.0, on_step=lambda info, seed=seed: seen[seed].append(info))
            for seed in (1, 2)
        ]

    plain = draw(make_denoiser(model=model), *jobs())
    steps = {seed: [info.latents for info in infos] for seed, infos in seen.items()}
    measured = draw(Denoiser(model, errors=StepErrors.of_quantized(exact, CPU)), *jobs())
    for index, (job, expected) in enumerate(zip(measured, plain)):
        assert torch.equal(job.latents, expected.latents) and expected.step_errors == []
        prepared = make_denoiser(model=exact)._prepare([job])
        passed, latents = prepared.passes[0], [prepared.latents, *steps[index + 1]]
        assert len(job.step_errors) == 6
        velocity = model.denoise(latents[0], passed.txt, passed.table[0], prepared.pe)
        truth = exact.denoise(latents[0], passed.txt, passed.table[0], prepared.pe)
        torch.testing.assert_close(job.step_errors[0], (velocity - truth).norm() / truth.norm(), rtol=0.02, atol=0)
        computed = [float(e) for e, c in zip(job.step_errors, job.step_cache.computed) if c]
        left_out = [float(e) for e, c in zip(job.step_errors, job.step_cache.computed) if not c]
        assert min(left_out) > max(computed)


def factors(folder, dim):
    """A file with factors on linears of both kinds of block and on a modulation."""
    generator = torch.Generator().manual_seed(5)
    sizes = {
        "transformer_blocks.0.attn.to_q": (dim, dim),
        "transformer_blocks.1.ff.net.0.proj": (dim, 4 * dim),
        "single_transformer_blocks.0.proj_out": (5 * dim, dim),
        "single_transformer_blocks.1.norm.linear": (dim, 3 * dim),
    }
    tensors = {}
    for linear, (num_in, num_out) in sizes.items():
        tensors[f"transformer.{linear}.lora_A.weight"] = torch.randn(2, num_in, generator=generator)
        tensors[f"transformer.{linear}.lora_B.weight"] = torch.randn(num_out, 2, generator=generator)
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


def test_lora_beside_offloaded_weights(tmp_path):
    """The bits of weights that stay; fusing would be lost with the next fetch, and is refused."""
    here, moved = make_dit(), streamed(make_dit())
    file = factors(tmp_path, here.config.dim)

    def latents(model):
        return draw(make_denoiser(model=model), make_job(1))[0].latents

    base = latents(here)
    known = Loras(moved, CPU, torch.float32, streamed_modules(turns_of(moved, "cpu")))
    for each in (known, Loras(here, CPU, torch.float32)):
        each.load(file, "style", 1.0)
    assert not torch.allclose(latents(here), base, atol=1e-2)
    for _ in range(2):
        assert torch.equal(latents(moved), latents(here))
    with pytest.raises(ValueError, match="^fuse_lora: offloaded weights take no products, leave it unfused: .*to_qkv"):
        known.fuse([])
    assert torch.equal(latents(moved), latents(here))
    known.unload([])
    assert torch.equal(latents(moved), base)


def test_engines_pass_what_is_offloaded_to_loras(tmp_path):
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, offload="modulation")
    dim = engine.model.denoiser.config.dim
    engine.load_lora(factors(tmp_path, dim))
    with pytest.raises(ValueError, match=r"offloaded weights take no products, .*: single_transformer_blocks.1.norm"):
        engine.fuse_lora()


def test_errors_are_not_reported_with_a_lora(tmp_path):
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, quantize="fp8", report_error=True)
    with pytest.raises(ValueError, match="^load_lora: with report_error steps are held against a DiT without LoRA"):
        engine.load_lora(factors(tmp_path, engine.model.denoiser.config.dim))


def test_errors_of_a_step_cache_are_reported_with_a_lora(tmp_path):
    """The DiT that steps are held against is the one that draws, and has the LoRA too; also where its weights wait."""
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, report_error=True, offload="cpu")
    engine.load_lora(factors(tmp_path, engine.model.denoiser.config.dim))
    result = engine.generate("a cat", **FAST, cache="taylor", cache_order=0)
    assert result.step_errors[0] == 0 < result.step_errors[1]


def test_all_at_once(tmp_path):
    """FP8, weights in host memory and a LoRA: the bits of FP8 with that LoRA alone."""
    results = []
    for offload in (None, "cpu"):
        engine = Engine.from_pretrained("tiny", device="cpu", progress=False, quantize="fp8", offload=offload)
        base = engine.generate("a cat", **FAST).latents
        engine.load_lora(factors(tmp_path, engine.model.denoiser.config.dim))
        results.append(engine.generate("a cat", **FAST).latents)
        assert not torch.allclose(results[-1], base, atol=1e-2)
    assert torch.equal(*results)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="^offload='disk': must be one of modulation, parts, cpu"):
        place(None, "disk")


@pytest.mark.parametrize(
    "references, queries, brought",
    [
        ("vae", False, ["vlm", "decode", "text_encoders", "connectors", "denoise", "decode"]),
        ("siglip", True, ["vlm", "semantic_encoder", "text_encoders", "vlm", "connectors", "denoise", "decode"]),
        ("none", False, ["vlm", "text_encoders", "connectors", "denoise", "decode"]),
    ],
)
def test_variants_bring_what_they_need(monkeypatch, references, queries, brought):
    """VAE latents of reference pictures need the VAE, and learned queries the VLM once more."""
    model = load_uniworld("tiny", device="cpu", progress=False)
    model.references = references
    model.known_world = None  # or every picture goes through the semantic encoder, to see whether it is strange
    if queries:
        model.queries = LearnedQueries.fresh(4, model.vlm.model.get_input_embeddings().weight, seed=4)
    expected = Engine(model).edit(CAT, "make it snow", **FAST)
    engine, groups = Engine(model, offload="parts"), []
    bring = engine._parts.bring
    monkeypatch.setattr(engine._parts, "bring", lambda group: (groups.append(group), bring(group)))
    assert torch.equal(engine.edit(CAT, "make it snow", **FAST).latents, expected.latents)
    assert groups == brought
