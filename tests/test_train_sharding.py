"""Training under ZeRO 1, 2 and 3 against the same training in plain torch."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_worker import STEPS, draws
from train_fakes import small_config, small_model

pytest.importorskip("deepspeed")

HERE = Path(__file__).parent
STAGES = ("stage1", "stage2")
RECOMPUTED = ["double", "single"]
OFFLOADED = {"offload_optimizer": True}
TWICE_RECOMPUTED = {"accumulation_steps": 2, "checkpoint_blocks": ["single"]}


def case(name, stage, zero_stage, *, dtype="fp32", **more):
    settings = {"zero_stage": zero_stage, "dtype": dtype} | more.pop("sharding", {})
    return {"id": name, "stage": stage, "sharding": settings, **more}


# A tenth of the norms that come, and an eps beside which the size of a gradient shows in AdamW's step.
CLIPPED = {"clip_norm": 0.03, "eps": 1e-3}
WITHOUT_PICTURES = (1, 4, 5)  # the second rank's batch of the first step, and both of the third
POISONED = {"1": "nan", "2": "inf"}
TWO_RANKS = [
    *(case(f"{stage}-zero{z}", stage, z) for stage in STAGES for z in (1, 2, 3)),
    *(case(f"wordy-zero{z}", "stage2", z, without_pictures=WITHOUT_PICTURES) for z in (1, 2, 3)),
    *(case(f"bf16-zero{z}", "stage2", z, dtype="bf16", sharding=TWICE_RECOMPUTED) for z in (1, 2, 3)),
    *(case(f"recomputed-zero{z}", "stage2", z, sharding={"checkpoint_blocks": RECOMPUTED}) for z in (2, 3)),
    *(case(f"clipped-zero{z}", "stage2", z, optim=CLIPPED) for z in (1, 2, 3)),
    *(
        case(f"clipped-bf16-zero{z}", "stage2", z, dtype="bf16", sharding=TWICE_RECOMPUTED, optim=CLIPPED)
        for z in (1, 2, 3)
    ),
    *(case(f"poisoned-zero{z}", "stage2", z, poisoned=POISONED | {"3": "gradient"}) for z in (1, 2, 3)),
    *(
        case(f"poisoned-bf16-zero{z}", "stage1", z, dtype="bf16", sharding={"accumulation_steps": 2}, poisoned=POISONED)
        for z in (1, 2, 3)
    ),
    *(case(f"prodigy-zero{z}", "stage1", z, optim={"name": "prodigy", "lr": 1.0}) for z in (1, 3)),
    *(case(f"offloaded-zero{z}", "stage2", z, sharding=OFFLOADED) for z in (1, 2)),
    *(case(f"offloaded-clipped-zero{z}", "stage2", z, sharding=OFFLOADED, optim=CLIPPED) for z in (1, 2)),
    *(
        case(f"offloaded-bf16-zero{z}", "stage2", z, dtype="bf16", sharding=OFFLOADED | TWICE_RECOMPUTED)
        for z in (1, 2)
    ),
    *(
        case(f"offloaded-poisoned-zero{z}", "stage2", z, sharding=OFFLOADED, poisoned=POISONED | {"3": "gradient"})
        for z in (1, 2)
    ),
]
ONE_RANK = [
    case("accumulated", "stage2", 2, sharding={"accumulation_steps": 2}),
    case("prodigy", "stage1", 2, sharding={"accumulation_steps": 2}, optim={"name": "prodigy", "lr": 1.0}),
]


def run_ranks(num_ranks, cases, folder):
    """{id: (facts, trained parameters)} of the cases, each trained by `num_ranks` processes."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [str(HERE / "sharded_worker.py"), str(folder / "cases.json"), str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    return {name: (facts, load_file(folder / f"{name}.safetensors")) for name, facts in results.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, TWO_RANKS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(1, ONE_RANK, tmp_path_factory.mktemp("one"))


