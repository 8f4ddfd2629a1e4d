"""Counted figures of a DiT step at full size, and that the counting is right."""

from pathlib import Path

import pytest
import torch
from denoise_jobs import make_dit

from uniworld.kernels.registry import INTERPRET, OPS, load_ops, use_backend
from uniworld.models import flow
from uniworld.models.flux import FluxConfig

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
CASE, NUM_IMG, NUM_TXT = "text to image, 512 px", 1024, 320
# Ops that are one pass over their operands, and how much more than the floor they may move: rows' statistics, rotary
# tables, norm weights and modulations.
ONE_PASS = {
    "adaln_modulate": 1.01,
    "gate_residual": 1.01,
    "gate_residual_adaln": 1.01,
    "qk_norm_rope": 1.05,
    "gelu_linear": 1.01,
    "flow_step": 1.01,
    "flow_noise": 1.01,
    "ema_update": 1.0,
    "quantize_rows": 1.0,
    "adaln_modulate_fp8": 1.01,
    "gate_residual_adaln_fp8": 1.01,
    "fp8_linear": 1.01,
}


@pytest.fixture(scope="module")
def counts():
    """The module `bench/counts.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import counting
        import counts

        counts.counting = counting
        return counts


@pytest.fixture(scope="module")
def step(counts):
    """Counts of one step at full size."""
    return counts.step_counts(CASE)


def test_our_step_launches_at_most_60_percent_of_diffusers(step):
    assert step["ours"].num_kernels <= 0.6 * step["diffusers eager"].num_kernels
    assert step["ours, forward"].num_kernels <= 0.6 * step["diffusers eager"].num_kernels


def test_our_step_launches_what_its_source_says(step):
    """Double block: 2 qkv, 2 norm and rope, attention, 2 out, 2 x 2 gate and norm, 2 x 2 MLP. Single: qkv, norm and
    rope, attention, MLP in, 2 products out, gate and norm. Around them: cast, embedder, 3 norms, join, head, Euler."""
    assert step["ours"].num_kernels == 19 * 15 + 38 * 7 + 8


def test_our_fp8_step_launches_what_its_source_says(step):
    """Double block: a quantization more before each of 2 out and 2 MLP products. Single: one of attention and MLP
    together, and one product in and one out in place of two each. No linear of a block runs in bf16."""
    assert step["ours, fp8"].num_kernels == 19 * (15 + 4) + 38 * 6 + 8
    assert step["ours, fp8"].kernels["aten::_scaled_mm"] == 19 * 8 + 38 * 2
    assert step["ours, fp8"].kernels["aten::addmm"] == 2, "embedder and head"


def test_our_fp8_step_computes_the_same_products_from_fewer_bytes(step):
    """A byte less for each weight of the blocks' linears, of which the quantizations between take a part back."""
    assert step["ours, fp8"].flops == step["ours"].flops
    num_weights = (19 * 24 + 38 * 12) * 3072**2
    assert 0.8 * num_weights < step["ours"].num_bytes - step["ours, fp8"].num_bytes < num_weights


def test_flops_are_those_of_the_formula(step):
    """F(S), and the embedder and the head on the image's tokens."""
    S, D = NUM_IMG + NUM_TXT, 3072
    blocks = 57 * (24 * D * D * S + 4 * D * S * S)
    assert step["ours"].flops == blocks + 2 * (2 * 64 * D) * NUM_IMG
    assert step["ours"].flops == pytest.approx(1.291e10 * S + 7.004e5 * S**2, rel=1e-3)


def test_diffusers_computes_the_same_products(step):
    """With the text's projection, the modulation and the embeddings, which our loop makes once a request."""
    assert step["diffusers eager"].flops == step["ours, forward"].flops > step["ours"].flops


def test_our_step_moves_fewer_bytes(step):
    assert step["ours"].num_bytes < step["diffusers eager"].num_bytes


