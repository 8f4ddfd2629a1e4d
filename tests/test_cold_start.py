"""bench/cold_start.py at toy size: the checkpoint that it writes is the model, and a new process draws with it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
SIZE = {"denoiser": {"num_layers": 1, "num_single_layers": 1}}


@pytest.fixture(scope="module")
def cold_start():
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        patch.setenv("UNIWORLD_BENCH_SIZE", "tiny")
        import cold_start

        yield cold_start


def test_a_new_process_draws_what_the_model_draws(cold_start, tmp_path, monkeypatch):
    from uniworld.engine import Engine

    model = cold_start.random_uniworld(SIZE, "cpu", torch.float32)
    cold_start.write_checkpoint(model, tmp_path / "model")
    monkeypatch.setenv("UNIWORLD_BENCH_UNTIL", "0")  # there is no time for a second of each
    monkeypatch.setattr(cold_start, "DEVICE", "cpu")
    monkeypatch.setattr(cold_start, "DTYPE", torch.float32)
    case = cold_start.Case(1, 64)
    drawn = cold_start.first_pictures(tmp_path, case)
    assert drawn.keys() == set(cold_start.SIDES)
    for draws in drawn.values():
        (seconds,), parts_s = draws.whole.seconds, draws.parts_s
        assert seconds > sum(parts_s.values()) > 0 and parts_s.keys() == {"import", "load", "draw"}
    settings = {"height": 64, "width": 64, "num_inference_steps": cold_start.SCALE.num_steps, "seed": 7}
    expected = Engine(model).edit(cold_start.noise_pictures(1), cold_start.PROMPT, **settings).images[0]
    with Image.open(tmp_path / "picture.png") as found:
        assert found.size == (64, 64) and found.tobytes() == expected.tobytes()
        assert len(set(found.getdata())) > 100
