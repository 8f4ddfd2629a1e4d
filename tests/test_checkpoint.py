"""Loading and saving: key tables, what bad checkpoints get, round trips, peak memory."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from uniworld.checkpoint import locate, names
from uniworld.checkpoint.load import drawing_defaults, images_last, load_uniworld
from uniworld.checkpoint.precision import default_dtype
from uniworld.checkpoint.save import ShardWriter, atomic_folder, save_uniworld
from uniworld.checkpoint.weights import Plan, fill, module_targets, parameters_on_meta, read_headers
from uniworld.checkpoint.widths import check_widths
from uniworld.models.connectors import Connector
from uniworld.models.task_head import TaskHead

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("golden")
    made = {"model": golden.univa_dir(tmp), "flux": golden.flux_dir(tmp), "siglip": golden.siglip_dir(tmp)}
    return {name: Path(folder) for name, folder in made.items()}


def load_golden(folders: dict[str, Path], **changes):
    return load_uniworld(**{**folders, "device": "cpu", "dtype": torch.float32, "progress": False, **changes})


@pytest.fixture(scope="module")
def loaded(folders):
    return load_golden(folders, check_finite=True)


@pytest.fixture
def broken(folders, tmp_path):
    """A private copy of one golden folder, and a way to rewrite its weights."""

    def copy(name: str, edit=lambda weights: None, file: str = WEIGHTS) -> dict[str, Path]:
        target = tmp_path / name
        shutil.copytree(folders[name], target)
        weights = load_file(target / file)
        edit(weights)
        save_file(weights, target / file)
        return {**folders, name: target}

    return copy


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Key tables


def test_every_key_has_one_place_and_comes_back():
    keys = golden.checkpoint_keys()
    places = {key: names.place(key) for key in keys}
    assert None not in places.values()
    assert len(set(places.values())) == len(keys) == 207
    for key, place in places.items():
        back = names.authors_names(place.part, place.name)
        assert len(back) == place.rows
        assert back[place.row] == key


def test_fused_rows_are_q_k_v():
    prefix = "transformer_blocks.0.attn."
    assert names.diffusers_names(f"{prefix}to_qkv.weight") == tuple(f"{prefix}to_{x}.weight" for x in "qkv")
    assert names.diffusers_names(f"{prefix}add_qkv_proj.bias") == tuple(f"{prefix}add_{x}_proj.bias" for x in "qkv")
    place = names.Place("denoiser", f"{prefix}add_qkv_proj.bias", row=1, rows=3)
    assert names.split_diffusers(f"{prefix}add_k_proj.bias") == place
    assert names.diffusers_names(f"{prefix}to_out.0.weight") == (f"{prefix}to_out.0.weight",)


def test_full_scale_denoiser_has_the_keys_and_shapes_of_diffusers():
    from diffusers import FluxTransformer2DModel

    from uniworld.models.flux import FluxConfig, FluxTransformer

    with torch.device("meta"):
        reference = FluxTransformer2DModel(guidance_embeds=True)  # diffusers' defaults are FLUX.1's sizes
    with parameters_on_meta():
        mine = FluxTransformer(FluxConfig.from_dict(dict(reference.config)))
    targets = module_targets(mine, names.diffusers_names)
    expected = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    assert {key: target.shape for key, target in targets.items()} == expected
    assert sum(p.numel() for p in mine.parameters()) > 11e9


def test_foreign_keys_have_no_place():
    assert names.place("denoise_tower.other.weight") is None
    assert names.place("encoder.weight") is None
    with pytest.raises(KeyError):
        names.authors_names("vae", "x")


def test_both_generations_of_qwen_names_mean_the_same():
    for old, new in (
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert names.qwen_to_authors(old) == names.qwen_to_authors(new) == old


# Loading what is right


def test_golden_weights_load_strictly(loaded):
    source = load_file(loaded.folder / WEIGHTS)
    vlm = loaded.vlm.model.state_dict()
    assert torch.equal(vlm["model.visual.merger.mlp.0.weight"], source["visual.merger.mlp.0.weight"])
    assert torch.equal(vlm["model.language_model.norm.weight"], source["model.norm.weight"])
    prefix = "denoise_tower.denoiser.transformer_blocks.1.attn."
    qkv = torch.cat([source[f"{prefix}to_{x}.weight"] for x in "qkv"])
    assert torch.equal(loaded.denoiser.transformer_blocks[1].attn.to_qkv.weight, qkv)
    added = torch.cat([source[f"{prefix}add_{x}_proj.bias"] for x in "qkv"])
    assert torch.equal(loaded.denoiser.transformer_blocks[1].attn.add_qkv_proj.bias, added)
    assert torch.equal(loaded.siglip_projector[2].weight, source["denoise_tower.siglip_projector.2.weight"])
    assert loaded.vae_projector is not None
    assert loaded.task_head is not None


def test_everything_is_real_frozen_and_where_asked(loaded):
    modules = (loaded.vlm, loaded.denoiser, loaded.denoise_projector, loaded.siglip_projector, loaded.task_head)
    for module in (*modules, loaded.semantic_encoder, loaded.text_encoders, loaded.vae):
        assert not module.training
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            assert tensor.device.type == "cpu", name
            assert not tensor.requires_grad, name
            assert tensor.dtype == torch.float32 or not tensor.is_floating_point(), name


def test_encoders_are_those_of_transformers(loaded, folders):
    """The encoders agree with what transformers itself loads from the same folders."""
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel

    pairs = (
        (loaded.text_encoders.clip, CLIPTextModel.from_pretrained(folders["flux"] / "text_encoder")),
        (loaded.text_encoders.t5, T5EncoderModel.from_pretrained(folders["flux"] / "text_encoder_2")),
        (loaded.semantic_encoder.model, SiglipVisionModel.from_pretrained(folders["siglip"])),
    )
    for mine, reference in pairs:
        expected = reference.state_dict()
        assert mine.state_dict().keys() == expected.keys()
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_settings_come_from_the_configs(loaded):
    shift = loaded.time_shift
    assert (shift.base_shift, shift.max_shift) == (0.5, 1.15)
    assert (shift.base_image_seq_len, shift.max_image_seq_len) == (256, 4096)
    assert loaded.anchor_px == 1024 * 1024
    assert loaded.random_weights is False
    assert (loaded.num_inference_steps, loaded.guidance_scale) == (28, 3.5)
    assert loaded.text_encoders.has_t5


def test_a_checkpoint_names_its_own_steps_and_guidance(tmp_path):
    own = {"num_inference_steps": 4, "edit_inference_steps": 2, "guidance_scale": 1}
    assert drawing_defaults({"uniworld": own}, tmp_path) == own
    alike = {"num_inference_steps": 6, "edit_inference_steps": 6, "guidance_scale": 3.5}
    assert drawing_defaults({"uniworld": {"num_inference_steps": 6}}, tmp_path) == alike
    assert set(drawing_defaults({}, tmp_path).values()) == {28, 3.5}
    for name, values, allowed in (
        ("edit_inference_steps", (0, 1001, "4"), "from 1 to 1000"),
        ("num_inference_steps", (0, 1001, 2.5, "4", True), "from 1 to 1000"),
        ("guidance_scale", (-1, 101, "1", None), "from 0 to 100"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"{tmp_path}: uniworld.{name}={value!r}: must be {allowed}"):
                drawing_defaults({"uniworld": own | {name: value}}, tmp_path)


def test_a_checkpoint_says_where_the_pictures_of_a_conversation_stand(tmp_path):
    assert images_last({}, tmp_path) is False and images_last({"uniworld": {"images_last": True}}, tmp_path) is True
    with pytest.raises(ValueError, match=f"{tmp_path}: uniworld.images_last=1: must be true or false"):
        images_last({"uniworld": {"images_last": 1}}, tmp_path)


def test_scheduler_settings_are_read(folders, tmp_path):
    flux = tmp_path / "flux"
    shutil.copytree(folders["flux"], flux)
    path = flux / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_shift": 0.25, "max_image_seq_len": 1024}))
    shift = load_golden({**folders, "flux": flux}).time_shift
    assert (shift.base_shift, shift.max_shift, shift.max_image_seq_len) == (0.25, 1.15, 1024)


def test_missing_image_end_token_id_comes_from_the_tokenizer(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    config = json.loads((model / "config.json").read_text())
    del config["image_end_token_id"], config["image_begin_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    completed = load_golden({**folders, "model": model}).config
    ids = golden.special_token_ids()
    assert completed["image_end_token_id"] == ids["<|vision_end|>"]
    assert completed["image_begin_token_id"] == ids["<|vision_start|>"]


def test_t5_can_be_left_out_or_required(folders, tmp_path):
    assert not load_golden(folders, use_t5=False).text_encoders.has_t5
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    config = json.loads((model / "config.json").read_text()) | {"uniworld": {"use_t5": False}}
    (model / "config.json").write_text(json.dumps(config))
    assert not load_golden({**folders, "model": model}).text_encoders.has_t5
    assert load_golden({**folders, "model": model}, use_t5=True).text_encoders.has_t5
    flux = tmp_path / "flux"
    shutil.copytree(folders["flux"], flux, ignore=shutil.ignore_patterns("text_encoder_2", "tokenizer_2"))
    assert not load_golden({**folders, "flux": flux}).text_encoders.has_t5
    with pytest.raises(FileNotFoundError, match="use_t5=True: .*no text_encoder_2") as error:
        load_golden({**folders, "flux": flux}, use_t5=True)
    one_line(error)


def test_vae_connector_and_task_head_are_optional(broken):
    def drop(weights):
        for key in [k for k in weights if "vae_projector" in k]:
            del weights[key]

    changed = broken("model", drop)
    (changed["model"] / "task_head_final.pt").unlink()
    model = load_golden(changed)
    assert model.vae_projector is None
    assert model.task_head is None


def test_siglip_with_its_text_tower(broken):
    """SigLIP2 folders hold both towers, and config.json nests the vision tower's sizes."""

    def add_text_tower(weights):
        weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(4, 4)
        weights["vision_model.head.probe"] = torch.zeros(1, 1, 4)
        weights["logit_scale"] = torch.zeros(1)

    changed = broken("siglip", add_text_tower)
    path = changed["siglip"] / "config.json"
    path.write_text(json.dumps({"model_type": "siglip", "vision_config": json.loads(path.read_text())}))
    assert load_golden(changed).semantic_encoder.hidden_size == 1152


