"""bench/alone.py at toy size on a CPU: what is taken away is taken away, and changes the step by rounding alone."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from uniworld.kernels.attention_backends import choose_backend

BENCH = str(Path(__file__).resolve().parent.parent / "bench")


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import alone

        return alone


@pytest.fixture(scope="module")
def model(alone):
    return alone.random_flux(alone.TOY, torch.float32, "cpu")


@pytest.fixture(scope="module")
def request_(alone, model):
    with torch.inference_mode():
        return alone.Request(model, alone.Case(1, 64, shrink=16), "cpu", torch.float32)


def test_every_variant_computes_the_same_step(alone, model, request_):
    variants = alone.variants(model, "cpu", torch.float32)
    truth = alone.call_of(request_, variants[alone.ALL], "cpu")()
    assert truth.isfinite().all() and len(variants) >= 14
    for name, variant in variants.items():
        latents = alone.call_of(request_, variant, "cpu")()
        assert alone.relative_error(latents, truth) < 1e-5, name


@pytest.mark.parametrize(
    "name", ["adaln_modulate", "gate_residual", "qk_norm_rope", "gelu_linear", "flow_step", "linear"]
)
def test_a_fused_op_that_is_taken_away_is_not_called(alone, request_, name, monkeypatch):
    """Its reference is called instead, as often, and the op is back afterwards."""
    calls = {}

    def counted(op, fn):
        def call(*args, **kwargs):
            calls[op] = calls.get(op, 0) + 1
            return fn(*args, **kwargs)

        return call

    counted_ops = {
        op: mock.Mock(fn=alone.OPS[op].fn, reference=counted(op, alone.OPS[op].reference)) for op in alone.OPS
    }
    monkeypatch.setattr(alone, "OPS", counted_ops)
    monkeypatch.setattr(alone.F, "linear", counted("linear", alone.F.linear))
    inside = alone.variants(request_.model, "cpu", torch.float32)[name].inside
    with torch.inference_mode():
        request_.step()
        before = dict(calls)
        with inside():
            request_.step()
        assert all(calls[op] > before.get(op, 0) for op in alone.FUSED[name]), calls
        calls.clear()
        request_.step()
        assert calls == before


def test_what_is_made_anew_and_the_products(alone, model, request_):
    with torch.inference_mode(), mock.patch.object(type(model), "modulation", side_effect=model.modulation) as made:
        request_.step()
        assert made.call_count == 0
        request_.step("modulation")
        assert made.call_count == 1
    with torch.inference_mode(), mock.patch.object(torch, "addmm", side_effect=torch.addmm) as products:
        request_.step()
        plain = products.call_count
        with alone.three_products():
            request_.step()
        assert products.call_count == 2 * plain + 3 * 3  # of one double block's two streams and one single block


def test_one_product_of_a_single_block_is_as_wide_as_both(alone, model, request_):
    widths, dim = [], model.config.dim

    def linear(x, weight, bias):
        widths.append(len(weight))
        return torch.nn.functional.linear(x, weight, bias)

    fused = {}
    with torch.inference_mode(), mock.patch.object(alone, "linear", linear), alone.one_product(fused):
        request_.step()
        request_.step()
    assert widths == [7 * dim] * 2 * model.config.num_single_layers
    assert [len(weight) for weight, _ in fused.values()] == [7 * dim] * model.config.num_single_layers


@torch.inference_mode()
def test_fp8_with_two_products_is_the_same_step(alone, model):
    quantized = alone.quantized_copy(model, "fp8")
    request = alone.Request(quantized, alone.Case(1, 64, shrink=16), "cpu", torch.float32)
    together, apart = (
        alone.call_of(request, variant, "cpu") for variant in (alone.Variant(), *list(alone.FP8_VARIANTS.values())[1:])
    )
    joint = quantized.single_transformer_blocks[0].joint
    with mock.patch.object(joint, "forward", side_effect=joint.forward) as product:
        truth = together()
        assert product.call_count == 1
        assert alone.relative_error(apart(), truth) < 1e-3 and product.call_count == 1


def test_every_other_attention_is_a_variant(alone, model):
    head_dim = alone.TOY.attention_head_dim
    chosen = choose_backend("auto", torch.device("cpu"), torch.float32, head_dim).name
    names = [name for name in alone.variants(model, "cpu", torch.float32) if name.startswith("attention by")]
    assert f"attention by {chosen}, math instead" in names and f"attention by {chosen}, {chosen} instead" not in names
