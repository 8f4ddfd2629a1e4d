"""One training step of stage 1 and of stage 2, as `uniworld train` runs it, against the same step written plainly.

Ours are the trainer's own pieces with the settings of `configs/`: encoders, loss, DeepSpeed engine, fused AdamW and
sharded EMA. The peer (`original_training.py`) computes the same on diffusers, transformers and torch, eager, as the
authors' trainer does. Both start from the same weights; losses and gradients are compared before anything is timed.

On a CPU a model of SMALL_SIZE, on a GPU the full size; `UNIWORLD_BENCH_SIZE=tiny` is a dry run on either. At full size
stage 2 trains 4.1 B parameters, and one GPU cannot hold two sides of that: its DiT has fewer blocks there, as the case
says, and the plain side averages what is trained alone.
"""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from full_model import FULL_SIZE, SMALL_SIZE, TINY_SIZE, Size, random_uniworld
from peers import MISSING, attention_kernels, diffusers_flux, our_attention, same_attention, split_qkv
from PIL import Image
from residents import free
from timing import Samples, interleave
from torch import Tensor

pytest.importorskip("diffusers", reason=MISSING)
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from original_training import OriginalTraining

from uniworld.config import TrainConfig, load_config
from uniworld.data.batch import TrainBatch
from uniworld.models.prompts import training_pieces
from uniworld.models.unified import UniWorld
from uniworld.train import build
from uniworld.train.encode import Encoders
from uniworld.train.flops import sample_tokens
from uniworld.train.model import EncodedBatch
from uniworld.train.optim import learning_rate
from uniworld.train.stages import inserts_siglip
from uniworld.train.step import rank_generator
from uniworld.train.trainer import Trainer, _Window

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
SIZE = TINY_SIZE if DRY_RUN else FULL_SIZE if CUDA else SMALL_SIZE
SIDE_PX = 128 if DRY_RUN else 512 if CUDA else 384
BENCH = "train_step_dry_run" if DRY_RUN else "train_step"
ROUNDS = 3 if DRY_RUN else 9
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WORDS = "Make it look like a watercolour painting of a quiet harbour in the evening, with warm light on the water"
OURS, PRECOMPUTED = "ours", "ours, precomputed states"
PLAIN, PLAIN_TRAINED_EMA = "plain", "plain, EMA of the trained alone"
PLAIN_KEPT = "plain, EMA of the trained alone, no block recomputed"  # in stage 2
SIDES = (OURS, PRECOMPUTED, PLAIN, PLAIN_TRAINED_EMA, PLAIN_KEPT)
COMPARED = (OURS, PRECOMPUTED, PLAIN_TRAINED_EMA, PLAIN_KEPT)
# What is tried where sides do not fit into memory together.
SMALLER_GROUPS = {SIDES: (COMPARED, (PLAIN,)), COMPARED: ((OURS, PRECOMPUTED), (PLAIN_TRAINED_EMA, PLAIN_KEPT))}
# Double and single blocks of stage 2's DiT by the memory of the GPU in GiB. Beside 18 GB of encoders, both sides take 2
# bytes for each of P parameters and 48 for each of T trained ones (a side: 12 of master weights and moments, 4 of EMA;
# the plain one: 2 of a copy; the larger step: 14 of gradients and temporaries). P = 6.5 B, T = 2.2 B, or 2.7 and 1.0.
STAGE2_BLOCKS = {130: (10, 20), 70: (4, 8)}
STAGES = ("stage1", "stage2")
DTYPES = (torch.float32,) if DRY_RUN else (torch.bfloat16,)
# In bf16 both sides round in other places, and diffusers rounds the noise level before it embeds it.
BOUNDS = {
    torch.float32: {"loss_difference": 1e-4, "norm_difference": 1e-3, "gradient_error": 1e-3},
    torch.bfloat16: {"loss_difference": 1e-2, "norm_difference": 5e-2, "gradient_error": 0.2},
}
EDITED_SHARE, EDITED_WEIGHT = 4, 3.0  # a quarter of the picture is edited: log2(4) + 1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("stage", STAGES)
def test_train_step(stage, dtype, side, report):
    measured = measure(stage, dtype)
    if side not in measured.samples:
        pytest.skip(f"{side}: {measured.failed.get(side, 'is no other side in this stage')}")
    for name, bound in BOUNDS[dtype].items():
        assert measured.agreement.get(name, 0.0) < bound, (name, measured.agreement)
    samples = measured.samples[side]
    more = {"images_per_s": 1 / samples.median, "peak_gib": measured.peaks_gib.get(side)}
    baseline = PLAIN if PLAIN in measured.samples else PLAIN_TRAINED_EMA
    if baseline in measured.samples:
        more |= {"times_faster": measured.samples[baseline].median / samples.median, "times_faster_than": baseline}
    more |= {"interleaved": measured.interleaved(side), "recomputed_blocks": recomputed_blocks(side, stage, dtype)}
    more["attention"] = measured.attention[side]
    more |= measured.counts
    if side.startswith("ours"):
        more |= measured.agreement
    report(BENCH, case_name(stage), side, dtype, samples, **more)


