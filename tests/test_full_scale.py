"""bench/full_scale.py at toy size on a CPU: every case and side runs, and agrees with its peers."""

import functools
import itertools
import time
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
SIZE = {"denoiser": {"num_layers": 1, "num_single_layers": 2}}  # on top of `tiny`
NEEDS_CUDA = {"ours, CUDA graph", "ours, fp8, CUDA graph"}
NOT_COMPILED = {"ours compiled", "diffusers compiled", "diffusers compiled, torchao fp8"}
EXACT = {"ours", "ours, first-block cache", "diffusers eager", "the authors' flow"}  # the threshold saves no step here
LOSSY = {"ours, fp8": 0.1, "ours, taylor cache": 1.0}


@pytest.fixture(scope="module")
def bench():
    """The module `bench/full_scale.py`, as the dry run imports it."""
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        patch.setenv("UNIWORLD_BENCH_SIZE", "tiny")
        import full_requests
        import full_scale

        patch.setattr(full_requests, "MAX_ROUNDS", 1)
        yield full_scale


@pytest.fixture(scope="module")
def scale(bench):
    fields = {"sides_px": (64,), "batches": (2,), "num_steps": 3, "overhead_steps": 2, "shrink": 16, "gemm": 64}
    return type(bench.SCALE)("toy", SIZE, **fields)


@pytest.fixture(scope="module")
def steps(bench, scale):
    made = bench.StepBench(scale, "cpu", torch.float32, may_compile=False, rounds=1)
    return {case: made.measure(case) for case in scale.step_cases}


@pytest.fixture(scope="module")
def requests(bench, scale):
    return bench.RequestBench(scale, "cpu", torch.float32, may_compile=False)


@pytest.fixture(scope="module")
def drawn(scale, requests):
    return {case: requests.measure(case) for case in scale.request_cases}


def check(bench, found, sides):
    """All sides are there with a time, or say why not; errors are those of rounding, or of what is lossy."""
    assert tuple(found) == sides
    for side, measured in found.items():
        if side in NEEDS_CUDA | NOT_COMPILED:
            assert isinstance(measured, bench.Missing) and str(measured), (side, measured)
            continue
        assert not isinstance(measured, Exception), (side, measured)
        assert measured.samples.median > 0 and measured.attention
        if measured.error is not None:
            assert measured.error < (1e-5 if side in EXACT else LOSSY[side]), (side, measured.error)
            assert side in EXACT or measured.error > 1e-4, side


def test_every_step(bench, scale, steps):
    assert {case.batch for case in steps} == {1, 2} and {case.num_references for case in steps} == {0, 1, 2}
    for case, found in steps.items():
        check(bench, found, bench.step_sides(case, 64))
        compared = {side for side, measured in found.items() if getattr(measured, "error", None) is not None}
        assert ("diffusers eager" in compared) == (case.batch == 1) and {"ours", "ours, fp8"} & set(found) <= compared
        told = {found[side].error_is for side in compared}
        reference = "ours, one after the other" if case.unequal else "diffusers eager"
        assert told == {"relative to diffusers in fp32" if case.batch == 1 else f"relative to {reference}"}
    sides = set(itertools.chain.from_iterable(steps.values()))
    exact = EXACT - {"ours, first-block cache", "the authors' flow"}
    assert sides == exact | NEEDS_CUDA | NOT_COMPILED | {"ours, fp8", "ours, one after the other"}
    assert [case.batch for case in steps if case.unequal] == [2]


