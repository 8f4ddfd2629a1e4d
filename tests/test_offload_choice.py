"""offload="auto": the level that fits the memory that is free, at full size and in an engine."""

from pathlib import Path

import pytest
import torch

from uniworld.checkpoint.load import load_uniworld
from uniworld.engine import Engine, offload_choice
from uniworld.engine.offload import LEVELS, weight_bytes, weights_of
from uniworld.engine.offload_choice import RESERVE, choose_offload, free_bytes, largest

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
FAST = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3}
GIB = 2**30


@pytest.fixture(scope="module")
def full():
    """UniWorld-V1 at full size, shapes alone, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        from full_model import FULL_SIZE, random_uniworld

        model = random_uniworld(FULL_SIZE, "meta", torch.bfloat16)
    model.device = torch.device("cuda", 0)
    return model


def with_free(monkeypatch, gib):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(gib * GIB), 80 * GIB))


# The sums of docs/memory.md, and 3 GiB beside them.
CHOICES = [
    (None, 79.1, None),
    (None, 50.97, None),
    (None, 50.95, "modulation"),
    (None, 45.1, "parts"),
    (None, 34.7, "cpu"),
    (None, 23.5, "cpu"),
    ("fp8", 44.0, None),
    ("fp8", 42.9, "modulation"),
    ("fp8", 31.5, "parts"),
    ("fp8", 23.5, "cpu"),
    ("nf4", 39.5, None),
    ("nf4", 23.5, "parts"),
    ("nf4", 22.0, "cpu"),
]


@pytest.mark.parametrize("quantize, free, level", CHOICES, ids=str)
def test_the_lightest_that_fits_at_full_size(monkeypatch, full, quantize, free, level):
    with_free(monkeypatch, free)
    before = full.denoiser
    choice = choose_offload(full, quantize=quantize)
    assert choice.level == level
    assert f"fit the {free:.2f} that are free" in choice.why
    for lighter in (None, *LEVELS)[: (None, *LEVELS).index(level)]:
        assert f"{lighter or 'none'} needs" in choice.why
    assert full.denoiser is before


def test_it_says_what_it_counted(monkeypatch, full):
    with_free(monkeypatch, 47.4)
    assert str(choose_offload(full)) == (
        "modulation: 42.12 GiB of weights and 3.00 beside them fit the 47.40 that are free; none needs 47.96"
    )


def test_too_little_for_anything(monkeypatch, full):
    with_free(monkeypatch, 12)
    choice = choose_offload(full)
    assert choice.level == "cpu" and choice.why.startswith("nothing needs less, but 17.01 GiB of weights")


def test_the_unquantized_copy_counts(monkeypatch, full):
    with_free(monkeypatch, 59.1)
    exact = full.denoiser
    copy = sum(w.value.nbytes for w in weights_of([exact], without=exact.modulation_linears()))
    assert 39.95 + 3 + copy / GIB == pytest.approx(59.07, abs=0.02)
    assert choose_offload(full, quantize="fp8", report_error=True).level is None
    with_free(monkeypatch, 59.0)
    assert choose_offload(full, quantize="fp8", report_error=True).level == "modulation"
    assert choose_offload(full, quantize="fp8").level is None


def test_what_torch_keeps_unused_is_free(monkeypatch):
    with_free(monkeypatch, 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert free_bytes(torch.device("cuda")) == 15 * GIB
    assert free_bytes(torch.device("cpu")) is None


def test_on_a_cpu_nothing_waits(capsys):
    engine = Engine.from_pretrained("tiny", device="cpu", offload="auto")
    result = engine.generate("a cat", **FAST)
    assert result.offload == "none: cpu has no memory of its own to spare"
    assert f"offload {result.offload}" in capsys.readouterr().err
    assert Engine.from_pretrained("tiny", device="cpu", progress=False).generate("a cat", **FAST).offload == "none"


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_an_engine_is_placed_as_chosen(monkeypatch, level, quantize):
    """With free memory between what this level needs and what the one before it does: the bits of that level."""
    asked = Engine.from_pretrained("tiny", device="cpu", progress=False, offload=level, quantize=quantize)
    need = largest(weight_bytes(asked.model, level))
    monkeypatch.setattr(offload_choice, "free_bytes", lambda device: need + RESERVE)
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, offload="auto", quantize=quantize)
    assert engine.offload.level == level
    result, expected = engine.generate("a cat", **FAST), asked.generate("a cat", **FAST)
    assert torch.equal(result.latents, expected.latents)
    assert result.offload.startswith(f"{level or 'none'}: ") and expected.offload == (level or "none")
    assert (engine._parts is None) == (asked._parts is None) == (level not in ("parts", "cpu"))


def test_sizes_are_known_before_anything_is_read():
    """The weights are on meta, in the dtypes that they come in, when the choice is made."""
    seen = {}

    def choose(model):
        parts = (model.denoiser, model.vlm, model.vae, model.text_encoders, model.semantic_encoder)
        assert all(p.is_meta for part in parts for p in part.parameters())
        seen["largest"] = largest(weight_bytes(model, None))
        return ("vae", "denoiser")

    model = load_uniworld("tiny", device="cpu", dtype="bfloat16", progress=False, in_host=choose)
    assert seen["largest"] == largest(weight_bytes(model, None)) > 0
    assert not any(p.is_meta for p in model.vae.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tiny_fits():
    engine = Engine.from_pretrained("tiny", device="cuda", progress=False, offload="auto")
    assert engine.offload.level is None and "GiB of weights" in engine.offload.why
    plain = Engine.from_pretrained("tiny", device="cuda", progress=False)
    assert torch.equal(engine.generate("a cat", **FAST).latents, plain.generate("a cat", **FAST).latents)
