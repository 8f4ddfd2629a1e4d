"""`convert`: a starting checkpoint from Qwen2.5-VL and FLUX.1-dev."""

import json
import shutil
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file

from uniworld.checkpoint import convert as convert_module
from uniworld.checkpoint.connector_files import write_connector
from uniworld.checkpoint.convert import convert
from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.save import ShardWriter

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("golden")
    made = {"qwen": golden.qwen_dir(tmp), "flux": golden.flux_dir(tmp), "siglip": golden.siglip_dir(tmp)}
    return {name: Path(folder) for name, folder in made.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in weight_files(folder) for key, value in load_file(file).items()}


def nothing_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_converted_checkpoint_is_the_authors_layout(sources, tmp_path):
    out = convert(**sources, out=tmp_path / "out")
    weights = tensors_of(out)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    expected = golden.checkpoint_keys()
    assert shapes.keys() == expected.keys()
    # The VAE connector of the golden data is 3072 wide inside whatever the DiT's width; ours is as wide as the DiT.
    assert {k: s for k, s in shapes.items() if "vae_projector" not in k} == {
        k: s for k, s in expected.items() if "vae_projector" not in k
    }
    for key, value in load_file(sources["qwen"] / "model.safetensors").items():
        assert torch.equal(weights[key], value), key
    for key, value in load_file(sources["flux"] / TRANSFORMER).items():
        assert torch.equal(weights[f"denoise_tower.denoiser.{key}"], value), key