def recomputed_blocks(side: str, stage: str, dtype: torch.dtype) -> list[str]:
    """Kinds of block whose activations are computed again in the backward pass."""
    if side.startswith("ours"):
        return list(train_config(stage, dtype).sharding.checkpoint_blocks)
    return ["double", "single"] if stage == "stage2" and side != PLAIN_KEPT else []


def stage2_blocks(memory_gib: float) -> tuple[int, int]:
    """Double and single blocks of the DiT that stage 2 trains on a GPU of this size."""
    return next((blocks for least, blocks in STAGE2_BLOCKS.items() if memory_gib >= least), STAGE2_BLOCKS[70])


def fewer_blocks(stage: str) -> tuple[int, int] | None:
    """The blocks of the DiT where they are not those of the size."""
    if SIZE is not FULL_SIZE or stage != "stage2":
        return None
    return stage2_blocks(torch.cuda.get_device_properties(0).total_memory / 2**30)


def size_of(stage: str) -> Size:
    blocks = fewer_blocks(stage)
    if blocks is None:
        return SIZE
    return {**SIZE, "denoiser": {**SIZE["denoiser"], "num_layers": blocks[0], "num_single_layers": blocks[1]}}


def case_name(stage: str) -> str:
    blocks = fewer_blocks(stage)
    return f"{stage}, {SIDE_PX} px" + (f", DiT of {blocks[0]} + {blocks[1]} blocks" if blocks else "")


def train_config(stage: str, dtype: torch.dtype, overrides: Sequence[str] = ()) -> TrainConfig:
    """The stage's own config at 512 px, whose weights and data are not read from anywhere."""
    nowhere = [f"model.{name}=null" for name in ("flux", "siglip", "connectors")]
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    changes = [*nowhere, "model.path=tiny", f"sharding.dtype={name}", f"data.anchor_px={SIDE_PX**2}"]
    return load_config(CONFIGS / f"{stage}_512.yaml", [*changes, *overrides])


