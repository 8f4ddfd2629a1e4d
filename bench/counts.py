"""Counted on any machine: kernels, FLOPs and bytes of a DiT step at full size, and the bytes that each op moves.

Nothing is timed. Ours is the step of the engine's loop, the Euler step included; diffusers is one call of its model,
without its scheduler, which makes text projection, modulation and rotary tables anew in every step.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Count, count, fake_tensors
from peers import diffusers_flux, run_diffusers

from uniworld.engine.quantize import quantized_copy
from uniworld.engine.steps import AllBlocks, EagerSteps, PreparedBatch, PreparedPass
from uniworld.kernels.attention_backends import AttentionChoice
from uniworld.kernels.registry import OPS, load_ops
from uniworld.models import flow
from uniworld.models.conditioning import Conditioning
from uniworld.models.flux import FluxConfig, FluxTransformer

DTYPE, FULL = torch.bfloat16, FluxConfig()
CASES = {  # side in px, text tokens: VLM and T5, and 1,024 semantic ones for a reference picture
    "text to image, 512 px": (512, 320),
    "edit, 512 px": (512, 1600),
    "text to image, 1024 px": (1024, 320),
    "edit, 1024 px": (1024, 1600),
}
ATTENTION = AttentionChoice("sdpa", "any that is one kernel", ragged="triton")
SIDES = ("ours", "ours, forward", "ours, fp8", "diffusers eager")
COUNTED_OPS = tuple(load_ops())
NO_SHAPES = "connector_mlp"  # its plain version has results whose size depends on the data
TRAINING = "region_mse"  # whose floor is that of the loss and its gradient together


def formula_flops(num_tokens: int, config: FluxConfig = FULL) -> int:
    """F(S): the matrix products of all blocks and attention, of one forward pass over S tokens."""
    blocks, D = config.num_layers + config.num_single_layers, config.dim
    return blocks * (24 * D * D * num_tokens + 4 * D * num_tokens**2)


def inputs_of(case: str, config: FluxConfig) -> dict[str, torch.Tensor]:
    """Inputs of `FluxTransformer.forward`."""
    side_px, num_txt = CASES[case]
    ids = flow.image_ids(side_px, side_px)
    return {
        "img": torch.empty(1, len(ids), config.in_channels, dtype=DTYPE),
        "txt": torch.empty(1, num_txt, config.joint_attention_dim, dtype=DTYPE),
        "pooled": torch.empty(1, config.pooled_projection_dim, dtype=DTYPE),
        "timestep": torch.empty(1, dtype=DTYPE),
        "guidance": torch.empty(1, dtype=DTYPE),
        "img_ids": ids,
    }


def loop_step(model: FluxTransformer, case: str, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """One step of the engine's loop, everything that serves all steps made before."""
    txt, num_steps = inputs["txt"], 28
    conditioning = Conditioning(txt, (txt.shape[1],), inputs["pooled"])
    sigmas = torch.empty(num_steps + 1)
    batch = PreparedBatch(
        model=model,
        passes=[PreparedPass(model, conditioning, sigmas, inputs["guidance"])],
        latents=torch.empty(inputs["img"].shape),
        pe=model.rope(inputs["img_ids"]),
        sigmas=[0.0] * (num_steps + 1),
        dsigma=sigmas[1:],
        true_cfg_scale=1.0,
        height=CASES[case][0],
        width=CASES[case][0],
    )
    steps = EagerSteps(batch, AllBlocks(batch), "counted")
    return functools.partial(steps.step, 9)


@functools.cache
def step_counts(case: str, config: FluxConfig = FULL) -> dict[str, Count]:
    """The counts of a step by side."""
    with torch.device("meta"):
        model = FluxTransformer(config).eval().requires_grad_(False)
    with fake_tensors():
        empty = {name: torch.empty(p.shape, dtype=DTYPE) for name, p in model.named_parameters()}
        model.load_state_dict(empty, assign=True)
        model.attention_backend = ATTENTION
        inputs = inputs_of(case, config)
        theirs = diffusers_flux(model, "cpu")
        return {
            "ours": count(loop_step(model, case, inputs)),
            "ours, forward": count(lambda: model(**inputs)),
            "ours, fp8": count(loop_step(quantized_copy(model, "fp8"), case, inputs)),
            "diffusers eager": count(lambda: run_diffusers(theirs, **inputs)),
        }


def op_counts(name: str, case: dict[str, int]) -> dict[str, Count]:
    """An op and, where its shapes are known, its plain reference on one case, bf16."""
    op = OPS[name]
    with fake_tensors():
        inputs = op.make_inputs(**case, dtype=DTYPE, device="cpu")
        fixed = {"backend": ATTENTION} if name == "joint_attention" else {}
        calls = {"ours": functools.partial(op.fn, **inputs, **fixed)}
        if name != NO_SHAPES:
            calls["torch eager"] = functools.partial(op.reference, **inputs)
        if name == TRAINING:
            inputs["pred"].requires_grad_()
            calls = {side: functools.partial(_with_gradient, call) for side, call in calls.items()}
        return {side: count(call) for side, call in calls.items()}


def _with_gradient(loss: Callable[[], torch.Tensor]) -> None:
    with torch.enable_grad():
        loss().backward()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_step(case, side, report_count):
    pytest.importorskip("diffusers")
    counts = step_counts(case)
    found, theirs = counts[side], counts["diffusers eager"]
    side_px, num_txt = CASES[case]
    S = (side_px // flow.TOKEN_PX) ** 2 + num_txt
    report_count(
        "counts_step",
        f"{case}, S = {S}",
        side,
        DTYPE,
        kernels=found.num_kernels,
        kernels_of_diffusers=found.num_kernels / theirs.num_kernels,
        flops=found.flops,
        flops_of_formula=found.flops / formula_flops(S),
        bytes=found.num_bytes,
    )


@pytest.mark.parametrize("name", COUNTED_OPS)
def test_op(name, report_count):
    op = OPS[name]
    for case in op.bench_cases:
        text = " ".join(f"{key}={value}" for key, value in case.items())
        for side, found in op_counts(name, case).items():
            floor = op.bytes_moved(case)
            figures = {"floor_bytes": floor, "of_floor": found.num_bytes / floor, "kernels": found.num_kernels}
            report_count("counts_ops", f"{name} {text}", side, DTYPE, bytes=found.num_bytes, **figures)
