"""How much memory a training needs on each GPU, before it is started, and which settings fit.

Counted are the tensors that stay (weights, what ZeRO and the EMA hold) and the largest of what comes and goes:
encoding, forward and backward pass (traced, see `memory.py`), optimizer step. `tests/test_plan.py` holds the sums to
what DeepSpeed really allocates for small models on a CPU. Not checked there, and therefore allowances: what CUDA and
NCCL take for themselves, and what the allocator loses between blocks.

Letters: P parameters of DiT and connectors, T trained ones, N GPUs, c bytes of the compute dtype.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from uniworld.checkpoint import locate
from uniworld.checkpoint.build import connector_shapes, denoiser_config, read_config
from uniworld.checkpoint.names import TOWER_PREFIX
from uniworld.checkpoint.weights import read_headers
from uniworld.config import ShardingConfig, TrainConfig
from uniworld.models.flux import FluxConfig
from uniworld.models.image_size import output_size
from uniworld.train.fingerprint import local_folder
from uniworld.train.memory import BatchShape, ModelShape, StepPeaks, trace_encoding, trace_step, trained_shapes
from uniworld.train.sharding import BUCKET_NUMEL, DTYPES, PERSISTENT_NUMEL
from uniworld.train.stages import inserts_siglip

GIB = 2**30
CONTEXT_BYTES = int(0.8 * GIB)  # CUDA context, cuBLAS and cuDNN workspaces
NCCL_BYTES = int(0.6 * GIB)  # with more than one GPU
FRAGMENTATION = 0.05  # of what comes and goes
MAX_LIVE_NUMEL = 10**9  # parameters that ZeRO 3 keeps gathered, at most: DeepSpeed's default
PREFETCH_NUMEL = 5 * 10**7  # and gathers ahead: likewise
OPTIMIZER_BYTES = {"adamw": 8, "prodigy": 16, "adamw8bit": 2}  # a trained parameter, beside its master weight

NUM_PROMPT_TOKENS = 128  # words and marks of a prompt
NUM_REFERENCES = 1  # pictures of a sample
VLM_TOKEN_PX = 28 * 28
T5_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model holds. Counts of parameters; by default those of UniWorld-V1 with the parts of FLUX.1-dev."""

    model: ModelShape = ModelShape(
        denoiser=FluxConfig(),
        denoise_projector=(3584, 12288, 4096),
        siglip_projector=(1152, 12288, 4096),
    )
    vlm: int = 8_292_166_656
    siglip: int = 413_534_448
    clip: int = 123_060_480
    t5: int = 4_762_310_656
    vae: int = 83_819_683
    num_siglip_tokens: int = 1024
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_groups: int = 32
    vae_layers: int = 2
    source: str = "published sizes of UniWorld-V1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on each GPU.

    static: what stays, by part. passing: the largest of what comes and goes, by phase of a step. allowance: what was
    not measured. host: for each GPU, what an offloaded optimizer holds in host memory. sizes, batch: what was assumed.
    """

    sizes: Sizes
    batch: BatchShape
    sharding: ShardingConfig
    gpus: int
    num_parameters: int
    num_trained: int
    static: Mapping[str, int]
    passing: Mapping[str, int]
    allowance: Mapping[str, int]
    host: int = 0

    @property
    def tensors(self) -> int:
        """The peak of all tensors."""
        return sum(self.static.values()) + max(self.passing.values())

    @property
    def total(self) -> int:
        return self.tensors + sum(self.allowance.values())


def estimate(config: TrainConfig, gpus: int, sizes: Sizes | None = None, batch: BatchShape | None = None) -> Plan:
    """The memory of a run on each of `gpus` GPUs.

    Args:
        sizes: of the model; by default read from the config's model folder, else the published ones.
        batch: by default the config's, with one reference and a prompt of 128 tokens.
    """
    sizes = sizes or sizes_of(config)
    batch = batch or batch_of(config, sizes)
    dtype = DTYPES[config.sharding.dtype]
    c, N = dtype.itemsize, gpus
    parameters = _shapes(_traced(config), sizes.model)
    P = sum(numel for numel, _ in parameters)
    T = sum(numel for numel, trained in parameters if trained)
    if T == 0:
        raise ValueError("stage: no parameter is trained")
    small = sum(numel for numel, _ in parameters if numel < PERSISTENT_NUMEL)
    zero3 = config.sharding.zero_stage == 3
    accumulates = config.sharding.accumulation_steps > 1
    sum_bytes = 4 if accumulates else c  # of a gradient that is summed over micro-batches
    bucket = min(BUCKET_NUMEL, T) * (sum_bytes if config.sharding.zero_stage == 1 else c)
    static = {
        "DiT and connectors": c * (-(-P // N) + (small if N > 1 else 0)) if zero3 else c * P,
        "frozen encoders": encoder_bytes(config, sizes),
        "fp32 master weights": 4 * T // N,
        "optimizer state": OPTIMIZER_BYTES[config.optim.name] * T // N,
        "EMA": 4 * T // N if config.ema.enabled else 0,
        "gradient buffers": bucket + sum_bytes * T // N if zero3 else _accumulated(config, T, N),
    }
    largest = c * max(numel for numel, trained in parameters if trained)
    host = _offload(config, static, largest, T, N) if config.sharding.offload_optimizer else 0
    partition = None if zero3 or host else (T, N)
    peaks = _peaks(_traced(config), sizes.model, batch, dtype, partition, zero3)
    gathered = _gathered(P - small, c, N) if zero3 else 0
    buckets = 0 if zero3 else bucket * (2 if N > 1 else 1)  # two, so that reducing one overlaps with filling the other
    passing = {
        "forward pass": peaks.forward_peak + gathered,
        "backward pass": peaks.backward_peak + gathered + buckets,
        "optimizer step": 0 if host else _step_bytes(config, T, c, N),
        "encoding": _encoding_bytes(config, sizes, batch),
    }
    allowance = {
        "CUDA and NCCL": CONTEXT_BYTES + (NCCL_BYTES if N > 1 else 0),
        "fragmentation": int(FRAGMENTATION * max(passing.values())),
    }
    return Plan(
        sizes=sizes,
        batch=batch,
        sharding=config.sharding,
        gpus=gpus,
        num_parameters=P,
        num_trained=T,
        static=static,
        passing=passing,
        allowance=allowance,
        host=host,
    )


def recommend(config: TrainConfig, gpus: int, gpu_bytes: float) -> tuple[Plan, TrainConfig] | None:
    """The cheapest change of settings that fits, of those of `candidates`; None if none does.

    Returns: the plan and the config it is for.
    """
    sizes = sizes_of(config)
    for candidate in candidates(config, gpus):
        plan = estimate(candidate, gpus, sizes)
        if plan.total <= gpu_bytes:
            return plan, candidate
    return None


def candidates(config: TrainConfig, gpus: int) -> Iterator[TrainConfig]:
    """The config as it is, then changes that save memory, in the order of what they cost in speed."""
    yield config
    bases = [config]
    if not config.data.precomputed:
        bases.append(replace(config, data=replace(config.data, precomputed=("(states)",))))
    sharding, splits = config.sharding, [config.sharding]
    if gpus > 1 and sharding.zero_stage < 3 and not sharding.offload_optimizer:
        splits.append(replace(sharding, zero_stage=3))
    if sharding.zero_stage < 3 and config.optim.name == "adamw" and not sharding.offload_optimizer:
        splits.append(replace(sharding, offload_optimizer=True))
    for split in splits:
        for base in bases:
            for blocks in ((), ("single",), ("double", "single")):
                if set(blocks) >= set(sharding.checkpoint_blocks):
                    yield replace(base, sharding=replace(split, checkpoint_blocks=blocks))


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The overrides that lead from one config to the other."""
    found = []
    if before.sharding.zero_stage != after.sharding.zero_stage:
        found.append(f"sharding.zero_stage={after.sharding.zero_stage}")
    if before.sharding.checkpoint_blocks != after.sharding.checkpoint_blocks:
        found.append(f"sharding.checkpoint_blocks=[{','.join(after.sharding.checkpoint_blocks)}]")
    if before.sharding.offload_optimizer != after.sharding.offload_optimizer:
        found.append(f"sharding.offload_optimizer={after.sharding.offload_optimizer}")
    if before.data.precomputed != after.data.precomputed:
        found.append("data.precomputed=DIR")
    return found