def test_bf16_loading_rounds_once(folders, loaded):
    model = load_golden(folders, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for mine, reference in zip(model.denoiser.parameters(), loaded.denoiser.parameters()):
        assert torch.equal(mine, reference.bfloat16())
    assert next(model.vae.parameters()).dtype == torch.float32  # on a CPU
    buffers = dict(model.vlm.named_buffers())
    assert {b.dtype for name, b in buffers.items() if "inv_freq" in name} == {torch.float32}


def test_default_dtypes(monkeypatch):
    monkeypatch.setattr("uniworld.checkpoint.precision.cpu_has_fast_bf16", lambda: True)
    assert default_dtype(torch.device("cpu")) == torch.bfloat16
    assert default_dtype(torch.device("cpu"), tiny=True) == torch.float32
    assert default_dtype(torch.device("cuda"), tiny=True) == torch.bfloat16
    monkeypatch.setattr("uniworld.checkpoint.precision.cpu_has_fast_bf16", lambda: False)
    assert default_dtype(torch.device("cpu")) == torch.float32


def test_tied_parameters_are_filled_by_any_of_their_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.head.weight = self.table.weight

    value, other = torch.randn(2, 4, 3)
    for keys in ("table.weight",), ("head.weight",), ("head.weight", "table.weight"):  # the last in the file counts
        save_file({key: value if key == keys[-1] else other for key in keys}, tmp_path / WEIGHTS)
        with parameters_on_meta():
            module = Tied()
        targets = module_targets(module, lambda name: (name,))
        plan = Plan("x", read_headers([tmp_path / WEIGHTS]), targets, torch.device("cpu"), torch.float32)
        plan.check()
        told = []
        fill([plan], advance=lambda num_bytes, told=told: told.append((num_bytes, threading.get_ident())))
        assert module.head.weight is module.table.weight
        assert torch.equal(module.head.weight, value)
        assert sum(num_bytes for num_bytes, _ in told) == plan.num_bytes == len(keys) * value.nbytes
        assert {thread for _, thread in told} == {threading.get_ident()}


def test_loading_inside_inference_mode():
    with torch.inference_mode():
        model = load_uniworld("tiny", progress=False)
    assert not any(parameter.is_inference() for parameter in model.denoiser.parameters())


def test_of_many_tensors_one_that_is_broken_ends_the_reading(tmp_path):
    """Before the file is closed, and with the reason of the first that failed."""
    with parameters_on_meta():
        module = nn.ModuleList(nn.Linear(8, 8) for _ in range(100))
    weights = {name: torch.randn(parameter.shape) for name, parameter in module.named_parameters()}
    weights["7.weight"][3, 3] = torch.nan
    save_file(weights, tmp_path / WEIGHTS)
    targets = module_targets(module, lambda name: (name,))
    plan = Plan("x", read_headers([tmp_path / WEIGHTS]), targets, torch.device("cpu"), torch.float32)
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"7\.weight holds NaN"):
        fill([plan], check_finite=True)
    assert threading.active_count() == before
    fill([plan])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights[name]) or name == "7.weight"