@torch.inference_mode()
def test_a_batch_of_unequal_lengths_is_each_sample_alone(bench, scale):
    from full_cases import step_inputs
    from full_model import denoiser_config
    from full_steps import one_after_the_other, prepared_step
    from peers import random_flux, relative_error

    (case,) = (case for case in scale.step_cases if case.unequal)
    full = case.num_txt
    assert case.txt_lengths == (full * 3 // 4, full)
    assert 1 / 2 < case.flops / replace(case, unequal=False).flops < 1
    model = random_flux(denoiser_config(SIZE), torch.float32, "cpu")
    inputs = step_inputs(case, model.config, torch.float32, "cpu")
    alone = one_after_the_other(model, inputs, case.txt_lengths)()
    assert relative_error(prepared_step(model, inputs, case.txt_lengths)(), alone) < 1e-5
    assert relative_error(prepared_step(model, inputs)(), alone) > 1e-3  # padding is not to be attended to


def test_every_request(bench, scale, drawn):
    for case, found in drawn.items():
        check(bench, found, bench.request_sides(case, 64))
        ours, taylor = found["ours"].more, found.get("ours, taylor cache")
        assert ours["rooms_s"].keys() >= {"condition", "denoise", "decode"} and ours["graphs"].startswith("eager: ")
        assert taylor is None or taylor.more["saved_steps"] == 1
        assert found["the authors' flow"].more == {}


def test_requests_that_are_served_together(scale, requests):
    """Each draws what it draws alone, though their words differ in number."""
    (case,) = scale.served_cases
    found = requests.together(case)
    assert case.batch == 2 and case.unequal and list(found) == ["ours", "ours, one after the other"]
    assert 0 < found["ours"].error < 1e-5 and found["ours, one after the other"].error is None
    assert all(measured.samples.median > 0 for measured in found.values())


def test_rows_are_written_as_the_tests_write_them(bench, steps, drawn, monkeypatch):
    """The tests of the bench themselves, on what was measured above."""
    monkeypatch.setattr(bench, "step", steps.get)
    monkeypatch.setattr(bench, "request_of", drawn.get)
    rows, missing = {}, {}

    def report(name, case, side, dtype, samples, **more):
        rows[case, side] = more

    def report_missing(name, case, side, dtype, why):
        missing[case, side] = why

    def run(test, case, side, there=()):
        test(case, side, report, written=lambda *_: set(there), report_missing=report_missing)

    one = next(iter(steps))
    run(bench.test_step, one, "ours")
    made = rows[f"step, {one}", "ours"]
    assert made["tokens"] == 16 + (316 + 1260) // 16 and made["batch"] == 1 and made["attention"] == "flash"
    assert made["samples_per_s"] == 1 / steps[one]["ours"].samples.median
    for skipped in ("ours, CUDA graph", "diffusers compiled"):
        with pytest.raises(pytest.skip.Exception):
            run(bench.test_step, one, skipped)
    assert set(missing.values()) == {"needs a CUDA device", "nothing is compiled in this run"}
    monkeypatch.setitem(steps[one], "ours", RuntimeError("out of luck\nand more"))
    with pytest.raises(RuntimeError, match="out of luck"):
        run(bench.test_step, one, "ours")
    assert missing[f"step, {one}", "ours"] == "failed: RuntimeError: out of luck"
    with pytest.raises(pytest.skip.Exception, match="has its rows already"):
        run(bench.test_step, one, "ours", there=steps[one])
    run(bench.test_request, next(iter(drawn)), "ours, taylor cache")
    assert rows[f"request, {next(iter(drawn))}", "ours, taylor cache"]["steps"] == bench.SCALE.num_steps


def test_overhead_is_what_is_outside_of_the_models(scale, requests, monkeypatch):
    """A model that takes longer adds to its part alone; work between the models adds to the overhead alone."""
    case = scale.request_cases[0]
    import full_requests

    plain, parts = requests.overhead(case, rounds=1)
    models = {"vlm", "siglip", "clip", "t5", "dit", "vae"}
    assert parts.keys() == models | set(full_requests.OUTSIDE) and all(s > 0 for s in parts.values())
    assert plain.seconds[0] > sum(parts[part] for part in full_requests.OUTSIDE)

    def slow(call):
        return lambda *a, **k: (time.sleep(1.0), call(*a, **k))[1]

    with mock.patch.object(requests.model.vae, "decode", slow(requests.model.vae.decode)):
        samples, slower = requests.overhead(case, rounds=1)
    assert slower["vae"] > 1.0 > samples.median
    conditioner = requests.ours.conditioner
    with mock.patch.object(conditioner, "tokenize", slow(conditioner.tokenize)):
        samples, others = requests.overhead(case, rounds=1)
    assert samples.median > others["tokenize"] > 1.0 > others["vae"]


def test_overhead_of_stand_ins(scale, requests):
    """`bench/overhead.py`: whole requests, with neither the DiT's blocks nor the decoder."""
    import overhead

    case = scale.request_cases[0]
    blocks = requests.model.denoiser.transformer_blocks[0]
    with overhead.stand_ins(requests), mock.patch.object(type(blocks), "forward", side_effect=AssertionError):
        samples, seconds = requests.overhead(case, rounds=3)
        drawn = requests.ours.generate("a cat", **requests.settings(case, 2))
    assert len(samples.seconds) == 3 and samples.median > seconds["preprocess"] > 0
    assert drawn.images[0].size == (64, 64) and drawn.images[0].getpixel((0, 0)) == (128, 128, 128)


def test_edits_with_weights_that_wait(bench, monkeypatch):
    """`bench/offload.py`: less is stated to be on the device, and each side is an engine at its level."""
    import offload

    monkeypatch.setattr(offload, "interleave", functools.partial(offload.interleave, rounds=1))
    plain, stated = offload.engine_of(None, None)
    waiting, less = offload.engine_of("fp8", "cpu")
    assert waiting.offload.level == "cpu" and less < stated / 2
    for engine in (plain, waiting):
        samples, step_s, peak = offload.measure(engine)
        assert len(samples.seconds) == 1 and samples.median > offload.NUM_STEPS * step_s > 0 and peak is None


@pytest.mark.parametrize(
    "as_authors, num_references, passes", [(True, 0, (2, 1)), (True, 1, (2, 1)), (False, 0, (1, 0))]
)
def test_passes_of_the_authors_flow(requests, as_authors, num_references, passes):
    from full_cases import noise_pictures
    from original import OriginalPipeline

    vlm, siglip, head = (mock.Mock(return_value=None) for _ in range(3))
    model = requests.model
    seen = ((model.vlm.model.model, vlm), (model.semantic_encoder, siglip), (model.vlm.model.lm_head, head))
    hooks = [module.register_forward_hook(lambda *_, count=count: count()) for module, count in seen]
    pipeline = OriginalPipeline(model, requests.eager, as_authors=as_authors)
    settings = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 0}
    pipeline.draw(noise_pictures(num_references), "words", **settings)
    for hook in hooks:
        hook.remove()
    assert (vlm.call_count, siglip.call_count) == passes and head.call_count == as_authors


