"""The engine end to end on the model `tiny`: rooms, batches, seeds, cancellation, chat."""

import base64
import io

import pytest
import torch
from PIL import Image

from uniworld.engine import Engine, Request
from uniworld.engine.cache import ConditioningCache
from uniworld.engine.chat import parse_messages
from uniworld.engine.request import Turn, with_images_last
from uniworld.engine.scheduler import QueueFull, Scheduler
from uniworld.models.conditioning import Conditioning
from uniworld.models.prompts import PERCEPTION_PROMPTS


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("tiny", progress=False, use_t5=True)


def picture(color: str = "red", size: tuple[int, int] = (90, 60)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste("white", (10, 10, 30, 30))
    return image


FAST = {"num_inference_steps": 3, "height": 64, "width": 96}


def test_edit_reports_everything(engine):
    result = engine.edit(picture(), "make it blue", **FAST, seed=5)
    assert [image.size for image in result.images] == [(96, 64)]
    assert result.latents.shape == (1, 24, 64) and result.latents.dtype == torch.float32
    assert (result.seed, result.height, result.width, result.num_inference_steps) == (5, 64, 96, 3)
    assert set(result.timings) == {"condition", "denoise", "decode", "total"}
    assert result.timings["total"] == pytest.approx(sum(result.timings[k] for k in ("condition", "denoise", "decode")))


def test_result_tells_how_steps_ran(engine):
    plain = engine.generate("x", **FAST, seed=5)
    cached = engine.generate("x", **FAST, seed=5, cache="taylor", cache_order=0)
    assert plain.graphs == "eager: the model is on cpu, not on a CUDA device" and plain.step_cache is None
    assert cached.graphs == "eager: the model is on cpu, not on a CUDA device"
    assert cached.step_cache.computed == (True, False, False) and cached.step_cache.num_saved == 2
    assert not torch.equal(plain.latents, cached.latents)


def test_every_input_matters(engine):
    """Prompt, picture, second picture, seed, guidance, steps: each changes the latents."""
    base = engine.edit(picture(), "make it blue", **FAST, seed=5).latents
    assert torch.equal(base, engine.edit(picture(), "make it blue", **FAST, seed=5).latents)
    others = [
        engine.edit(picture(), "make it green", **FAST, seed=5),
        engine.edit(picture("green"), "make it blue", **FAST, seed=5),
        engine.edit([picture(), picture("green")], "make it blue", **FAST, seed=5),
        engine.edit(picture(), "make it blue", **FAST, seed=6),
        engine.edit(picture(), "make it blue", **FAST, seed=5, guidance_scale=4.0),
        engine.edit(picture(), "make it blue", **FAST, seed=5, use_t5=False),
        engine.edit(picture(), "make it blue", **FAST, seed=5, pooled_prompt="something else"),
        engine.edit(picture(), "make it blue", **FAST, seed=5, true_cfg_scale=3.0),
        engine.generate("make it blue", **FAST, seed=5),
    ]
    for i, other in enumerate(others):
        assert not torch.allclose(base, other.latents, atol=1e-4), i


def test_size_auto_follows_the_picture(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "anchor_px", 256 * 256)
    result = engine.edit(picture(size=(120, 80)), "x", num_inference_steps=1)
    assert (result.height, result.width) == (192, 288)  # 3:2 at the area of 256x256
    result = engine.generate("x", num_inference_steps=1)
    assert (result.height, result.width) == (256, 256)


def test_steps_and_guidance_are_the_models_where_none_are_named(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "num_inference_steps", 2)
    monkeypatch.setattr(engine.model, "guidance_scale", 1.5)
    size = {"height": 64, "width": 64, "seed": 1}
    default = engine.generate("x", **size)
    assert default.num_inference_steps == 2
    named = engine.generate("x", num_inference_steps=2, guidance_scale=1.5, **size)
    assert torch.equal(default.latents, named.latents)
    other = engine.generate("x", num_inference_steps=3, guidance_scale=4.0, **size)
    assert other.num_inference_steps == 3 and not torch.allclose(other.latents, default.latents, atol=1e-3)
    guided = engine.generate("x", guidance_scale=4.0, **size)
    assert guided.num_inference_steps == 2 and not torch.equal(guided.latents, default.latents)


def test_a_request_with_pictures_has_steps_of_its_own(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "num_inference_steps", 2)
    size = {"height": 64, "width": 64, "seed": 1}
    for own, steps in ((1, 1), (None, 2)):
        monkeypatch.setattr(engine.model, "edit_inference_steps", own)
        assert engine.edit(picture(), "x", **size).num_inference_steps == steps
        assert engine.generate("x", **size).num_inference_steps == 2
    assert engine.edit(picture(), "x", num_inference_steps=3, **size).num_inference_steps == 3


def test_batch_of_unequal_requests_equals_each_alone(engine):
    """Different prompts, lengths, numbers of pictures, guidance and seeds in one batch."""
    requests = [
        Request(prompt="a", seed=1, **FAST),
        Request(prompt="a much longer instruction that fills more tokens", images=(picture(),), seed=2, **FAST),
        Request(prompt="two", images=(picture(), picture("blue")), guidance_scale=1.5, seed=3, **FAST),
    ]
    together = engine.run(requests)
    for request, batched in zip(requests, together):
        alone = engine.run([request])[0]
        assert batched.seed == alone.seed == request.seed
        torch.testing.assert_close(batched.latents, alone.latents, atol=2e-5, rtol=2e-5)


def test_batches_are_of_equal_shape_and_results_in_order(engine):
    requests = [Request(prompt=str(i), seed=i, num_inference_steps=1, height=64, width=w) for i, w in
                enumerate((64, 96, 64, 96, 64, 64, 64))]  # fmt: skip
    results = engine.run(requests)
    assert [(r.seed, r.width) for r in results] == [(r.seed, r.width) for r in requests]


def test_submit_and_step(engine):
    first = engine.submit(Request(prompt="a", seed=1, num_inference_steps=1, height=64, width=64))
    second = engine.submit(Request(prompt="b", seed=1, num_inference_steps=1, height=64, width=96))
    assert set(engine.step()) == {first}
    assert set(engine.step()) == {second}
    assert engine.step() == {}


def test_run_keeps_what_it_finishes_of_submitted_requests(engine):
    size = {"num_inference_steps": 1, "height": 64, "width": 64}
    waiting = engine.submit(Request(prompt="a", seed=1, **size))
    (result,) = engine.run([Request(prompt="b", seed=2, **size)])
    assert result.seed == 2
    claimed = engine.step()
    assert set(claimed) == {waiting} and claimed[waiting].seed == 1
    assert engine.step() == {}


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": "x " * 9000}, "^prompt: .* tokens with its images, at most"),
        ({"negative_prompt": "x " * 9000, "true_cfg_scale": 2.0}, "^negative_prompt: .* tokens with its images"),
        ({"latents": torch.zeros(1, 3, 64)}, r"latents: shape \(1, 3, 64\), must be \(1, 24, 64\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_refused_request_leaves_nothing_queued(engine, bad, message):
    """It is refused before any request of the call is computed."""
    steps = []
    good = Request(prompt="a", on_step=steps.append, **FAST)
    with pytest.raises(ValueError, match=message):
        engine.run([good, Request(**{"prompt": "b", **FAST, **bad})])
    assert len(engine.scheduler) == 0 and steps == []


def test_on_step_reports_and_cancels(engine):
    seen = []

    def stop_after_two(info):
        seen.append((info.step, info.sigma))
        return info.step < 2

    result = engine.generate("x", num_inference_steps=5, height=64, width=64, on_step=stop_after_two)
    assert [step for step, _ in seen] == [1, 2]
    assert 1 > seen[0][1] > seen[1][1] > 0
    assert result.cancelled and result.images == []


def test_cancelling_one_of_a_batch_leaves_the_other(engine):
    stopped = Request(prompt="a", seed=1, on_step=lambda info: False, **FAST)
    kept = Request(prompt="b", seed=2, **FAST)
    results = engine.run([stopped, kept])
    assert results[0].cancelled and not results[1].cancelled
    torch.testing.assert_close(results[1].latents, engine.run([kept])[0].latents, atol=2e-5, rtol=2e-5)


def test_a_failing_callback_clears_the_queue(engine):
    def fail(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run([Request(prompt="a", on_step=fail, **FAST), Request(prompt="b", height=64, width=64)])
    assert len(engine.scheduler) == 0


def test_true_cfg_extrapolates_from_the_negative(engine):
    """At scale 1 + tiny the negative hardly matters; at a larger one its prompt changes the picture."""
    plain = engine.generate("a red ball", **FAST, seed=1).latents
    near = engine.generate("a red ball", **FAST, seed=1, true_cfg_scale=1.000001).latents
    torch.testing.assert_close(plain, near, atol=1e-3, rtol=1e-3)
    one = engine.generate("a red ball", **FAST, seed=1, true_cfg_scale=4.0, negative_prompt="blue").latents
    two = engine.generate("a red ball", **FAST, seed=1, true_cfg_scale=4.0, negative_prompt="a cat on a mat").latents
    assert not torch.allclose(one, two, atol=1e-4)


def test_equal_request_reuses_its_conditioning(engine, monkeypatch):
    engine.edit(picture(), "remember this", **FAST, seed=1)
    monkeypatch.setattr(engine.model.vlm, "encode", lambda *a, **k: pytest.fail("the VLM ran again"))
    engine.edit(picture(), "remember this", **FAST, seed=2)


def test_one_vlm_pass_serves_routing_and_drawing(engine, monkeypatch):
    calls = []
    encode = engine.model.vlm.encode
    monkeypatch.setattr(engine.model.vlm, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    monkeypatch.setattr(engine.conditioner, "draw_probability", lambda reading: 0.9)
    reply = engine.chat([{"role": "user", "content": "draw a fresh thing"}], **FAST)
    assert len(calls) == 1 and reply.images and reply.draw_probability == 0.9


def test_task_head_decides_and_mode_overrides(engine):
    messages = [{"role": "user", "content": "what is this?"}]
    auto = engine.chat(messages, **FAST, max_new_tokens=4)
    assert 0 <= auto.draw_probability <= 1
    assert bool(auto.images) == (auto.draw_probability >= 0.5)
    pieces = []
    text = engine.chat(messages, mode="text", max_new_tokens=6, on_text=pieces.append)
    assert text.images == [] and text.text == "".join(pieces) and text.text
    image = engine.chat(messages, mode="image", **FAST)
    assert image.images and image.text == ""
    assert set(image.timings) == {"condition", "denoise", "decode", "total"}
    assert set(text.timings) == {"condition", "answer", "total"}
    assert text.timings["total"] == pytest.approx(text.timings["condition"] + text.timings["answer"])


def test_chat_with_history_and_pictures(engine):
    url = io.BytesIO()
    picture().save(url, "PNG")
    data = "data:image/png;base64," + base64.b64encode(url.getvalue()).decode()
    first = {"role": "user", "content": [{"type": "text", "text": "make it blue"},
                                         {"type": "image_url", "image_url": {"url": data}}]}  # fmt: skip
    drawn = {"role": "assistant", "content": [{"type": "image", "image": picture("blue")}]}
    follow = {"role": "user", "content": "now green"}
    with_history = engine.chat([first, drawn, follow], mode="image", seed=1, **FAST).result.latents
    without = engine.chat([follow], mode="image", seed=1, **FAST).result.latents
    assert not torch.allclose(with_history, without, atol=1e-4)


def test_pictures_stand_behind_the_last_message_where_the_model_wants_them(engine, monkeypatch):
    """Those of the last turn that shows some, and earlier ones where they were; none are moved behind others. What is
    drawn is then drawn of the last message alone, and answers know all that was said."""
    shown, drawn, other = picture(), picture("blue"), picture("green")
    first, answer = Turn("user", "what is this?", (shown,)), Turn("assistant", "a ball", (drawn,))
    told = Turn("assistant", "a ball")
    cases = (
        (Request(prompt="and now?", history=(first, told)), (Turn("user", "what is this?"), told), (shown,)),
        (Request(prompt="and now?", history=(first, answer)), (first, told), (drawn,)),
        (Request(prompt="and now?", history=(first, told), images=(other,)), (first, told), (other,)),
        (Request(prompt="and now?", history=(told,)), (told,), ()),
    )
    for request, history, images in cases:
        moved = with_images_last(request)
        assert (moved.history, moved.images) == (history, images) and moved.prompt == request.prompt
    messages = [
        {"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a ball"},
        {"role": "user", "content": "make it blue"},
    ]
    settings = {"mode": "image", "seed": 1, **FAST}
    monkeypatch.setattr(engine.model, "images_last", False)
    there = engine.chat(messages, **settings).result.latents
    monkeypatch.setattr(engine.model, "images_last", True)
    behind = engine.chat(messages, **settings).result.latents
    history = (Turn("user", "what is this?"), told)
    asked = Request(prompt="make it blue", images=(shown,), history=history, seed=1, **FAST)
    assert torch.equal(behind, engine.run([asked])[0].latents) and not torch.allclose(behind, there, atol=1e-4)
    assert torch.equal(behind, engine.edit(shown, "make it blue", seed=1, **FAST).latents)
    read = []
    monkeypatch.setattr(engine.conditioner, "answer", lambda reading, **_: read.append(reading) or "")
    engine.chat(messages, mode="text")
    alone = engine.conditioner.tokenize(Request(prompt="make it blue", images=(shown,)))
    assert read[0].inputs.input_ids.shape[1] > alone.input_ids.shape[1]


@pytest.mark.parametrize("task", PERCEPTION_PROMPTS)
def test_perceive(engine, task):
    result = engine.perceive(picture(), task, num_inference_steps=1, height=64, width=64)
    assert result.images[0].size == (64, 64)


def test_vae_tiling_draws_nearly_the_same(engine):
    plain = engine.generate("x", seed=1, num_inference_steps=1, height=64, width=64)
    tiled = engine.generate("x", seed=1, num_inference_steps=1, height=64, width=64, vae_tiling=True)
    assert torch.equal(plain.latents, tiled.latents)
    assert tiled.images[0].size == (64, 64)


def test_given_latents_replace_the_seed(engine):
    noise = torch.randn(1, 24, 64)
    a = engine.generate("x", seed=1, latents=noise, **FAST)
    b = engine.generate("x", seed=2, latents=noise, **FAST)
    assert torch.equal(a.latents, b.latents)
    with pytest.raises(ValueError, match=r"latents: shape \(1, 3, 64\)"):
        engine.generate("x", latents=noise[:, :3], **FAST)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: must be from 1"),
        ({"height": 500, "width": 512}, "height=500: must be a multiple of 16"),
        ({"height": 512}, "give both, or neither"),
        ({"height": 8192, "width": 8192}, "height=8192"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale=0.5"),
        ({"negative_prompt": "x"}, "negative_prompt: only has an effect"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: must be a whole number"),
        ({"height": 64.0, "width": 64}, "height=64.0: must be a whole number"),
        ({"images": ["cat.jpg"]}, r"images\[0\]: must be a PIL image, got str"),
        ({"negative_prompt": "<|im_end|>", "true_cfg_scale": 2}, "negative_prompt: must not contain the reserved"),
        ({"images": [Image.new("RGB", (10, 2010))]}, r"images\[0\]: 10x2010 px, sides may differ"),
    ],
)
def test_bad_settings_are_named(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        engine.generate("x", **settings)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        ([{"role": "assistant", "content": "x"}], "last message must have role 'user'"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role='tool'"),
        ([{"role": "user", "content": 3}], "must be text or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\[0\].type='audio'"),
        (["hello"], r"messages\[0\]: must have role and content, got str"),
        ([{"role": "user", "content": ["hello"]}], r"content\[0\].type=None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text=None: must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"image_url.url=None: must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\].image: must be a picture"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}], "data:image"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}}]}],
         "not base64"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "only the first message"),
    ],
)  # fmt: skip
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        parse_messages(messages)


def test_chat_mode_is_checked(engine):
    with pytest.raises(ValueError, match="mode='draw'"):
        engine.chat([{"role": "user", "content": "x"}], mode="draw")


def test_edit_needs_a_picture(engine):
    with pytest.raises(ValueError, match="at least one reference"):
        engine.edit([], "x")


def test_cache_drops_the_least_recently_used():
    def entry(rows: int) -> Conditioning:
        return Conditioning(torch.zeros(1, rows, 4), (rows,), torch.zeros(1, 2))

    size = entry(10).txt.nbytes + entry(10).pooled.nbytes
    cache = ConditioningCache(max_bytes=2 * size)
    cache.put("a", entry(10))
    cache.put("b", entry(10))
    assert cache.get("a") is not None
    cache.put("c", entry(10))
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    assert cache.num_bytes == 2 * size
    cache.put("large", entry(1000))
    assert cache.get("large") is None and len(cache) == 2


def test_scheduler_admits_and_cancels(engine):
    scheduler = Scheduler(max_batch_size=2, max_waiting=2)
    jobs = [engine._job(Request(prompt=str(i), **FAST)) for i in range(3)]
    scheduler.add(jobs[0])
    scheduler.add(jobs[1])
    with pytest.raises(QueueFull):
        scheduler.add(jobs[2])
    assert scheduler.cancel(jobs[0].id) and not scheduler.cancel(jobs[0].id)
    assert scheduler.next_batch() == [jobs[1]]