# Loading what is wrong


def test_missing_unexpected_and_misshapen_keys_come_in_one_error(broken):
    def edit(weights):
        weights.pop("model.norm.weight")
        weights["model.extra.weight"] = torch.zeros(2)
        weights["denoise_tower.denoiser.x_embedder.bias"] = torch.zeros(3)
        weights["visual.patch_embed.bias"] = torch.zeros(3)

    with pytest.raises(ValueError) as error:
        load_golden(broken("model", edit))
    text = one_line(error)
    assert "missing model.norm.weight" in text
    assert "unexpected model.extra.weight" in text
    assert "unexpected visual.patch_embed.bias" in text
    assert "shape [3] of denoise_tower.denoiser.x_embedder.bias (must be [64])" in text


def test_one_missing_row_block_of_a_fused_parameter_is_noticed(broken):
    key = "denoise_tower.denoiser.single_transformer_blocks.2.attn.to_k.weight"
    with pytest.raises(ValueError, match=re.escape(f"missing {key}")):
        load_golden(broken("model", lambda weights: weights.pop(key)))


def test_long_lists_are_cut(broken):
    def edit(weights):
        for key in [k for k in weights if k.startswith("visual.blocks")]:
            del weights[key]

    with pytest.raises(ValueError, match=r"and 14 more \(24 in all\)") as error:
        load_golden(broken("model", edit))
    assert one_line(error).count("missing") == 10


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("siglip", WEIGHTS, "vision_model.post_layernorm.weight"),
        ("flux", "text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
        ("flux", "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"),
        ("flux", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
    ],
)
def test_encoders_are_strict_too(broken, name, file, key):
    changed = broken(name, lambda weights: weights.pop(key), file)
    with pytest.raises(ValueError, match="missing") as error:
        load_golden(changed)
    assert key.split(".", 1)[1] in one_line(error)