def sizes_of(config: TrainConfig) -> Sizes:
    """The sizes of the config's model where its files are on this machine, else the published ones."""
    model = local_folder(config.model.path)
    if model is None or not (model / "config.json").is_file():
        return Sizes()
    flux, siglip = (
        local_folder(chosen) if chosen is not None else model / name
        for name, chosen in (("flux", config.model.flux), ("siglip", config.model.siglip))
    )
    tree, published = read_config(model), Sizes()
    headers = read_headers(locate.weight_files(model))
    connectors = connector_shapes(headers, str(model))
    found = {
        "model": ModelShape(
            denoiser=FluxConfig.from_dict(denoiser_config(tree, model)),
            denoise_projector=connectors["denoise_projector"],
            siglip_projector=connectors["siglip_projector"],
        ),
        "vlm": sum(torch.Size(h.shape).numel() for k, h in headers.items() if not k.startswith(TOWER_PREFIX)),
        "source": str(model),
    }
    if siglip is not None and siglip.is_dir():
        vision = read_config(siglip)
        vision = vision.get("vision_config", vision)
        num_tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        found |= {"siglip": _count(siglip), "num_siglip_tokens": num_tokens}
    if flux is not None and (flux / "vae").is_dir():
        vae = read_config(flux / "vae")
        found |= {
            "clip": _count(flux / "text_encoder"),
            "vae": _count(flux / "vae", "diffusion_pytorch_model"),
            "vae_channels": tuple(vae["block_out_channels"]),
            "vae_groups": vae["norm_num_groups"],
            "vae_layers": vae["layers_per_block"],
        }
        if (flux / "text_encoder_2").is_dir():
            found["t5"] = _count(flux / "text_encoder_2")
    return replace(published, **found)


