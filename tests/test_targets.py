"""bench/targets.py: a verdict for every target of the issue, by the case that is furthest from it."""

from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
H200 = {"kind": "cuda", "device": "NVIDIA H200", "dtype": "bfloat16"}


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import targets

    return targets


def step(side, median_s, px=1024, **more):
    return H200 | {"bench": "full_scale", "case": f"step, edit, {px} px", "side": side, "median_s": median_s} | more


def verdicts(targets, rows):
    return {what: (measured, verdict) for what, _, measured, verdict in targets.lines(rows)}


def test_nothing_is_measured_without_rows_of_an_h200(targets):
    other = [step(side, 1.0) | {"device": "AMD EPYC", "kind": "cpu"} for side in ("ours", "diffusers eager")]
    for rows in ([], other, [step("ours", 1.0)]):
        found = targets.lines(rows)
        assert len(found) == 9 and {line[3] for line in found} == {"not measured"}


def test_the_worst_case_counts(targets):
    rows = [step("ours", 2.0), step("ours, CUDA graph", 1.0, of_gemm=0.8), step("diffusers eager", 1.7)]
    found = verdicts(targets, rows)
    assert found["bf16 step against diffusers eager"] == ("1.70x (step, edit, 1024 px)", "met")
    assert found["F(S) at 1024 px, of the GEMM rate"] == ("0.80 (step, edit, 1024 px)", "met")
    rows += [step("ours", 1.0, px=512), step("diffusers eager", 1.5, px=512), step("ours, fp8", 0.8, px=512)]
    found = verdicts(targets, rows)
    assert found["bf16 step against diffusers eager"] == ("1.50x (step, edit, 512 px)", "missed")
    assert found["fp8 step against our bf16"] == ("1.25x (step, edit, 512 px)", "missed")


def test_limits_from_above(targets):
    cold = {"bench": "full_scale", "case": "cold start, edit, 1024 px", "side": "ours"}
    outside = {"bench": "full_scale", "case": "request outside of the models, edit, 1024 px", "side": "ours"}
    memory = {"bench": "train_step", "case": "stage2, 512 px, all blocks", "side": "ours, optimizer in host memory"}
    rows = [H200 | cold | {"median_s": 29.0}, H200 | cold | {"side": "ours, nothing compiled yet", "median_s": 31.0}]
    rows += [H200 | cold | {"side": "ours, encoding after loading", "median_s": 35.0}]
    rows += [H200 | outside | {"median_s": 0.0049}, H200 | memory | {"median_s": 3.0, "peak_gib": 60.0}]
    found = verdicts(targets, rows)
    cold_case = "cold start, edit, 1024 px, ours, nothing compiled yet"
    assert found["cold start to the first picture"] == (f"31.0 s ({cold_case})", "missed")
    assert found["a request outside of its models"][1] == "met"
    assert found["stage 2 at full depth on one GPU of 80 GB"] == ("60.0 GiB (stage2, 512 px, all blocks)", "met")


def test_shares_of_copying_and_training(targets):
    ops = {"bench": "ops", "case": "adaln_modulate B=1", "side": "ours", "median_s": 1.0, "ceiling": "copy"}
    ema = {"bench": "ema", "case": "1 B parameters", "side": "ours", "median_s": 1.0, "of_ceiling": 0.84}
    product = ops | {"case": "gelu_linear M=1", "ceiling": "bfloat16 GEMM 8192", "of_ceiling": 0.1}
    found = verdicts(targets, [H200 | ops | {"of_ceiling": 0.9}, H200 | product])
    assert found["elementwise ops and EMA, of copying"] == ("0.90 (adaln_modulate B=1, bfloat16)", "met")
    found = verdicts(targets, [H200 | ops | {"of_ceiling": 0.9}, H200 | ema])
    assert found["elementwise ops and EMA, of copying"] == ("0.84 (1 B parameters, bfloat16)", "missed")
    training = {"bench": "train_step", "case": "stage1, 512 px", "side": "ours", "median_s": 1.0, "times_faster": 1.6}
    found = verdicts(targets, [H200 | training])
    assert found["training steps against the plain ones"] == ("1.60x (stage1, 512 px)", "met")