def test_torchao_is_given_what_ours_quantizes(bench, requests):
    from full_steps import quantized_names

    linears = {
        name: module
        for name, module in requests.eager.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    }
    assert quantized_names(requests.model.denoiser) == set(linears)


@torch.inference_mode()
def test_torchao_computes_in_e4m3_as_ours_does(bench, scale, monkeypatch):
    """Its check of the machine, which the product of two e4m3 matrices does not need, is left out."""
    quant_api = pytest.importorskip("torchao.quantization.quant_api", reason="torchao is not installed")
    from full_cases import step_inputs
    from full_model import denoiser_config
    from full_steps import diffusers_peer, prepared_step, quantized_names, torchao_fp8
    from peers import random_flux, relative_error, run_diffusers
    from torchao.quantization import Float8Tensor

    from uniworld.engine.quantize import quantized_copy

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    ours = random_flux(denoiser_config(SIZE), torch.bfloat16, "cpu")
    inputs = step_inputs(scale.step_cases[0], ours.config, torch.bfloat16, "cpu")
    peer = diffusers_peer(ours, "cpu", "sdpa")
    exact = run_diffusers(peer, **inputs)
    linears = torchao_fp8(peer, ours).named_modules()
    weights = {name: module.weight for name, module in linears if isinstance(module, torch.nn.Linear)}
    assert {name for name, weight in weights.items() if isinstance(weight, Float8Tensor)} == quantized_names(ours)
    theirs, mine = run_diffusers(peer, **inputs), prepared_step(quantized_copy(ours, "fp8"), inputs)()
    errors = relative_error(theirs, exact), relative_error(mine, exact)
    assert 1e-3 < errors[0] < 0.05 and errors[1] < 1.2 * errors[0]


def test_memory_of_one_side(bench):
    from residents import own_bytes

    ours, other = torch.nn.Linear(8, 6), torch.nn.Linear(8, 3)
    other.weight = torch.nn.Parameter(ours.weight.detach()[:3])  # a view: of the memory of ours
    assert own_bytes(ours) == own_bytes(ours, ours) == 4 * (48 + 6)
    assert own_bytes(ours, other) == 4 * (48 + 6 + 3)


@pytest.mark.parametrize("once", [True, False])
def test_peak_of_one_side_among_others(bench, monkeypatch, once):
    """A device on which other sides hold 100 bytes, and each call needs 7 more, the first one 50 while it compiles."""
    from residents import measure_once

    peaks, calls = {"max": 0}, []

    def call():
        calls.append(peaks["max"])
        peaks["max"] = max(peaks["max"], 100 + (50 if len(calls) == 1 else 7))
        return len(calls)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(max=100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["max"])
    result, peak_gib = measure_once(call, 30, "cuda", once=once)
    assert (result, peak_gib * 2**30) == ((1, 30 + 50) if once else (2, 30 + 7))
    assert measure_once(call, 30, "cpu")[1] is None