def batch_of(config: TrainConfig, sizes: Sizes) -> BatchShape:
    """A micro-batch of square targets."""
    height, width = output_size(1, 1, config.data.anchor_px, num_ratios=1)
    return BatchShape(
        batch_size=config.data.batch_size,
        height_px=height,
        width_px=width,
        num_vlm=NUM_PROMPT_TOKENS + NUM_REFERENCES * config.data.vlm_max_px // VLM_TOKEN_PX,
        num_siglip=NUM_REFERENCES * sizes.num_siglip_tokens if inserts_siglip(config.stage) else 0,
        num_t5=T5_TOKENS if config.model.use_t5 else 0,
    )


def encoder_bytes(config: TrainConfig, sizes: Sizes) -> int:
    """Weights of the frozen encoders; none where states are precomputed. The semantic encoder is always loaded."""
    if config.data.precomputed:
        return 0
    count = sizes.vlm + sizes.siglip + sizes.clip + sizes.vae + (sizes.t5 if config.model.use_t5 else 0)
    return count * DTYPES[config.sharding.dtype].itemsize


def _count(folder: Path, stem: str = "model") -> int:
    return sum(torch.Size(h.shape).numel() for h in read_headers(locate.weight_files(folder, stem)).values())


def _accumulated(config: TrainConfig, T: int, N: int) -> int:
    """The fp32 sums that ZeRO 1 and 2 keep from one micro-batch of a step to the next; ZeRO 1 keeps all of them."""
    if config.sharding.accumulation_steps == 1:
        return 0
    return 4 * T if config.sharding.zero_stage == 1 else 4 * T // N


def _offload(config: TrainConfig, static: dict[str, int], largest: int, T: int, N: int) -> int:
    """Take out of `static` what the optimizer keeps in host memory; the bytes that are there for each GPU.

    Those, gradients in fp32, a copy of the updated parameters, and the sums over micro-batches where there are some. On
    the GPU the largest gradient has a buffer, through which sums come back.
    """
    c = DTYPES[config.sharding.dtype].itemsize
    waiting = ["fp32 master weights", "optimizer state", *(["EMA"] if config.ema.source == "master" else [])]
    moved = sum(static.pop(name) for name in waiting)
    static["gradient buffers"] = largest
    sums = c * T // N if config.sharding.accumulation_steps > 1 else 0
    return moved + (4 + c) * T // N + sums + largest


def _gathered(numel: int, c: int, N: int) -> int:
    """Whole parameters that ZeRO 3 holds during a pass, and the buffers from which the next ones are unpacked.

    A model of fewer than `MAX_LIVE_NUMEL` parameters is whole, and nothing is fetched, once the forward pass is done.
    """
    if N == 1:
        return 0
    return c * (numel if numel <= MAX_LIVE_NUMEL else MAX_LIVE_NUMEL + PREFETCH_NUMEL)


def _step_bytes(config: TrainConfig, T: int, c: int, N: int) -> int:
    """Three forms of this rank's gradients or updated parameters, and gradients in fp32 unless they were summed so."""
    summed = config.sharding.accumulation_steps > 1 and config.sharding.zero_stage < 3
    return (3 * c + (0 if summed else 4)) * T // N


def _encoding_bytes(config: TrainConfig, sizes: Sizes, batch: BatchShape) -> int:
    if config.data.precomputed:
        return 0
    dtype = DTYPES[config.sharding.dtype]
    return _encoding_peak(sizes.vae_channels, sizes.vae_groups, sizes.vae_layers, batch, dtype)


class _GradientPartition:
    """What ZeRO 1 and 2 keep of complete gradients: this rank's share, from the first full bucket on."""

    def __init__(self, num_trained: int, gpus: int):
        self.bucket, self.share = min(BUCKET_NUMEL, num_trained), -(-num_trained // gpus)
        self.filled, self.allocated = 0, False

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        self.filled += parameter.numel()
        if self.allocated or self.filled < self.bucket:
            return None
        self.allocated = True
        return torch.empty(self.share, dtype=parameter.dtype)


def _traced(config: TrainConfig) -> TrainConfig:
    """The config with what does not change a traced step at its default, so that traces are reused."""
    default = TrainConfig()
    sharding = ShardingConfig(checkpoint_blocks=config.sharding.checkpoint_blocks)
    return replace(
        default, model=replace(default.model, lora_rank=config.model.lora_rank), stage=config.stage, sharding=sharding
    )


_shapes = cache(trained_shapes)
_encoding_peak = cache(trace_encoding)


@cache
def _peaks(
    config: TrainConfig,
    shape: ModelShape,
    batch: BatchShape,
    dtype: torch.dtype,
    partition: tuple[int, int] | None,
    zero3: bool,
) -> StepPeaks:
    """partition: arguments of `_GradientPartition`, where gradients are kept by one."""
    keep = _GradientPartition(*partition) if partition else lambda parameter: None
    return trace_step(config, shape, batch, dtype, keep, zero3=zero3)