def test_wrong_dtype_is_named(broken):
    def edit(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)

    with pytest.raises(ValueError, match="dtype I8 of model.norm.weight") as error:
        load_golden(broken("model", edit))
    one_line(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_values_are_named_on_request(broken, bad):
    key = "denoise_tower.denoiser.transformer_blocks.0.attn.add_k_proj.weight"

    def edit(weights):
        weights[key][3, 5] = bad

    changed = broken("model", edit)
    load_golden(changed)  # not asked for
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds NaN or infinite values") as error:
        load_golden(changed, check_finite=True)
    one_line(error)


def test_not_finite_values_of_torch_files_are_named_on_request(folders, tmp_path):
    model = shutil.copytree(folders["model"], tmp_path / "model")
    weights = torch.load(model / "task_head_final.pt", weights_only=True)
    weights["3.bias"][0] = float("nan")
    torch.save(weights, model / "task_head_final.pt")
    assert load_golden({**folders, "model": model}).task_head is not None
    with pytest.raises(ValueError, match=r"task_head_final\.pt: 3\.bias holds NaN or infinite values"):
        load_golden({**folders, "model": model}, check_finite=True)

    (tmp_path / "stage").mkdir()
    connector = load_golden(folders).denoise_projector.state_dict()
    connector["0.bias"][0] = float("inf")
    torch.save(connector, tmp_path / "stage" / "denoise_projector.bin")
    with pytest.raises(ValueError, match=r"denoise_projector\.bin: 0\.bias holds NaN or infinite values"):
        load_golden(folders, check_finite=True, connectors=tmp_path / "stage")


@pytest.mark.parametrize("content", [b"", b"junk", b"not a torch file", b"PK\x03\x04broken archive"])
def test_damaged_torch_files_are_named(folders, tmp_path, content):
    (tmp_path / "denoise_projector.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"denoise_projector\.bin: no torch file of plain tensors") as error:
        load_golden(folders, connectors=tmp_path)
    one_line(error)
    (tmp_path / "task_head_final.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"task_head_final\.pt: no torch file of plain tensors") as error:
        TaskHead.from_file(tmp_path / "task_head_final.pt")
    one_line(error)


def test_parts_of_other_widths_are_listed_before_loading(loaded):
    parts = {name: value for name, value in vars(loaded).items() if isinstance(value, torch.nn.Module)}
    head = parts.pop("task_head")
    check_widths("folder", parts, head)
    wrong = {
        "semantic_encoder": SimpleNamespace(hidden_size=7),
        "denoise_projector": Connector(5, 4, loaded.denoiser.config.joint_attention_dim),
        "siglip_projector": Connector(loaded.semantic_encoder.hidden_size, 4, 3),
    }
    with pytest.raises(ValueError) as error:
        check_widths("folder", parts | wrong, TaskHead(9, 4))
    text = one_line(error)
    vlm = loaded.vlm.model.config.text_config.hidden_size
    assert text.startswith("folder: its parts do not fit each other: ")
    for problem in (
        f"denoise_projector is 5 wide, the VLM {vlm}",
        f"siglip_projector is {loaded.semantic_encoder.hidden_size} wide, SigLIP 7",
        f"siglip_projector's output is 3 wide, the DiT {loaded.denoiser.config.joint_attention_dim}",
        f"task head is 9 wide, the VLM {vlm}",
    ):
        assert problem in text
    assert text.count(" wide, ") == 4


def test_a_task_head_of_another_model_is_refused(folders, tmp_path):
    model = shutil.copytree(folders["model"], tmp_path / "model")
    torch.save(TaskHead(24, 8).state_dict(), model / "task_head_final.pt")
    with pytest.raises(ValueError, match="do not fit each other: task head is 24 wide, the VLM"):
        load_golden({**folders, "model": model})


def test_missing_shard_is_named(loaded, folders, tmp_path):
    model = save_uniworld(loaded, tmp_path / "model", max_shard_bytes=2_000_000)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing shard {shard.name}") as error:
        load_golden({**folders, "model": model})
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"hello, not weights at all", None])
def test_damaged_weights(folders, tmp_path, content):
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(ValueError, match="truncated or not a safetensors file") as error:
        load_golden({**folders, "model": model})
    assert str(model / WEIGHTS) in one_line(error)


def test_folders_that_are_missing_or_something_else(folders, tmp_path):
    for changes, message in (
        ({"model": tmp_path / "none"}, "model=.*none: no such folder"),
        ({"model": tmp_path}, "has no config.json"),
        ({"flux": None}, "flux=None: .* has no flux/ folder; pass flux=black-forest-labs/FLUX.1-dev"),
        ({"siglip": None}, "siglip=None: .* pass siglip=google/siglip2"),
        ({"flux": tmp_path}, "scheduler|config.json|tokenizer"),
        ({"siglip": tmp_path}, "preprocessor_config.json: no such file"),
        ({"model": folders["model"] / "config.json"}, "is a file"),
        ({"connectors": tmp_path}, "holds neither denoise_projector.bin nor siglip_projector.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as error:
            load_golden({**folders, **changes})
        one_line(error)


def test_a_plain_qwen_folder_is_refused_with_advice(folders, tmp_path):
    with pytest.raises(ValueError, match="no UniWorld checkpoint; see `uniworld convert`") as error:
        load_golden({**folders, "model": golden.qwen_dir(tmp_path)})
    one_line(error)


def test_damaged_config(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON") as error:
        load_golden({**folders, "model": model})
    one_line(error)


def test_dtypes_that_weights_cannot_have(folders):
    for dtype in (torch.int8, "int8"):
        with pytest.raises(ValueError, match="dtype=int8: must be one of bfloat16"):
            load_golden(folders, dtype=dtype)
    assert load_golden(folders, dtype="bfloat16").dtype == torch.bfloat16


# Subfolders, the Hub, exports of the training stages


def test_flux_and_siglip_inside_the_model_folder(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    shutil.copytree(folders["flux"], model / "flux")
    shutil.copytree(folders["siglip"], model / "siglip")
    assert load_golden({"model": model}).text_encoders.has_t5


def test_hub_ids_fetch_only_what_is_needed(folders, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked[repo_id] = allow_patterns
        return str({"a/uniworld": folders["model"], "b/flux": folders["flux"], "c/siglip": folders["siglip"]}[repo_id])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_golden({"model": "a/uniworld", "flux": "b/flux", "siglip": "c/siglip"}, use_t5=False)
    assert asked["a/uniworld"] == list(locate.MODEL_PATTERNS)
    assert "vae/*" in asked["b/flux"]
    assert not any(pattern.startswith(("text_encoder_2", "transformer")) for pattern in asked["b/flux"])
    load_golden({"model": "a/uniworld", "flux": "b/flux", "siglip": "c/siglip"})
    assert "text_encoder_2/*" in asked["b/flux"]


def test_hub_failure_is_one_line(folders, monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        raise OSError("404 Client Error.\nRepository Not Found for url: x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="model=no/such: no such folder, and not fetched from the Hub") as error:
        load_golden({**folders, "model": "no/such"})
    one_line(error)


def test_connector_exports_replace_the_checkpoints(folders, loaded, tmp_path):
    shapes = {name: p.shape for name, p in loaded.denoise_projector.named_parameters()}
    export = {f"denoise_tower.denoise_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save(export, tmp_path / "denoise_projector.bin")
    model = load_golden(folders, connectors=tmp_path)
    for name, parameter in model.denoise_projector.named_parameters():
        assert torch.equal(parameter, export[f"denoise_tower.denoise_projector.{name}"])
    assert torch.equal(model.siglip_projector[0].weight, loaded.siglip_projector[0].weight)

    narrow = {name.rpartition("projector.")[2]: value[..., :2].clone() for name, value in export.items()}
    torch.save(narrow, tmp_path / "siglip_projector.bin")
    with pytest.raises(ValueError, match=r"siglip_projector.bin: shape of 0.weight is") as error:
        load_golden(folders, connectors=tmp_path)
    one_line(error)
    torch.save({"0.weight": export["denoise_tower.denoise_projector.0.weight"]}, tmp_path / "siglip_projector.bin")
    with pytest.raises(ValueError, match=r"holds \['0.weight'\], must be"):
        load_golden(folders, connectors=tmp_path)


def test_exports_cannot_run_code(folders, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Payload(), tmp_path / "denoise_projector.bin")
    with pytest.raises(ValueError, match="no torch file of plain tensors"):
        load_golden(folders, connectors=tmp_path)
    assert not (tmp_path / "ran").exists()


# Saving


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1_000_000])
def test_round_trip_is_bit_exact(loaded, folders, tmp_path, max_shard_bytes):
    model = save_uniworld(loaded, tmp_path / "model", max_shard_bytes)
    files = locate.weight_files(model)
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    assert all(file.stat().st_size < max_shard_bytes + 50_000 for file in files)
    saved = {key: value for file in files for key, value in load_file(file).items()}
    source = load_file(folders["model"] / WEIGHTS)
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], source[key]) for key in source)
    assert json.loads((model / "config.json").read_text()) == json.loads((folders["model"] / "config.json").read_text())

    again = load_golden({**folders, "model": model})
    for (name, mine), (_, reference) in zip(again.vlm.named_parameters(), loaded.vlm.named_parameters()):
        assert torch.equal(mine, reference), name
    for name, reference in loaded.denoiser.named_parameters():
        assert torch.equal(again.denoiser.get_parameter(name), reference), name
    for name, reference in loaded.task_head.state_dict().items():
        assert torch.equal(again.task_head.state_dict()[name], reference), name
    if len(files) > 1:
        index = json.loads((model / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.values())


def test_saving_refuses_what_exists_unless_told(loaded, tmp_path):
    folder = tmp_path / "model"
    save_uniworld(loaded, folder)
    (folder / "mark").touch()
    with pytest.raises(ValueError, match="exists already") as error:
        save_uniworld(loaded, folder)
    one_line(error)
    assert (folder / "mark").exists()
    save_uniworld(loaded, folder, overwrite=True)
    assert not (folder / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(old, overwrite=True) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert [path.name for path in old.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written") as error, atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("must not be entered")
    one_line(error)


# Memory

MEASURE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from uniworld.checkpoint.load import load_uniworld

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, big, flux, siglip = sys.argv[1:]
settings = dict(flux=flux, siglip=siglip, device="cpu", dtype=torch.float32, progress=False)
kept = load_uniworld(small, **settings)  # imports and first-use memory
before = status("VmRSS")
model = load_uniworld(big, **settings)
parts = [value for value in vars(model).values() if isinstance(value, torch.nn.Module)]
print(status("VmHWM") - before, sum(p.nbytes for part in parts for p in part.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_at_most_a_shard_above_the_model(folders, tmp_path):
    shard_bytes = 26_000_000
    big = tmp_path / "big"
    shutil.copytree(folders["model"], big, ignore=shutil.ignore_patterns(WEIGHTS))
    config = json.loads((big / "config.json").read_text())
    denoiser, inner = config["denoise_tower"]["denoiser_config"], 1024
    denoiser |= {"attention_head_dim": 16, "num_attention_heads": inner // 16, "num_layers": 1, "num_single_layers": 1}
    (big / "config.json").write_text(json.dumps(config))

    from uniworld.models.flux import FluxConfig, FluxTransformer

    with parameters_on_meta():
        shapes = {name: p.shape for name, p in FluxTransformer(FluxConfig.from_dict(denoiser)).named_parameters()}
    writer = ShardWriter(big, shard_bytes)
    for key, value in load_file(folders["model"] / WEIGHTS).items():
        if not key.startswith(names.DENOISER_PREFIX):
            writer.add(key, value)
    for name, shape in shapes.items():
        keys = names.authors_names("denoiser", name)
        for key in keys:
            writer.add(key, torch.zeros(shape[0] // len(keys), *shape[1:]))
    writer.finish()
    assert len(writer.shards) >= 8

    arguments = [str(path) for path in (folders["model"], big, folders["flux"], folders["siglip"])]
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    peak, model_bytes = (int(x) for x in result.stdout.split())
    assert model_bytes > 8 * shard_bytes
    slack = 15_000_000  # headers, modules, allocator
    assert model_bytes * 0.9 < peak < model_bytes + shard_bytes + slack, f"{peak=} {model_bytes=}"