def test_config_equals_the_authors(sources, tmp_path):
    out = convert(**sources, out=tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    authors = json.loads((golden.univa_dir(tmp_path) / "config.json").read_text())
    assert config == authors
    assert config["image_end_token_id"] == golden.special_token_ids()["<|vision_end|>"]


def test_convert_then_load(sources, tmp_path):
    out = convert(**sources, out=tmp_path / "out", max_shard_bytes=500_000)
    assert len(weight_files(out)) > 5
    settings = {"device": "cpu", "dtype": torch.float32, "progress": False, "check_finite": True}
    model = load_uniworld(out, sources["flux"], sources["siglip"], **settings)
    assert model.processor.tokenizer("<|vision_end|>").input_ids == [model.config["image_end_token_id"]]
    weight = model.siglip_projector[0].weight
    assert weight.shape == (192, 1152)
    bound = 1152**-0.5
    assert weight.abs().max() <= bound
    assert abs(float(weight.std()) - bound / 3**0.5) < 0.02 * bound  # uniform


def test_the_seed_decides_the_connectors(sources, tmp_path):
    same = [tensors_of(convert(**sources, out=tmp_path / f"a{i}", seed=7)) for i in range(2)]
    other = tensors_of(convert(**sources, out=tmp_path / "b", seed=8))
    key = "denoise_tower.denoise_projector.0.weight"
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert not torch.equal(same[0][key], other[key])
    assert torch.equal(same[0]["lm_head.weight"], other["lm_head.weight"])


def test_given_connectors_are_taken_and_the_others_fresh(sources, tmp_path):
    fresh = tensors_of(convert(**sources, out=tmp_path / "fresh"))
    prefix = "denoise_tower.siglip_projector."
    given = {key.removeprefix(prefix): tensor.float() + 1 for key, tensor in fresh.items() if key.startswith(prefix)}
    (tmp_path / "given").mkdir()
    write_connector(tmp_path / "given", "siglip_projector", given)
    taken = tensors_of(convert(**sources, out=tmp_path / "out", connectors=tmp_path / "given"))
    for key, tensor in taken.items():
        expected = given[key.removeprefix(prefix)].to(tensor.dtype) if key.startswith(prefix) else fresh[key]
        assert torch.equal(tensor, expected), key
    write_connector(tmp_path / "given", "siglip_projector", given | {"2.bias": torch.zeros(3)})
    with pytest.raises(
        ValueError, match=r"connectors=.*given: denoise_tower.siglip_projector.2.bias is \[3\], must be"
    ):
        convert(**sources, out=tmp_path / "wrong", connectors=tmp_path / "given")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(FileNotFoundError, match="holds neither denoise_projector.bin nor siglip_projector.bin"):
        convert(**sources, out=tmp_path / "wrong", connectors=tmp_path)


def test_connector_widths(sources, tmp_path):
    without_siglip = {k: v for k, v in sources.items() if k != "siglip"}
    weights = tensors_of(convert(**without_siglip, out=tmp_path / "out", connector_hidden=40))
    assert weights["denoise_tower.siglip_projector.0.weight"].shape == (40, 1152)
    assert weights["denoise_tower.denoise_projector.2.weight"].shape == (64, 40)


def test_full_scale_widths():
    denoiser = {"joint_attention_dim": 4096, "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64}
    config = {"hidden_size": 3584, "denoise_tower": {"denoiser_config": denoiser}}
    assert convert_module.fresh_connector_shapes(config, 1152) == {
        "denoise_projector": (3584, 12288, 4096),
        "siglip_projector": (1152, 12288, 4096),
        "vae_projector": (64, 3072, 4096),
    }


def test_newer_qwen_folders(sources, tmp_path):
    """Folders saved by transformers 5: other key names, and the text model's sizes in a section of their own."""
    qwen = tmp_path / "qwen"
    shutil.copytree(sources["qwen"], qwen)
    rename = (("visual.", "model.visual."), ("model.", "model.language_model."))
    weights = {}
    for key, value in load_file(qwen / "model.safetensors").items():
        old, new = next(((old, new) for old, new in rename if key.startswith(old)), ("", ""))
        weights[new + key.removeprefix(old)] = value
    save_file(weights, qwen / "model.safetensors")
    flat = json.loads((qwen / "config.json").read_text())
    top = {k: flat.pop(k) for k in ("architectures", "image_token_id", "video_token_id", "vision_config")}
    rope = flat.pop("rope_scaling")
    flat["rope_parameters"] = {**rope, "rope_theta": flat.pop("rope_theta")}
    (qwen / "config.json").write_text(json.dumps({**top, "model_type": "qwen2_5_vl", "text_config": flat}))

    out = convert(qwen, sources["flux"], tmp_path / "out", siglip=sources["siglip"])
    expected = convert(**sources, out=tmp_path / "expected")
    assert json.loads((out / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    mine, reference = tensors_of(out), tensors_of(expected)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[key], reference[key]) for key in mine)


def test_no_more_than_a_shard_is_held(sources, tmp_path, monkeypatch):
    held = []
    flush = ShardWriter._flush
    monkeypatch.setattr(ShardWriter, "_flush", lambda self: (held.append(self.pending_bytes), flush(self))[1])
    convert(**sources, out=tmp_path / "out", max_shard_bytes=900_000)
    assert len(held) > 3
    assert max(held) <= 900_000


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("qwen", Path("model.safetensors"), "model.norm.weight"),
        ("flux", TRANSFORMER, "single_transformer_blocks.0.attn.to_v.bias"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing(sources, tmp_path, name, file, key):
    broken = tmp_path / name
    shutil.copytree(sources[name], broken)
    weights = load_file(broken / file)
    del weights[key]
    save_file(weights, broken / file)
    with pytest.raises(ValueError, match=f"missing .*{key}") as error:
        convert(**{**sources, name: broken}, out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert nothing_left(tmp_path)


def test_a_failure_half_way_leaves_nothing(sources, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert_module, "fresh_connectors", fail)
    with pytest.raises(OSError):
        convert(**sources, out=tmp_path / "out", max_shard_bytes=400_000)
    assert nothing_left(tmp_path)


def test_missing_folders_are_named(sources, tmp_path):
    for field in ("qwen", "flux", "siglip"):
        with pytest.raises(FileNotFoundError, match=f"{field}=.*none: no such folder"):
            convert(**{**sources, field: tmp_path / "none"}, out=tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_existing_folder_is_kept(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ValueError, match="exists already"):
        convert(**sources, out=out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert (convert(**sources, out=out, overwrite=True) / "config.json").is_file()
    assert not (out / "precious").exists()


def test_a_tokenizer_without_vision_tokens_is_refused(sources, tmp_path):
    qwen = tmp_path / "qwen"
    shutil.copytree(sources["qwen"], qwen)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        text = (qwen / name).read_text().replace("<|vision_end|>", "<|something_else|>")
        (qwen / name).write_text(text)
    (qwen / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|vision_end\|>"):
        convert(qwen, sources["flux"], tmp_path / "out")
    assert nothing_left(tmp_path)