def test_a_failed_side_keeps_no_tensors(bench, capsys):
    from residents import without_frames

    kept = []

    def fail():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise RuntimeError(f"shape {tuple(tensor.shape)}") from ValueError("inner")

    try:
        fail()
    except RuntimeError as caught:
        error = without_frames(caught)
    assert str(error) == "shape (3,)" and error.__traceback__ is None and kept[0]() is None
    assert "in fail" in capsys.readouterr().err


def test_attention_that_ran_is_seen(bench):
    from peers import attention_kernels
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q = torch.randn(1, 2, 8, 16)
    for backend, name in ((SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash")):
        with sdpa_kernel(backend):
            assert attention_kernels(lambda: scaled_dot_product_attention(q, q, q)) == name
    q.requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention_kernels(lambda: scaled_dot_product_attention(q, q, q).sum().backward()) == "flash"
    assert q.grad is not None and attention_kernels(lambda: q + q) == ""


def test_rounds_fit_the_time_that_is_left(requests, monkeypatch):
    import full_requests

    monkeypatch.setattr(full_requests, "MAX_ROUNDS", 9)
    for left, rounds in ((float("inf"), 9), (200.0, 9), (100.0, 5), (10.0, 2), (-5.0, 2)):
        monkeypatch.setattr(requests.deadline, "end", time.time() + left)
        assert requests._rounds(9.9) == rounds


def test_sides_wait_where_there_is_no_time(bench, scale, requests, monkeypatch):
    """The two that are most wanted are measured; the others leave no row, so that a later run measures them."""
    monkeypatch.setattr(requests.deadline, "end", time.time() - 1)
    case = scale.request_cases[0]
    found = requests.measure(case)
    assert tuple(found) == bench.request_sides(case, 64)
    measured = [side for side, result in found.items() if not isinstance(result, Exception)]
    assert measured == ["ours", "diffusers eager"]
    left = [result for side, result in found.items() if side not in measured]
    assert left and all(isinstance(result, bench.NoTime) and "a later run" in str(result) for result in left)
    with pytest.raises(pytest.skip.Exception, match="a later run"):
        bench.succeeded("name", "side", left[0], report_missing=None)


def test_compilations_wait_where_there_is_no_time(bench, scale, monkeypatch):
    made = bench.StepBench(scale, "cpu", torch.float32, rounds=1)
    monkeypatch.setattr(made.deadline, "end", time.time() + 100)
    found = made.measure(scale.step_cases[0])
    waiting = {side for side, result in found.items() if isinstance(result, bench.NoTime)}
    assert waiting == NOT_COMPILED and not isinstance(found["ours, fp8"], Exception)


def test_cases_are_those_of_the_issue(bench):
    from full_cases import FULL

    assert [case.num_tokens for case in FULL.step_cases[:4]] == [5672, 4412, 2600, 1340]
    assert [case.num_tokens for case in FULL.step_cases if case.num_references == 2] == [6932, 3860]
    assert {case.batch for case in FULL.step_cases} == {1, 4, 8}
    flops = FULL.step_cases[0].flops
    batches = {(c.num_references, c.size_px, c.batch) for c in FULL.step_cases if not c.unequal}
    assert batches >= {(refs, px, batch) for refs in (0, 1) for px in (512, 1024) for batch in (1, 4, 8)}
    (eight,) = (case for case in FULL.step_cases if (case.num_references, case.size_px, case.batch) == (1, 1024, 8))
    assert flops == pytest.approx(9.576e13, rel=1e-3) and eight.flops == 8 * flops


def test_rows_that_are_there(bench, tmp_path, monkeypatch):
    import rows

    monkeypatch.setattr(rows, "commit", lambda: "abc")
    stamp = {"device": rows.device_name("cpu"), "commit": "abc"}
    for side, changed in (
        ("a", {}),
        ("b", {"commit": "old"}),
        ("c", {"missing": "no GPU"}),
        ("d", {"device": "other"}),
    ):
        rows.write(tmp_path, {"bench": "x", "case": "y", "side": side, "dtype": "float32"} | stamp | changed)
    found = {"bench": "x", "case": "y", "dtype": "float32", "kind": "cpu"}
    assert rows.sides_written(tmp_path, **found) == {"a", "c"}
    assert rows.sides_written(tmp_path, **found | {"case": "z"}) == rows.sides_written(None, **found) == set()
    monkeypatch.setattr(rows, "commit", lambda: "abc+changes")  # may be any code
    assert rows.sides_written(tmp_path, **found) == set()
