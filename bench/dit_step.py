"""One DiT step of about 280 M parameters over 1,344 tokens: ours against diffusers' FLUX with the same weights.

Ours is what the engine's loop runs: `denoise`, with text projection, modulation table and rotary tables made once a
request. "ours, preparation / 28" adds that preparation's share of one step of 28, and is the figure to compare with
diffusers, whose model does all of it in every step; "ours, forward" prepares anew each time, as diffusers does.
"""

import functools
import os

import pytest
import torch
from peers import (
    MISSING,
    attention_kernels,
    diffusers_flux,
    our_attention,
    random_flux,
    relative_error,
    run_diffusers,
    same_attention,
)
from timing import Samples, interleave

from uniworld.models import flow
from uniworld.models.flux import FluxConfig, FluxTransformer

pytest.importorskip("diffusers", reason=MISSING)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "dit_step_dry_run" if DRY_RUN else "dit_step"
CONFIG = FluxConfig(
    num_layers=1 if DRY_RUN else 4,
    num_single_layers=2 if DRY_RUN else 8,
    num_attention_heads=2 if DRY_RUN else 8,
    joint_attention_dim=4096,
)
SIDE_PX, NUM_TXT = (128, 32) if DRY_RUN else (512, 320)
NUM_STEPS = 28
STEP = 9  # of the 28
SIDES = ("ours", "ours, preparation / 28", "ours, forward", "diffusers eager")
DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dit_step(dtype, side, report):
    samples, errors, attentions, num_parameters = measure(dtype)
    theirs = samples["diffusers eager"].median
    more = {"parameters": num_parameters, "tokens": num_tokens(), "error": errors[side], "error_is": "relative to fp64"}
    more |= {"time_of_diffusers": samples[side].median / theirs, "attention": attentions[side]}
    if side != "ours, preparation / 28":
        more |= {"tflop_s": flops() / samples[side].median / 1e12}
    report(BENCH, f"{num_parameters / 1e6:.0f} M, {num_tokens()} tokens", side, dtype, samples[side], **more)


def num_tokens() -> int:
    return (SIDE_PX // flow.TOKEN_PX) ** 2 + NUM_TXT


def flops() -> float:
    """Multiply-adds of the blocks' matrices and of attention, twice; the embedders and the modulation are left out."""
    S, D = num_tokens(), CONFIG.dim
    matrices = 12 * D * D  # q, k, v, out, MLP in and out: of either stream, and of a single block
    attention = 2 * S * D
    return 2.0 * S * (CONFIG.num_layers + CONFIG.num_single_layers) * (matrices + attention)


def make_inputs(dtype: torch.dtype, device: str = DEVICE) -> dict[str, torch.Tensor]:
    """Inputs of one prediction. diffusers rounds 1000 times timestep and guidance to bf16; these are exact in it."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device, dtype)

    ids = flow.image_ids(SIDE_PX, SIDE_PX, device)
    return {
        "img": normal(1, ids.shape[0], CONFIG.in_channels),
        "txt": normal(1, NUM_TXT, CONFIG.joint_attention_dim),
        "pooled": normal(1, CONFIG.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([4.0], device=device, dtype=dtype),
        "img_ids": ids,
    }


@functools.cache
def truth() -> torch.Tensor:
    model = random_flux(CONFIG, torch.float64, DEVICE)
    with torch.inference_mode():
        return run_diffusers(diffusers_flux(model, DEVICE), **make_inputs(torch.float64))


class Prepared:
    """A request as the engine's loop holds it: everything that does not change from step to step is made once."""

    def __init__(self, model: FluxTransformer, inputs: dict[str, torch.Tensor]):
        self.model, self.inputs = model, inputs
        sigmas = flow.sigmas(NUM_STEPS, inputs["img"].shape[1]).to(DEVICE)
        sigmas[STEP] = inputs["timestep"].float()[0]
        self.timesteps = sigmas[:-1, None]
        self.prepare()

    def prepare(self) -> None:
        self.txt = self.model.embed_txt(self.inputs["txt"])
        self.table = self.model.modulation(self.timesteps, self.inputs["guidance"], self.inputs["pooled"])
        self.pe = self.model.rope(self.inputs["img_ids"])

    def step(self) -> torch.Tensor:
        return self.model.denoise(self.inputs["img"], self.txt, self.table[STEP], self.pe)


@functools.cache
def measure(dtype: torch.dtype) -> tuple[dict[str, Samples], dict[str, float], dict[str, str], int]:
    """Samples, error and attention of every side, and the number of parameters."""
    ours = random_flux(CONFIG, dtype, DEVICE)
    attention = our_attention(ours, DEVICE, dtype)
    theirs = diffusers_flux(ours, DEVICE, attention)
    inputs = make_inputs(dtype)
    with torch.inference_mode(), same_attention(DEVICE, attention):
        request = Prepared(ours, inputs)
        calls = {
            "ours": request.step,
            "diffusers eager": lambda: run_diffusers(theirs, **inputs),
            "ours, forward": lambda: ours(**inputs),
        }
        errors = {side: relative_error(call(), truth()) for side, call in calls.items()}
        attentions = {side: attention_kernels(call) for side, call in calls.items()}
        samples = interleave({side: [call] for side, call in calls.items()}, rounds=11, sample_s=0.0, device=DEVICE)
        prepare = interleave({"prepare": [request.prepare]}, rounds=5, sample_s=0.0, device=DEVICE)["prepare"]
    share = prepare.median / NUM_STEPS
    step = samples["ours"]
    samples["ours, preparation / 28"] = Samples(step.method, step.calls, [s + share for s in step.seconds])
    errors["ours, preparation / 28"], attentions["ours, preparation / 28"] = errors["ours"], attentions["ours"]
    return samples, errors, attentions, sum(p.numel() for p in ours.parameters())
