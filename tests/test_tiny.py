"""The default model `tiny`: complete, small, the same bits every time, made once however many ask for it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from uniworld.checkpoint import tiny
from uniworld.checkpoint.load import load_uniworld
from uniworld.models import flow
from uniworld.models.prompts import chat_text

TEXTS = ("a photo of a cat's red hat, 3 m wide!", "把这只猫变成狗", "naïve café — ½ 😀\n\ttab", "", "<unk> </s> [x]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIWORLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tiny, "PACKAGED", Path("/nonexistent"))
        return tiny.tiny_dir()


@pytest.fixture(scope="module")
def model(folder):
    return load_uniworld(folder, device="cpu", dtype=torch.float32, progress=False, check_finite=True)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_complete_and_small(folder, model):
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 30_000_000
    assert model.random_weights
    assert model.anchor_px == 256 * 256
    assert model.text_encoders.has_t5
    assert model.task_head is not None
    assert model.vae_projector is not None
    assert model.denoiser.config.guidance_embeds


def test_the_same_bits_every_time(folder, tmp_path):
    tiny.write_random_tiny(tmp_path)
    again = digests(tmp_path)
    assert len(again) > 20
    assert again == digests(folder)


def test_made_once_then_found(folder, monkeypatch):
    monkeypatch.setenv("UNIWORLD_CACHE", str(folder.parent))
    monkeypatch.setattr(tiny, "PACKAGED", Path("/nonexistent"))
    monkeypatch.setattr(tiny, "write_random_tiny", lambda _: pytest.fail("made again"))
    assert tiny.tiny_dir() == folder


def test_weights_in_the_package_come_first(folder, tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "config.json").write_text("{}")
    monkeypatch.setattr(tiny, "PACKAGED", packaged)
    assert tiny.tiny_dir() == packaged


def test_where_the_cache_is(monkeypatch):
    for name in ("UNIWORLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert tiny.cache_root() == Path.home() / ".cache" / "uniworld"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tiny.cache_root() == Path("/x/uniworld")
    monkeypatch.setenv("UNIWORLD_CACHE", "/y")
    assert tiny.cache_root() == Path("/y")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tiny, "PACKAGED", tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be written to") as error:
        tiny.tiny_dir()
    assert "\n" not in str(error.value)


def test_two_processes_at_once(tmp_path):
    code = (
        "from pathlib import Path; from uniworld.checkpoint import tiny; tiny.PACKAGED = Path('/nonexistent')\n"
        "import sys; print('ready', flush=True); sys.stdin.readline(); print(tiny.tiny_dir())"
    )
    environment = {**os.environ, "UNIWORLD_CACHE": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # both start from the same moment
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1]
    assert [str(path) for path in tmp_path.iterdir()] == [answers[0]]  # no temporary folder is left
    assert (Path(answers[0]) / "config.json").is_file()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_encodes(model, text):
    qwen = model.processor.tokenizer
    assert qwen.decode(qwen(text).input_ids) == text
    t5 = model.text_encoders.t5_tokenizer(text).input_ids
    assert t5[-1] == model.text_encoders.t5_tokenizer.eos_token_id
    if "<unk>" not in text:
        assert model.text_encoders.t5_tokenizer.unk_token_id not in t5
    clip = model.text_encoders.clip_tokenizer(text).input_ids
    assert clip[0] == model.text_encoders.clip_tokenizer.bos_token_id
    assert max(clip) < model.text_encoders.clip.config.vocab_size
    assert max(t5) < model.text_encoders.t5.config.vocab_size


def test_roles_and_special_tokens_are_single_tokens(model):
    tokenizer, config = model.processor.tokenizer, model.config
    for role in ("system", "user", "assistant"):
        assert len(tokenizer(role).input_ids) == 1
    for field, token in (
        ("image_token_id", "<|image_pad|>"),
        ("image_begin_token_id", "<|vision_start|>"),
        ("image_end_token_id", "<|vision_end|>"),
        ("eos_token_id", "<|im_end|>"),
    ):
        assert tokenizer(token).input_ids == [config[field]]


def sane(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x).all()) and 0.05 < x.float().std() < 20


def test_activations_stay_sane(model):
    image = Image.effect_noise((256, 256), 60).convert("RGB")
    inputs = model.processor.encode([chat_text("Make it red. 变红", 1)], [[image]])
    states = model.vlm.encode(inputs)
    semantic = model.semantic_encoder(model.semantic_encoder.preprocess([image]))
    assert semantic.shape == (1, 64, 128)
    t5 = model.text_encoders.t5_states(["Make it red."])
    pooled = model.text_encoders.pooled(["Make it red."])
    txt = model.denoise_projector(states.hidden_states[0])
    semantic_txt = model.siglip_projector(semantic[0])
    latents = flow.initial_noise(0, 256, 256)
    with torch.no_grad():
        joint = torch.cat([txt, semantic_txt, t5[0]])[None]
        ids = flow.image_ids(256, 256)
        velocity = model.denoiser(latents, joint, pooled, torch.tensor([0.7]), torch.tensor([3.5]), ids)
        other = model.denoiser(latents, joint.flip(2), pooled, torch.tensor([0.7]), torch.tensor([3.5]), ids)
    for part in (states.hidden_states, semantic, t5, pooled, txt, semantic_txt, velocity):
        assert sane(part)
    assert (velocity - other).std() > 0.01 * velocity.std()  # the text reaches the picture


def test_pictures_are_mid_range_noise(model):
    pixels = model.vae.decode(flow.unpack(flow.initial_noise(0, 256, 256), 256, 256))
    assert pixels.shape == (1, 3, 256, 256)
    assert -0.5 < pixels.mean() < 0.5
    assert 0.02 < pixels.std() < 0.8
    assert (pixels.abs() > 1).float().mean() < 0.2
    assert sane(model.vae.mean_latents(pixels.clamp(-1, 1)))


def test_config_says_what_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["uniworld"] == {"anchor_px": 65536, "random_weights": True}