@pytest.mark.parametrize("name", ONE_PASS)
def test_fused_ops_move_what_they_must(counts, name):
    for case in OPS[name].bench_cases:
        found, floor = counts.op_counts(name, case), OPS[name].bytes_moved(case)
        assert 1 <= found["ours"].num_bytes / floor <= ONE_PASS[name], case
        assert found["torch eager"].num_bytes > found["ours"].num_bytes, case
        assert found["torch eager"].num_kernels > found["ours"].num_kernels, case


def test_the_loss_with_its_gradient(counts):
    """Prediction and target are read twice, by the loss and by its gradient; the floor has them once."""
    for case in OPS["region_mse"].bench_cases:
        found, floor = counts.op_counts("region_mse", case), OPS["region_mse"].bytes_moved(case)
        assert 1 < found["ours"].num_bytes / floor < 2 and found["torch eager"].num_bytes > 7 * found["ours"].num_bytes


def test_the_connector_moves_what_it_must(counts):
    """And the rows between its own, which it clears."""
    (case,) = OPS["connector_mlp"].bench_cases
    found, floor = counts.op_counts("connector_mlp", case), OPS["connector_mlp"].bytes_moved(case)
    assert list(found) == ["ours"] and 1 <= found["ours"].num_bytes / floor < 1.03


@pytest.mark.parametrize("name", ["gelu_linear", "fp8_linear", "varlen_attention", "connector_mlp", "joint_attention"])
def test_flop_formulas_agree_with_the_registry(counts, name):
    """But for `varlen_attention`: its lengths are values on the device, and torch counts as if nothing were padding."""
    load_ops()
    for case in OPS[name].bench_cases:
        fixed = {"backend": counts.ATTENTION} if name == "joint_attention" else {}
        with counts.counting.fake_tensors():
            tensors = OPS[name].make_inputs(**case, dtype=torch.bfloat16, device="cpu")
            found = counts.counting.count(lambda: OPS[name].fn(**tensors, **fixed))  # noqa: B023
        assert found.flops == OPS[name].flops({**case, "ragged": 0})


def test_unequal_lengths_are_one_kernel(counts):
    (case,) = [case for case in OPS["joint_attention"].bench_cases if case["ragged"]]
    assert counts.op_counts("joint_attention", case)["ours"].kernels == {"uniworld::varlen_attention": 1}


def test_what_counts_as_a_kernel(counts):
    def call():
        x = torch.zeros(4, 6)
        x[:2].t().unsqueeze(0).expand(5, 6, 2)
        y = x.reshape(6, 4) + 1
        y.t().reshape(-1)  # copies
        y.copy_(x.view(6, 4))
        y.mul_(2)

    with counts.counting.fake_tensors():
        found = counts.counting.count(call)
    assert found.kernels == {"aten::zeros": 1, "aten::add": 1, "aten::clone": 1, "aten::copy_": 1, "aten::mul_": 1}
    assert found.num_bytes == 96 * (1 + 2 + 2 + 2 + 2)


def test_an_expanded_tensor_is_read_once(counts):
    with counts.counting.fake_tensors():
        a, b = torch.empty(8, 16), torch.empty(1, 16)
        assert counts.counting.count(lambda: a + b.expand(8, 16)).num_bytes == 4 * (128 + 16 + 128)
        assert counts.counting.count(lambda: a + a).num_bytes == 4 * (128 + 128)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_our_ops_launch_as_many_kernels_as_counted(counts, monkeypatch):
    """A step is run by Triton's interpreter, and the kernels that it runs are those that were counted."""
    from triton.runtime.interpreter import GridExecutor

    launched, run = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(1) or run(self, *a, **k))
    model = make_dit(num_layers=1, num_single_layers=1)
    config: FluxConfig = model.config
    with torch.no_grad(), use_backend("triton"):
        table = model.modulation(torch.tensor([[0.5]]), torch.tensor([3.5]), torch.randn(1, 32))
        pe = model.rope(flow.image_ids(32, 16))
        latents, txt = torch.randn(1, 2, config.in_channels), model.embed_txt(torch.randn(1, 3, 48))
        launched.clear()
        found = counts.counting.count(lambda: model.denoise(latents, txt, table[0], pe))
    assert len(launched) == sum(n for name, n in found.kernels.items() if name.startswith("uniworld::")) > 10