def make_batch(model: UniWorld, config: TrainConfig) -> TrainBatch:
    """One edit of one picture, a quarter of which changes; what the loader would hand over, made once."""
    side = SIDE_PX - SIDE_PX % 28 if DRY_RUN else int(config.data.vlm_max_px**0.5)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(pixels.numpy())
    turns = [{"from": "human", "value": f"<image>{WORDS}"}, {"from": "gpt", "value": "<gen_image>"}]
    region_weight = torch.ones(1, 1, SIDE_PX // 8, SIDE_PX // 8)
    region_weight[..., : SIDE_PX // 16, : SIDE_PX // 16] = EDITED_WEIGHT
    return TrainBatch(
        inputs=model.processor.encode([training_pieces(turns)], [[picture]]),
        siglip_pixels=model.semantic_encoder.preprocess([picture]) if inserts_siglip(config.stage) else None,
        instructions=(WORDS,),
        target=torch.rand(1, 3, SIDE_PX, SIDE_PX, generator=generator) * 2 - 1,
        region_weight=region_weight,
        sample_ids=("random",),
    )


class Ours:
    """A trainer on given parts and one batch: its own step, from the samples or from their encoder states."""

    def __init__(self, model: UniWorld, config: TrainConfig, batch: TrainBatch):
        encoders = Encoders(model, use_siglip=inserts_siglip(config.stage), use_t5=config.model.use_t5)
        self.batch, self.encoded = batch, encoders.encode(batch).to(torch.device("cpu"), model.dtype)

        def encode(given: TrainBatch | EncodedBatch) -> EncodedBatch:
            if isinstance(given, EncodedBatch):
                return given.to(model.device, model.dtype)
            return encoders.encode(given)

        batches = build.Batches(itertools.repeat(batch), encode, lambda: 0)
        self.trainer = Trainer(config, quiet=True)
        given = {"load_parts": lambda *_: model, "open_batches": lambda *_: batches, "check": lambda *_: None}
        with mock.patch.multiple(build, **given):
            self.trainer._build()

    def step(self, batch: TrainBatch | EncodedBatch) -> float:
        """The loss of one step of the trainer's loop."""
        window = _Window(self.trainer.world.device)
        self.report = self.trainer._train_step([batch], window)
        self.loss = window.sums()[0]
        return self.loss

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Master weights, first moments and average, under diffusers' names."""
        sharded, ema = self.trainer.sharded, self.trainer.ema
        moments, states = {}, sharded.optimizer_states()
        for name, _, numel, partition, position in sharded.layout():
            moments[name] = states[partition]["exp_avg"].view(-1)[position : position + numel]
        flat = {
            "weights": {piece.name: piece.tensor for piece in sharded.slices()},
            "moments": moments,
            "ema": {piece.name: piece.tensor for piece in ema.slices()},
        }
        shaped = {key: {n: t.view(sharded.shapes[n]) for n, t in tensors.items()} for key, tensors in flat.items()}
        return {key: split_qkv(tensors) for key, tensors in shaped.items()}


class Plain:
    """The authors' step on the same parts and batch."""

    def __init__(self, model: UniWorld, config: TrainConfig, batch: TrainBatch, *, ema_of_frozen: bool):
        self.attention = our_attention(model.denoiser, DEVICE, model.dtype)
        transformer = diffusers_flux(model.denoiser, DEVICE, self.attention)
        self.training = OriginalTraining(model, transformer, config, ema_of_frozen=ema_of_frozen)
        self.config, self.batch, self.num_steps = config, batch, 0
        self.generator = rank_generator(config.seed, 0)

    def step(self, ema_of_frozen: bool, recompute: bool = True) -> float:
        """One step; in stage 2 blocks are recomputed in the backward pass unless they are kept."""
        transformer = self.training.transformer
        if self.training.stage2:
            (transformer.enable_gradient_checkpointing if recompute else transformer.disable_gradient_checkpointing)()
        self.num_steps += 1
        lr = learning_rate(self.config, self.num_steps)
        with same_attention(DEVICE, self.attention):
            self.loss = self.training.step(self.batch, lr, self.generator, ema_of_frozen=ema_of_frozen)
        return self.loss

    def forget_gradients(self) -> None:
        """Those of a step that ended halfway."""
        for p in self.training.trained.values():
            p.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As `Ours.state`."""
        training = self.training
        moments = {name: training.optimizer.state[master]["exp_avg"] for name, master in training.masters.items()}
        ema = {name: training.ema[name] for name in training.trained}
        return {"weights": training.masters, "moments": moments, "ema": ema}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||found - expected|| / ||expected|| over all tensors together."""
    assert found.keys() == expected.keys()
    squares = [(float((found[n] - e).square().sum()), float(e.square().sum())) for n, e in expected.items()]
    return math.sqrt(sum(d for d, _ in squares) / sum(e for _, e in squares))


def agreement(ours: "Ours", plain: "Plain") -> dict[str, float]:
    """How far apart both lie after one step. The first moments then are the clipped gradients, times 1 - beta1."""
    return {
        "loss_difference": abs(ours.loss / plain.loss - 1),
        "norm_difference": abs(ours.report.grad_norm / float(plain.training.grad_norm) - 1),
        "gradient_error": distance(ours.state()["moments"], plain.state()["moments"]),
    }


@dataclass
class Measured:
    """Of one stage and dtype: samples of the sides that fit into memory, why others did not run, and the rest."""

    groups: list[tuple[str, ...]] = field(default_factory=list)  # sides that were timed in turn
    samples: dict[str, Samples] = field(default_factory=dict)
    peaks_gib: dict[str, float] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def interleaved(self, side: str) -> bool:
        """Whether a side was timed in turn with one that it is compared with."""
        return any(side in group and {OURS, PLAIN_TRAINED_EMA} <= set(group) for group in self.groups)


@functools.cache
def measure(stage: str, dtype: torch.dtype) -> Measured:
    """All sides in turn; where the GPU does not hold all of them at once, in smaller groups."""
    measured = Measured()
    groups = [SIDES if fewer_blocks(stage) is None else COMPARED]
    if PLAIN not in groups[0]:
        measured.failed[PLAIN] = "averages of all parameters take more than the GPU has beside the other sides"
    while groups:
        sides = groups.pop(0)
        try:
            run_sides(sides, stage, dtype, measured)
            measured.groups.append(sides)
        except torch.OutOfMemoryError as error:  # without its traceback, which would keep the models
            if sides in SMALLER_GROUPS:
                groups = [*SMALLER_GROUPS[sides], *groups]
            else:
                measured.failed |= dict.fromkeys(sides, str(error).splitlines()[0])
        free()
    return measured


def run_sides(sides: Sequence[str], stage: str, dtype: torch.dtype, measured: Measured) -> None:
    """Build what `sides` need on one set of weights, compare the first steps, and time the following ones."""
    config = train_config(stage, dtype)
    model = random_uniworld(size_of(stage), DEVICE, dtype, use_t5=False)
    batch = make_batch(model, config)
    held, calls = [allocated()], {}
    if any(side.startswith("plain") for side in sides):
        plain = Plain(model, config, batch, ema_of_frozen=PLAIN in sides)
        plain.step(ema_of_frozen=PLAIN in sides)
        calls |= {PLAIN: lambda: plain.step(True), PLAIN_TRAINED_EMA: lambda: plain.step(False)}
        calls |= {PLAIN_KEPT: lambda: plain.step(False, recompute=False)} if plain.training.stage2 else {}
    held.append(allocated())
    if OURS in sides:
        ours = Ours(model, config, batch)
        ours.step(batch)
        calls |= {OURS: lambda: ours.step(batch), PRECOMPUTED: lambda: ours.step(ours.encoded)}
        measured.counts = counts(ours)
    held.append(allocated())
    if calls.keys() >= {OURS, PLAIN}:
        measured.agreement = agreement(ours, plain)
    calls = {side: calls[side] for side in sides if side in calls}
    for side, call in tuple(calls.items()):
        try:
            measured.attention[side] = attention_kernels(call)
        except torch.OutOfMemoryError as error:  # of the activations of all blocks; the others need not go
            if side != PLAIN_KEPT:
                raise
            measured.failed[side] = str(error).splitlines()[0]
            plain.forget_gradients()
            del calls[side]
            continue
        is_plain = side.startswith("plain")
        others = held[2] - held[1] if is_plain else held[1] - held[0]
        if CUDA and side != PRECOMPUTED and not (is_plain and side != PLAIN and PLAIN in sides):
            torch.cuda.reset_peak_memory_stats()
            call()
            measured.peaks_gib[side] = (torch.cuda.max_memory_allocated() - others) / 2**30
    measured.samples |= interleave(
        {side: [call] for side, call in calls.items()}, rounds=ROUNDS, sample_s=0.0, device=DEVICE, warmup=0
    )


def counts(ours: Ours) -> dict[str, int]:
    """Parameters in all and trained, and tokens the DiT attends to."""
    trainer, ((num_img, num_txt),) = ours.trainer, sample_tokens(ours.encoded)
    num_parameters = trainer.num_parameters + sum(p.numel() for p in trainer.parts.vlm.parameters())
    return {"parameters": num_parameters, "trained": trainer.sharded.num_trained, "tokens": num_img + num_txt}


def allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0
