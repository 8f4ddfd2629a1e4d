"""The whole pipeline against the authors' code: conditioning, DiT prediction, sampling runs."""

import pytest
import torch
from golden import case, cases, close, flux_dir, resolve, siglip_dir, univa_dir

from uniworld.checkpoint.load import load_uniworld
from uniworld.engine import Engine
from uniworld.models import flow
from uniworld.models.prompts import VLMInputs

TOLERANCE = 1e-4
SAMPLED = [c["name"] for c in cases("d_sampling") if "prompt_text" in c["inputs"]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("golden")
    folders = univa_dir(tmp), flux_dir(tmp), siglip_dir(tmp)
    return Engine(load_uniworld(*folders, device="cpu", dtype=torch.float32, progress=False))


def vlm_inputs(engine: Engine, inputs: dict) -> VLMInputs:
    tokens = engine.model.processor.tokens
    pictures = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    return VLMInputs.from_ids(inputs["input_ids"], inputs["attention_mask"], tokens, *pictures)


def encode(engine: Engine, inputs: dict, pooled: torch.Tensor, t5: torch.Tensor | None = None):
    with torch.no_grad():
        return engine.conditioner.encode(
            vlm_inputs(engine, inputs), pooled=pooled, siglip_states=inputs.get("siglip_hidden_states"), t5_states=t5
        )


@pytest.mark.parametrize("name", [c["name"] for c in cases("b_denoise_embeds")])
def test_conditioning(engine, name):
    inputs, outputs = resolve(case("b_denoise_embeds", name))
    mine = encode(engine, inputs, pooled=torch.zeros(len(inputs["input_ids"]), 1))
    valid = outputs["valid_mask"].bool()
    for i, length in enumerate(mine.txt_lengths):
        ok, worst = close(mine.txt[i, :length], outputs["prompt_embeds"][i][valid[i]], atol=TOLERANCE)
        assert ok, worst
        assert not mine.txt[i, length:].any()


def test_unequal_batch_equals_each_alone(engine):
    """Left-padded, two images against one: every sample as if it had been sent alone."""
    inputs, _ = resolve(case("b_denoise_embeds", "embeds_batch2_leftpad_2img_1img"))
    batched = encode(engine, inputs, pooled=torch.zeros(2, 1))
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    split_at = sizes[0] + sizes[1]  # the first sample has two of the three images
    pixels, grids, siglip = (inputs[k] for k in ("pixel_values", "image_grid_thw", "siglip_hidden_states"))
    pictures = [(pixels[:split_at], grids[:2], siglip[:2]), (pixels[split_at:], grids[2:], siglip[2:])]
    for i, (patches, grid, states) in enumerate(pictures):
        real = inputs["attention_mask"][i].bool()
        alone = {
            "input_ids": inputs["input_ids"][i : i + 1, real],
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.int64),
            "pixel_values": patches,
            "image_grid_thw": grid,
            "siglip_hidden_states": states,
        }
        single = encode(engine, alone, pooled=torch.zeros(1, 1))
        torch.testing.assert_close(batched.select(i).txt, single.txt, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [c["name"] for c in cases("c_denoise_model_pred")])
def test_prediction(engine, name):
    inputs, outputs = resolve(case("c_denoise_model_pred", name))
    given = inputs["denoiser_kwargs"]
    conditioning = encode(engine, inputs, given["pooled_projections"], given.get("prefix_prompt_embeds"))
    with torch.no_grad():
        mine = engine.model.denoiser(
            given["hidden_states"],
            conditioning.txt,
            conditioning.pooled,
            given["timestep"],
            given["guidance"],
            given["img_ids"],
        )
    ok, worst = close(mine, outputs["model_pred"], atol=TOLERANCE)
    assert ok, worst


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_from_golden_inputs(engine, name):
    """Whole runs through the engine's own rooms, from tokens, patches and semantic states to a picture."""
    from uniworld.engine.request import Job, Request

    inputs, outputs = resolve(case("d_sampling", name))
    text = inputs["prompt_text"]
    model = engine.model
    conditioning = encode(
        engine, with_mask(inputs), model.text_encoders.pooled([text]), model.text_encoders.t5_states([text])
    )
    assert close(conditioning.pooled, inputs["pooled_prompt_embeds"], atol=TOLERANCE)[0]
    seen = []
    request = Request(
        prompt=text,
        num_inference_steps=inputs["num_inference_steps"],
        guidance_scale=inputs["guidance_scale"],
        on_step=lambda info: seen.append(info.latents.clone()),
    )
    job = Job(
        request=request,
        height=inputs["height"],
        width=inputs["width"],
        seed=inputs["torch_generator_cpu_seed"],
        inputs=vlm_inputs(engine, with_mask(inputs)),
        conditioning=conditioning,
    )
    engine.denoiser.run([job])
    ok, worst = close(torch.stack(seen), outputs["latents_after_each_step"], atol=2e-4)
    assert ok, worst
    ok, worst = close(job.latents, outputs["final_latents_packed"], atol=2e-4)
    assert ok, worst
    engine.decoder.run([job])
    difference = pixels_of(job.image).int() - outputs["image_uint8"].int()
    assert difference.abs().max() <= 1


def test_generate_from_text_alone(engine):
    """`Engine.generate` with a seed gives the golden picture: prompt, tokens, noise and all are made by the engine."""
    inputs, outputs = resolve(case("d_sampling", "t2i_64x64_4step"))
    result = engine.generate(
        inputs["prompt_text"],
        height=inputs["height"],
        width=inputs["width"],
        num_inference_steps=inputs["num_inference_steps"],
        guidance_scale=inputs["guidance_scale"],
        seed=inputs["torch_generator_cpu_seed"],
    )
    ok, worst = close(result.latents, outputs["final_latents_packed"], atol=2e-4)
    assert ok, worst
    assert (pixels_of(result.images[0]).int() - outputs["image_uint8"].int()).abs().max() <= 1


def with_mask(inputs: dict) -> dict:
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def pixels_of(image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_packed_latents_have_the_golden_layout(engine):
    inputs, _ = resolve(case("d_sampling", "edit1_64x96_4step"))
    ids = flow.image_ids(inputs["height"], inputs["width"])
    assert torch.equal(ids, inputs["latent_image_ids"])
