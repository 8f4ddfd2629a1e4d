"""The first request is encoded while the DiT's weights are read."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from uniworld.checkpoint import load, weights
from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.save import save_uniworld
from uniworld.checkpoint.tiny import random_tiny_dir
from uniworld.engine import Engine, Request
from uniworld.engine.conditioner import Conditioner
from uniworld.models.prompts import MAX_TOKENS

WAIT_S = 30
PICTURE = Image.effect_noise((64, 48), 80).convert("RGB")
FAST = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3}
REQUEST = Request(prompt="a cat", images=(PICTURE,), negative_prompt="a dog", true_cfg_scale=2.0, **FAST)


@pytest.fixture
def reads(monkeypatch):
    """Counts the VLM's passes, and whether the DiT was there when each began."""
    found = []
    encode = Conditioner.read

    def read(self, *args, **kwargs):
        found.append(not next(self.model.denoiser.parameters()).is_meta)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Conditioner, "read", read)
    return found


def engine(**settings):
    return Engine.from_pretrained(
        str(random_tiny_dir()), device="cpu", dtype=torch.float32, progress=False, first_request=REQUEST, **settings
    )


def draw(engine):
    return engine.edit(PICTURE, "a cat", negative_prompt="a dog", true_cfg_scale=2.0, **FAST)


def test_it_is_encoded_before_the_dit_is_there(monkeypatch, reads):
    """The DiT's weights are not read before the request is encoded: one that waited for them would wait for ever."""
    encoded, fill = threading.Event(), weights.fill

    def after_encoding(plans, **settings):
        if threading.current_thread() is not threading.main_thread():
            assert encoded.wait(WAIT_S)
        fill(plans, **settings)

    prepare = Conditioner.prepare

    def tell(self, request):
        prepare(self, request)
        encoded.set()

    monkeypatch.setattr(weights, "fill", after_encoding)
    monkeypatch.setattr(Conditioner, "prepare", tell)
    made = engine()
    assert reads == [False, False]  # the prompt and the negative one
    result = draw(made)
    assert len(reads) == 2  # found where they were kept
    monkeypatch.undo()
    alone = Engine.from_pretrained(str(random_tiny_dir()), device="cpu", dtype=torch.float32, progress=False)
    assert torch.equal(result.latents, draw(alone).latents)


@pytest.mark.parametrize("settings", [{"quantize": "fp8"}, {"offload": "modulation"}])
def test_with_what_changes_the_dit(reads, settings):
    draw(engine(**settings))
    assert len(reads) == 2


@pytest.mark.parametrize("settings", [{"offload": "parts"}, {"offload": "cpu", "quantize": "fp8"}])
def test_encoders_in_host_memory_wait_for_the_request(reads, settings):
    made = engine(**settings)
    assert reads == []
    draw(made)
    assert reads == [True, True]


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_that_is_too_long_is_told_before_any_weight_is_read(monkeypatch, field):
    monkeypatch.setattr(weights, "_fill_one", lambda *_: pytest.fail("a weight was read"))
    request = replace(REQUEST, **{field: "cat " * MAX_TOKENS})
    with pytest.raises(ValueError, match=f"^{field}: .* tokens with its images, at most {MAX_TOKENS} are allowed"):
        Engine.from_pretrained(str(random_tiny_dir()), device="cpu", progress=False, first_request=request)


def test_an_error_while_encoding_ends_the_reading(monkeypatch):
    before, read = threading.active_count(), []
    monkeypatch.setattr(weights, "MAX_READERS", 1)
    fill_one, failed = weights._fill_one, threading.Event()

    def slowly(plan, name, *rest):
        if threading.current_thread() is not threading.main_thread() and name.startswith("denoise_tower.denoiser."):
            assert failed.wait(WAIT_S)
            time.sleep(0.02)  # the main thread needs a moment to end it
            read.append(name)
        return fill_one(plan, name, *rest)

    monkeypatch.setattr(weights, "_fill_one", slowly)

    def fails(model):
        assert next(model.denoiser.parameters()).is_meta and not next(model.vae.parameters()).is_meta
        failed.set()
        raise ValueError("prompt: too long")

    with pytest.raises(ValueError, match="prompt: too long"):
        load_uniworld(str(random_tiny_dir()), device="cpu", progress=False, meanwhile=fails)
    assert threading.active_count() == before
    assert len(read) < 20  # of hundreds


def test_a_broken_dit_is_told_once_the_request_is_encoded(monkeypatch):
    fill_one = weights._fill_one

    def broken(plan, name, *rest):
        if name == "denoise_tower.denoiser.x_embedder.weight":
            raise ValueError(f"{name} cannot be read")
        return fill_one(plan, name, *rest)

    monkeypatch.setattr(weights, "_fill_one", broken)
    seen = []
    with pytest.raises(ValueError, match=r"x_embedder\.weight cannot be read"):
        load_uniworld(str(random_tiny_dir()), device="cpu", progress=False, meanwhile=seen.append)
    assert len(seen) == 1


def test_the_bar_counts_every_byte_once(monkeypatch):
    from contextlib import contextmanager

    told = []

    @contextmanager
    def bar(title, num_bytes, enabled):
        told.append(-num_bytes)
        yield told.append

    monkeypatch.setattr(load, "byte_progress", bar)
    for meanwhile in (None, lambda model: None):
        told.clear()
        load_uniworld(str(random_tiny_dir()), device="cpu", meanwhile=meanwhile)
        assert sum(told) == 0 and told[0] < 0


def test_references_through_the_vae_wait_for_its_layout(reads, tmp_path):
    model = load_uniworld(str(random_tiny_dir()), device="cpu", dtype="float32", progress=False)
    model.references = "vae"
    folder = save_uniworld(model, tmp_path / "out")
    parts = {name: str(random_tiny_dir() / name) for name in ("flux", "siglip")}
    Engine.from_pretrained(str(folder), **parts, device="cpu", progress=False, first_request=REQUEST)
    assert reads == []
