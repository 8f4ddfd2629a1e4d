"""One training step against the authors' code: noise levels, noisy input, loss, gradients, trained names."""

import pytest
import torch
from golden import case, close, flux_dir, resolve, siglip_dir, univa_dir

from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.names import authors_names
from uniworld.config import StageConfig
from uniworld.kernels.flow_noise import flow_noise
from uniworld.models import flow
from uniworld.models.prompts import VLMInputs
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.noise import shifted
from uniworld.train.stages import PRESETS, freeze_except, num_trained, trained_patterns

CASES = ["edit_B1_64px", "t2i_B1_96x64_nomask", "mixed_B2_unequal_sizes"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("golden")
    folders = univa_dir(tmp), flux_dir(tmp), siglip_dir(tmp)
    return load_uniworld(*folders, device="cpu", dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def model(loaded):
    return TrainModel(loaded.denoiser, loaded.denoise_projector, loaded.siglip_projector)


def stage2_names(model: TrainModel) -> list[str]:
    return freeze_except(model, PRESETS["stage2"])


def our_gradients(model: TrainModel) -> dict[str, torch.Tensor]:
    """Gradients under the authors' names; the fused q, k and v are split by rows."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part, _, rest = name.partition(".")
            keys = authors_names(part, rest)
            gradients |= dict(zip(keys, parameter.grad.chunk(len(keys))))
    return gradients


@pytest.mark.parametrize("name", CASES)
def test_noise_levels_and_noisy_input(name):
    inputs, outputs = resolve(case("e_train_loss", name))
    latents = outputs["model_input"]
    num_tokens = latents.shape[2] * latents.shape[3] // 4
    sigma = shifted(inputs["pre_sigmoid_normal"].sigmoid(), num_tokens)
    ok, worst = close(sigma, outputs["sigmas"], atol=1e-6)
    assert ok, worst
    noisy, target = flow_noise(latents, inputs["noise"], outputs["sigmas"])
    assert close(noisy, outputs["packed_noisy_model_input"], atol=1e-6)[0]
    assert close(target, flow.pack(outputs["target"]), atol=1e-6)[0]


@pytest.mark.parametrize("name", CASES[:2])  # the third attends padding, which ours never does
def test_loss_and_gradients(loaded, model, name):
    inputs, outputs = resolve(case("e_train_loss", name))
    trained = stage2_names(model)
    assert trained
    tokens = loaded.processor.tokens
    pictures = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    prompts = VLMInputs.from_ids(inputs["input_ids"], inputs["attention_mask"], tokens, *pictures)
    batch = EncodedBatch(
        vlm_states=loaded.vlm.encode(prompts).hidden_states,
        attention_mask=prompts.attention_mask,
        image_ends=prompts.image_end_positions,
        siglip_states=inputs.get("siglip_hidden_states"),
        t5_states=None,
        pooled=inputs["pooled_projections"],
        latent_mean=inputs["latents"],
        latent_std=torch.zeros_like(inputs["latents"]),
        region_weight=inputs.get("area_mask_weights"),
    )
    model.zero_grad()
    loss = model(batch, inputs["latents"], inputs["noise"], outputs["sigmas"], inputs["guidance_scale"])
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-5)
    mine = our_gradients(model)
    for key, expected in outputs.items():
        if key.startswith("grad."):
            grad = mine.get(key.removeprefix("grad."), torch.zeros_like(expected))
            relative = (grad - expected).norm() / expected.norm().clamp(min=1e-12)
            assert relative < 1e-3, (key, relative)
    norms = case("e_train_loss", name)["grad_norms"]
    for key, expected in norms.items():
        got = mine[key].norm().item() if key in mine else 0.0
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-9), key
    assert len(norms) > 40


def test_trained_names(model):
    """The authors' list trains the given blocks' image branch; without connectors it equals our stage 2."""
    _, outputs = resolve(case("e_train_loss", "trainable_params"))
    mine = set()
    for name in stage2_names(model):
        part, _, rest = name.partition(".")
        if part == "denoiser":
            mine |= set(authors_names(part, rest))
    theirs = {name for name in outputs["only_img_branch=True"] if ".denoiser." in name}
    assert mine == theirs


def test_counts_at_full_scale():
    from uniworld.models.connectors import Connector
    from uniworld.models.flux import FluxConfig, FluxTransformer

    with torch.device("meta"):
        model = TrainModel(FluxTransformer(FluxConfig()), Connector(3584, 12288, 4096), Connector(1152, 12288, 4096))
    counts = {}
    for preset in ("stage1", "stage2", "siglip_mlp"):
        freeze_except(model, trained_patterns(StageConfig(preset=preset)))
        counts[preset] = num_trained(model)
    assert counts["stage1"] == 3584 * 12288 + 12288 + 12288 * 4096 + 4096 == 94_388_224
    assert counts["siglip_mlp"] == 1152 * 12288 + 12288 + 12288 * 4096 + 4096
    double = 19 * (6 * 3072**2 + 6 * 3072 + 4 * 3072**2 + 4 * 3072 + 2 * 128)
    single = 38 * (3 * 3072**2 + 3 * 3072 + 3 * 3072**2 + 3 * 3072 + 2 * 128)
    assert counts["stage2"] == counts["stage1"] + counts["siglip_mlp"] + double + single


def test_a_pattern_that_matches_nothing_is_refused(model):
    with pytest.raises(ValueError, match="'denoiser.blocks.*' matches no parameter"):
        freeze_except(model, ("denoiser.blocks.*",))
