"""SigLIP, T5, CLIP, VAE and the task head against the authors' code, and SigLIP also against plain fp64 arithmetic."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import COMPLETE, ROOT, case, close, flux_dir, images, resolve, siglip_dir, siglip_weights, univa_dir
from PIL import Image
from safetensors.torch import load_file

from uniworld.models.siglip import SemanticEncoder
from uniworld.models.task_head import TaskHead
from uniworld.models.text_encoders import TextEncoders, token_ids
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vae import ImageAutoencoder, to_pil, to_pixels

PROMPT_CASES = ["encode_prompt_0_tiny_univa_small", "encode_prompt_1_tiny_univa_small"]


def read_json(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("checkpoints")
    return {"flux": flux_dir(tmp), "siglip": siglip_dir(tmp), "univa": univa_dir(tmp)}


@pytest.fixture(scope="module")
def encoder(folders):
    """Built on meta, so that buffers must be restored as checkpoint loading does."""
    folder = folders["siglip"]
    with torch.device("meta"):
        encoder = SemanticEncoder.from_config(
            read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
        )
    weights = load_file(folder / "model.safetensors")
    encoder.model.load_state_dict({k.removeprefix("vision_model."): v for k, v in weights.items()}, assign=True)
    encoder.restore_buffers("cpu")
    return encoder


@pytest.fixture(scope="module")
def text_encoders(folders):
    folder = folders["flux"]
    with torch.device("meta"):
        encoders = TextEncoders.from_config(
            read_json(folder / "text_encoder" / "config.json"),
            load_tokenizer(folder / "tokenizer", "CLIPTokenizer"),
            read_json(folder / "text_encoder_2" / "config.json"),
            load_tokenizer(folder / "tokenizer_2", "T5Tokenizer"),
        )
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    clip = {k: v for k, v in clip.items() if k in encoders.clip.state_dict()} or {
        k.removeprefix("text_model."): v for k, v in clip.items()
    }
    encoders.clip.load_state_dict(clip, assign=True)
    t5 = load_file(folder / "text_encoder_2" / "model.safetensors")
    t5.setdefault("encoder.embed_tokens.weight", t5["shared.weight"])
    encoders.t5.load_state_dict(t5, assign=True)
    encoders.restore_buffers("cpu")
    return encoders


@pytest.fixture(scope="module")
def autoencoder(folders):
    folder = folders["flux"] / "vae"
    with torch.device("meta"):
        autoencoder = ImageAutoencoder.from_config(read_json(folder / "config.json"))
    autoencoder.model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), assign=True)
    return autoencoder


def test_siglip(encoder):
    inputs, outputs = resolve(case("s_encoders", "siglip"))
    ok, worst = close(encoder(inputs["pixel_values"]), outputs["last_hidden_state"])
    assert ok, worst
    assert encoder.num_tokens == outputs["last_hidden_state"].shape[1]
    assert encoder.hidden_size == outputs["last_hidden_state"].shape[2]


def test_siglip_against_plain_fp64(encoder):
    """An implementation of its own, so that the redrawn weights and transformers are not both taken on trust."""
    inputs, outputs = resolve(case("s_encoders", "siglip"))
    w = {k.removeprefix("vision_model."): v.double() for k, v in siglip_weights().items()}
    config = read_json(ROOT / "siglip" / "config.json")
    H, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    pixels = inputs["pixel_values"].double()
    patches = F.unfold(pixels, config["patch_size"], stride=config["patch_size"]).transpose(1, 2)
    kernel = w["embeddings.patch_embedding.weight"].flatten(1)
    x = patches @ kernel.T + w["embeddings.patch_embedding.bias"] + w["embeddings.position_embedding.weight"]
    layer = "encoder.layers.0"
    y = norm(x, f"{layer}.layer_norm1")
    q, k, v = (linear(y, f"{layer}.self_attn.{n}_proj").unflatten(-1, (H, -1)).transpose(1, 2) for n in "qkv")
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
    y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
    y = y * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    x = norm(x + linear(y, f"{layer}.mlp.fc2"), "post_layernorm")

    ok, worst = close(encoder(inputs["pixel_values"]), x)
    assert ok, worst
    ok, worst = close(outputs["last_hidden_state"], x)
    assert ok, worst


def test_siglip_leaves_out_the_head_of_a_whole_siglip_config():
    vision = read_json(ROOT / "siglip" / "config.json") | {"vision_use_head": True}
    encoder = SemanticEncoder.from_config({"model_type": "siglip", "vision_config": vision}, {})
    assert {f"vision_model.{name}" for name in encoder.model.state_dict()} == set(siglip_weights())


def test_siglip_preprocess(encoder):
    inputs, _ = resolve(case("s_encoders", "siglip"))
    ok, worst = close(encoder.preprocess(images()[:2]), inputs["pixel_values"], atol=1e-6)
    assert ok, worst


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_siglip_preprocess_takes_every_mode(encoder, mode):
    image = images()[0].convert(mode)
    ok, worst = close(encoder.preprocess([image]), encoder.preprocess([image.convert("RGB")]))
    assert ok, worst


@pytest.mark.parametrize("name", PROMPT_CASES + ["encode_prompt_2_tiny_univa_small"])
def test_text_encoders(text_encoders, name):
    inputs, outputs = resolve(case("s_encoders", name))
    prompts = [inputs["prompt"]] if isinstance(inputs["prompt"], str) else inputs["prompt"]
    length = inputs["max_sequence_length"]
    assert torch.equal(token_ids(text_encoders.t5_tokenizer, prompts, length), inputs["t5_input_ids"])
    assert torch.equal(token_ids(text_encoders.clip_tokenizer, prompts, 77), inputs["clip_input_ids"])
    ok, worst = close(text_encoders.t5_states(prompts, length), outputs["t5_prompt_embeds"])
    assert ok, worst
    ok, worst = close(text_encoders.pooled(prompts), outputs["pooled_prompt_embeds"])
    assert ok, worst


def test_text_encoders_without_t5(text_encoders):
    alone = TextEncoders(text_encoders.clip, text_encoders.clip_tokenizer)
    assert not alone.has_t5
    torch.testing.assert_close(alone.pooled(["a cat"]), text_encoders.pooled(["a cat"]))
    with pytest.raises(ValueError, match="no T5 is loaded"):
        alone.t5_states(["a cat"])
    with pytest.raises(ValueError, match="give both, or neither"):
        TextEncoders(text_encoders.clip, text_encoders.clip_tokenizer, text_encoders.t5)


def test_text_encoders_cut_long_prompts(text_encoders):
    words = "cat " * 2000
    assert text_encoders.t5_states([words]).shape[1] == 256
    longest = text_encoders.clip.config.max_position_embeddings
    ids = text_encoders.clip_tokenizer(words, truncation=True, max_length=longest).input_ids
    assert len(ids) == longest and ids[-1] == text_encoders.clip_tokenizer.eos_token_id
    assert text_encoders.pooled([words]).isfinite().all()


def test_vae(autoencoder):
    inputs, outputs = resolve(case("s_encoders", "vae"))
    mean, std = autoencoder.encode_moments(inputs["image"])
    latents = autoencoder.mean_latents(inputs["image"])
    decoded = autoencoder.decode(outputs["scaled_latents_of_mean"])
    for mine, name in [(mean, "mean"), (std, "std"), (latents, "scaled_latents_of_mean"), (decoded, "decoded")]:
        ok, worst = close(mine, outputs[name])
        assert ok, (name, worst)


def test_vae_samples_from_the_posterior(autoencoder):
    inputs, outputs = resolve(case("s_encoders", "vae"))
    generator = torch.Generator().manual_seed(0)
    samples = autoencoder.sample_latents(inputs["image"].expand(512, -1, -1, -1)[:, :, :32, :32], generator)
    mean, std = autoencoder.encode_moments(inputs["image"][:, :, :32, :32])
    z = (samples / autoencoder.scale + autoencoder.shift - mean) / std
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01
    again = autoencoder.sample_latents(inputs["image"][:, :, :32, :32], torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        again, autoencoder.sample_latents(inputs["image"][:, :, :32, :32], torch.Generator().manual_seed(1))
    )


def test_vae_decodes_the_golden_sampling_runs(autoencoder):
    for name in ("t2i_64x64_4step", "edit1_64x96_4step"):
        inputs, outputs = resolve(case("d_sampling", name))
        h, w = inputs["height"] // 8, inputs["width"] // 8
        packed = outputs["final_latents_packed"].view(1, h // 2, w // 2, 16, 2, 2)
        pixels = autoencoder.decode(packed.permute(0, 3, 1, 4, 2, 5).reshape(1, 16, h, w))
        ok, worst = close((pixels / 2 + 0.5).clamp(0, 1), outputs["image_0_1"])
        assert ok, worst
        levels = np.asarray(to_pil(pixels)[0]).astype(int)
        assert np.abs(levels - outputs["image_uint8"].numpy().astype(int)).max() <= 1


def test_vae_tiling(autoencoder):
    latents = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.decode(latents)
    tile, sample = autoencoder.model.tile_latent_min_size, autoencoder.model.tile_sample_min_size
    autoencoder.model.tile_latent_min_size, autoencoder.model.tile_sample_min_size = 16, 128
    try:
        autoencoder.set_tiling(True)
        tiled = autoencoder.decode(latents)
        autoencoder.set_tiling(False)
        torch.testing.assert_close(autoencoder.decode(latents), whole)
    finally:
        autoencoder.set_tiling(False)
        autoencoder.model.tile_latent_min_size, autoencoder.model.tile_sample_min_size = tile, sample
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_pictures_and_pixels_are_inverse():
    image = images()[0]
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, image.height, image.width) and pixels.min() >= -1 and pixels.max() <= 1
    np.testing.assert_array_equal(np.asarray(to_pil(pixels)[0]), np.asarray(image))


def test_task_head(folders):
    path = folders["univa"] / "task_head_final.pt"
    head, w = TaskHead.from_file(path), {k: v.double() for k, v in torch.load(path, weights_only=True).items()}
    states = torch.randn(5, w["0.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    inner = states.double() @ w["0.weight"].T + w["0.bias"]
    logits = (inner * torch.sigmoid(inner)) @ w["3.weight"].T + w["3.bias"]
    ok, worst = close(head.draw_probability(states), torch.sigmoid(logits[:, 1] - logits[:, 0]), atol=1e-5)
    assert ok, worst
    assert not any(p.requires_grad for p in head.parameters())


def test_task_head_refuses_other_files(folders, tmp_path):
    weights = torch.load(folders["univa"] / "task_head_final.pt", weights_only=True)
    torch.save(weights | {"5.weight": torch.zeros(1)}, tmp_path / "keys.pt")
    with pytest.raises(ValueError, match=r"keys\.pt: holds .*5\.weight"):
        TaskHead.from_file(tmp_path / "keys.pt")
    torch.save(weights | {"3.bias": torch.zeros(3)}, tmp_path / "shapes.pt")
    with pytest.raises(ValueError, match=r"3\.bias is \[3\], must be \[2\]"):
        TaskHead.from_file(tmp_path / "shapes.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    with pytest.raises(ValueError, match=r"text\.pt: no torch file of plain tensors"):
        TaskHead.from_file(tmp_path / "text.pt")
    torch.save({"head": os.system}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt: no torch file of plain tensors"):
        TaskHead.from_file(tmp_path / "code.pt")


@pytest.mark.skipif(COMPLETE is None, reason="UNIWORLD_GOLDEN does not name the complete golden data")
def test_complete_golden_data_agrees(encoder):
    """The redrawn SigLIP weights and the pictures read back from patches are those of the complete data."""
    stored = load_file(Path(COMPLETE) / "tiny_siglip" / "model.safetensors")
    drawn = siglip_weights()
    assert stored.keys() == drawn.keys()
    for name, value in stored.items():
        torch.testing.assert_close(drawn[name], value, rtol=0, atol=1e-6)
    inputs, _ = resolve(case("s_encoders", "siglip"))
    for file, image in zip(inputs["image_files"], images()[:2], strict=True):
        assert re.fullmatch(r"images/[AB]\.png", file)
        np.testing.assert_array_equal(np.asarray(Image.open(Path(COMPLETE) / file)), np.asarray(image))