@functools.cache
def reference(stage, accumulated=1, optimizer="adamw", without_pictures=(), **optim):
    """Two ranks' training in plain torch: losses, norms of the gradient before clipping, trained parameters."""
    config = small_config(stage, optim=optim)
    model = small_model(config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if optimizer == "prodigy":
        from prodigyopt import Prodigy

        optimizer = Prodigy(
            trained.values(), lr=1.0, betas=config.optim.betas, use_bias_correction=True, safeguard_warmup=True
        )
    else:
        settings = {"lr": config.optim.lr, "betas": config.optim.betas, "eps": config.optim.eps, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW(trained.values(), **settings)
    losses, norms = [], []
    for step in range(STEPS):
        numbers = range(step * 2 * accumulated, (step + 1) * 2 * accumulated)
        parts = [(batch, d) for batch, d in (draws(config, number, without_pictures) for number in numbers)]
        loss = sum(model(batch, d.latents, d.noise, d.sigma) for batch, d in parts) / len(parts)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {n: p.detach() for n, p in trained.items()}


def assert_equal_training(got, expected, rel=1e-4, atol=2e-5):
    """Losses and norms; parameters within `atol`, which is small beside STEPS x lr = 4e-3."""
    facts, parameters = got
    losses, norms, trained = expected
    assert facts["losses"] == pytest.approx(losses, rel=rel)
    assert facts["grad_norms"] == pytest.approx(norms, rel=rel)
    assert parameters.keys() == trained.keys()
    for name, value in parameters.items():
        assert (value - trained[name]).abs().max() < atol, name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_plain_torch_does(two_ranks, stage, zero_stage):
    assert_equal_training(two_ranks[f"{stage}-zero{zero_stage}"], reference(stage))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_rank_whose_batch_shows_no_picture_reduces_with_the_others(two_ranks, zero_stage):
    expected = reference("stage2", without_pictures=WITHOUT_PICTURES)
    assert_equal_training(two_ranks[f"wordy-zero{zero_stage}"], expected)
    assert expected[0] != reference("stage2")[0]


def distance(parameters, dtype=torch.float32):
    """How far training moved the parameters from their start in `dtype`, summed over the parameters."""
    start = dict(small_model(small_config("stage2")).named_parameters())
    return sum((value - start[name].to(dtype).float()).norm().item() for name, value in parameters.items())


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_are_clipped_by_their_norm_over_all_ranks(two_ranks, zero_stage):
    expected = reference("stage2", **CLIPPED)
    assert min(expected[1]) > 5 * CLIPPED["clip_norm"]
    assert_equal_training(two_ranks[f"clipped-zero{zero_stage}"], expected)
    unclipped = reference("stage2", eps=CLIPPED["eps"])[2]
    changed = [(expected[2][name] - value).abs().max() > 1e-4 for name, value in unclipped.items()]
    assert sum(changed) > len(changed) / 2, "the test would not see whether anything is clipped"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_is_clipped_over_accumulated_gradients(two_ranks, zero_stage):
    facts, parameters = two_ranks[f"clipped-bf16-zero{zero_stage}"]
    _, norms, trained = reference("stage2", accumulated=2, **CLIPPED)
    assert facts["grad_norms"] == pytest.approx(norms, rel=0.03)
    unclipped = reference("stage2", accumulated=2, eps=CLIPPED["eps"])[2]
    assert distance(unclipped) > 1.5 * distance(trained)
    assert distance(parameters, torch.bfloat16) == pytest.approx(distance(trained), rel=0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_stages_agree(two_ranks, stage):
    first = two_ranks[f"{stage}-zero1"][0]["losses"]
    for zero_stage in (2, 3):
        assert two_ranks[f"{stage}-zero{zero_stage}"][0]["losses"] == pytest.approx(first, rel=1e-6)


def test_one_rank_that_accumulates_equals_two(one_rank):
    assert_equal_training(one_rank["accumulated"], reference("stage2"))


@pytest.mark.parametrize("name", [c["id"] for c in TWO_RANKS if "poisoned" not in c])
def test_what_is_trained_and_what_is_not(two_ranks, name):
    facts, parameters = two_ranks[name]
    assert facts["changed_frozen"] == facts["gradients_of_frozen"] == []
    assert facts["num_trained"] == facts["own_numel"] == sum(p.numel() for p in parameters.values())
    if "bf16" not in name and not name.startswith("prodigy"):  # bf16 parameters round small updates away
        assert facts["unchanged_trained"] == []
    assert facts["written"]
    assert facts["skipped"] == [0] * STEPS


@pytest.mark.parametrize("name", [c["id"] for c in TWO_RANKS if c["sharding"]["zero_stage"] == 3])
def test_zero3_gathers_what_our_ops_read_and_keeps_nothing(two_ranks, name):
    """`gelu_linear` and `qk_norm_rope` take weights of child modules, which are gathered for their parents too."""
    assert two_ranks[name][0]["partitioned"]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters(two_ranks, zero_stage):
    facts, parameters = two_ranks[f"bf16-zero{zero_stage}"]
    losses, norms, trained = reference("stage2", accumulated=2)
    assert facts["losses"] == pytest.approx(losses, rel=0.01)
    assert facts["grad_norms"] == pytest.approx(norms, rel=0.03)
    start = dict(small_model(small_config("stage2")).named_parameters())
    for name, value in parameters.items():
        assert value.dtype == torch.float32
        if value.numel() > 100:
            assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded to bf16"
        moved, expected = value - start[name].bfloat16().float(), trained[name] - start[name]
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_optimizer_in_host_memory_trains_alike(two_ranks, zero_stage):
    """The same norms, clipping and masters."""
    assert_equal_training(two_ranks[f"offloaded-zero{zero_stage}"], reference("stage2"))
    assert_equal_training(two_ranks[f"offloaded-clipped-zero{zero_stage}"], reference("stage2", **CLIPPED))
    there, here = (two_ranks[f"{kind}-zero{zero_stage}"] for kind in ("offloaded-bf16", "bf16"))
    assert there[0]["offloads"] and not here[0]["offloads"]
    assert there[0]["losses"] == pytest.approx(here[0]["losses"], rel=1e-3)
    assert there[0]["grad_norms"] == pytest.approx(here[0]["grad_norms"], rel=0.02)
    assert distance(there[1], torch.bfloat16) == pytest.approx(distance(here[1], torch.bfloat16), rel=0.02)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_recomputed_blocks_give_the_same_training(two_ranks, zero_stage):
    assert_equal_training(two_ranks[f"recomputed-zero{zero_stage}"], reference("stage2"))


@pytest.mark.parametrize("kind, zero_stage", [
    *((kind, z) for kind in ("poisoned", "poisoned-bf16") for z in (1, 2, 3)),
    *(("offloaded-poisoned", z) for z in (1, 2)),
])  # fmt: skip
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks, kind, zero_stage):
    """Rank 1's loss is NaN in step 1 and infinite in step 2; in fp32 its gradient is infinite in step 3."""
    facts, parameters = two_ranks[f"{kind}-zero{zero_stage}"]
    last = 0 if kind == "poisoned-bf16" else 2
    assert facts["skipped"] == [0, 2, 2, last]
    assert facts["changed"] == [2, 0, 0, 2 - last]
    assert [math.isfinite(norm) for norm in facts["grad_norms"]] == [True, False, False, last == 0]
    assert all(value.isfinite().all() for value in parameters.values())


@pytest.mark.parametrize("name", ["prodigy-zero1", "prodigy-zero3", "prodigy"])
def test_prodigy_finds_one_step_size_over_all_ranks(two_ranks, one_rank, name):
    pytest.importorskip("prodigyopt")
    assert_equal_training((two_ranks | one_rank)[name], reference("stage1", optimizer="prodigy"), atol=1e-6)
