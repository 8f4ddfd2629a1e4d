"""bench/generate.py in its dry run: both sides draw the same picture, and rows are refused where they do not."""

from pathlib import Path

import pytest

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
SIZE_PX = 128


@pytest.fixture
def generate(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("UNIWORLD_BENCH_SIZE", "tiny")
    import generate

    interleave = generate.interleave
    once = {"rounds": 1, "warmup": 0}
    monkeypatch.setattr(generate, "interleave", lambda sides, **settings: interleave(sides, **settings | once))
    return generate


def test_both_sides_draw_the_same(generate):
    samples, rooms, error = generate.measure.__wrapped__(SIZE_PX)
    assert set(samples) == set(generate.SIDES) and error < 1e-5
    assert rooms.keys() >= {"condition", "denoise", "decode"}


def test_other_pictures_are_no_measurement(generate, monkeypatch):
    draw = generate.OriginalPipeline.draw

    def with_more_guidance(self, *given, guidance_scale, **settings):
        return draw(self, *given, guidance_scale=guidance_scale + 5, **settings)

    monkeypatch.setattr(generate.OriginalPipeline, "draw", with_more_guidance)
    with pytest.raises(ValueError, match="drew different pictures"):
        generate.measure.__wrapped__(SIZE_PX)
