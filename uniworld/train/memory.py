"""Peak memory of tensors in a computation that is traced with shapes alone.

The computation runs under `FakeTensorMode`: every op is called, forward and backward, with tensors that have a shape
and no memory, so that the whole model is gone through in a second and what autograd keeps is what it really keeps.

Letters: B batch, L tokens, T tokens of one source, D channels.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uniworld.config import TrainConfig
from uniworld.kernels.registry import use_backend
from uniworld.models.conditioning import Conditioning, TextLayout, assemble
from uniworld.models.connectors import Connector
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.train.blocks import prepare_blocks
from uniworld.train.lora import add_lora
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.stages import freeze_except, patterns_of


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and their largest sum, while it is entered.

    Args:
        known: tensors that were there before and do not count, such as parameters.
    """

    def __init__(self, known: Any = ()):
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}
        for tensor in known:
            self._see(tensor, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return result

    def _see(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = num_bytes
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


class _SavesInput(torch.autograd.Function):
    """A linear layer that keeps its input for the backward pass whether or not the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            grad @ weight if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


@contextlib.contextmanager
def linears_of_zero3() -> Iterator[None]:
    """Inside, linears keep what those keep that DeepSpeed, too, puts in the place of torch's under ZeRO 3."""
    linear = F.linear

    def saving(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _SavesInput.apply(x, weight, bias, linear)

    F.linear = saving
    try:
        yield
    finally:
        F.linear = linear


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of one micro-batch; the text of every sample is `num_vlm` tokens with `num_references` pictures."""

    batch_size: int
    height_px: int
    width_px: int
    num_vlm: int
    num_siglip: int
    """Semantic tokens of a sample; 0 inserts none."""
    num_t5: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of what is trained."""

    denoiser: FluxConfig
    denoise_projector: tuple[int, int, int]
    """In, hidden, out features."""
    siglip_projector: tuple[int, int, int]


@dataclass(frozen=True)
class StepPeaks:
    """Bytes of one micro-batch on top of parameters.

    kept: what autograd holds when the loss is there. forward_peak, backward_peak: the most during each pass.
    """

    kept: int
    forward_peak: int
    backward_peak: int


class _ShapedModel(TrainModel):
    """`TrainModel` whose text layout is made from sizes, as traced tensors have no values to make it from."""

    def condition(self, batch: EncodedBatch) -> Conditioning:
        B, L = batch.vlm_states.shape[:2]
        num_siglip = 0 if batch.siglip_states is None else batch.siglip_states.shape[1]
        num_t5 = 0 if batch.t5_states is None else batch.t5_states.shape[1]
        length = L + num_siglip + num_t5
        rows = (torch.empty(B * n, dtype=torch.int64) for n in (L, num_siglip, num_t5))
        return assemble(
            TextLayout(*rows, lengths=(length,) * B, length=length),
            vlm_states=batch.vlm_states,
            denoise_projector=self.denoise_projector,
            siglip_states=batch.siglip_states,
            siglip_projector=self.siglip_projector,
            t5_states=batch.t5_states,
            pooled=batch.pooled,
        )


def shaped_model(config: TrainConfig, shape: ModelShape) -> TrainModel:
    """The model of a run, on the device of the context."""
    model = _ShapedModel(
        FluxTransformer(shape.denoiser), Connector(*shape.denoise_projector), Connector(*shape.siglip_projector)
    )
    if config.model.lora_rank is not None:
        add_lora(model.denoiser, config.model.lora_rank)
    freeze_except(model, patterns_of(config))
    return model


def trace_step(
    config: TrainConfig,
    shape: ModelShape,
    batch: BatchShape,
    dtype: torch.dtype,
    on_grad: Callable[[nn.Parameter], Tensor | None] | None = None,
    *,
    zero3: bool = False,
) -> StepPeaks:
    """Trace the loss of one micro-batch and its gradients, on our fused ops.

    Args:
        on_grad: called with each trained parameter as soon as its gradient is complete; the gradient then goes, and
            what is returned stays. None keeps gradients.
        zero3: with the linears of ZeRO 3, which keep more.
    """
    with torch.device("meta"):
        model = shaped_model(config, shape)
    model.denoiser.attention_backend = "sdpa"  # "auto" would take what suits the CPU that this runs on
    with FakeTensorMode():
        _move_from_meta(model, dtype)
        prepare_blocks(model.denoiser, config.sharding)
        encoded, latents, noise, sigma = _inputs(shape, batch, dtype)
        shares: list[Tensor | None] = []

        def complete(parameter: nn.Parameter) -> None:
            shares.append(on_grad(parameter))
            parameter.grad = None

        if on_grad is not None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(complete)
        linears = linears_of_zero3() if zero3 else contextlib.nullcontext()
        with use_backend("triton"), linears, LiveBytes([*model.parameters(), *model.buffers()]) as live:
            loss = model(encoded, latents, noise, sigma)
            kept, forward_peak = live.now, live.peak
            live.peak = live.now
            loss.backward()
        return StepPeaks(kept, forward_peak, live.peak)


def _move_from_meta(model: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors of the current `FakeTensorMode` in the place of those on meta, parameters in `dtype`.

    They are put in one by one, since peft cannot make its factors inside the mode.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def trained_shapes(config: TrainConfig, shape: ModelShape) -> list[tuple[int, bool]]:
    """(number of elements, whether it is trained) of every parameter of DiT and connectors."""
    with torch.device("meta"):
        model = shaped_model(config, shape)
    return [(p.numel(), p.requires_grad) for p in model.parameters()]


def trace_encoding(channels: tuple[int, ...], groups: int, layers: int, batch: BatchShape, dtype: torch.dtype) -> int:
    """Peak bytes of the VAE's encoder, the largest of the frozen ones by what it needs while it runs.

    Args:
        channels, groups, layers: `block_out_channels`, `norm_num_groups`, `layers_per_block` of its config.
    """
    from diffusers.models.autoencoders.vae import Encoder

    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            encoder = Encoder(
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                block_out_channels=channels,
                layers_per_block=layers,
                norm_num_groups=groups,
                out_channels=16,
            )
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad(), LiveBytes([*encoder.parameters(), *encoder.buffers()]) as live:
            encoder(torch.empty(batch.batch_size, 3, batch.height_px, batch.width_px, dtype=dtype))
        return live.peak


def _inputs(shape: ModelShape, batch: BatchShape, dtype: torch.dtype) -> tuple[EncodedBatch, Tensor, Tensor, Tensor]:
    B, config = batch.batch_size, shape.denoiser
    latent = (B, config.in_channels // 4, batch.height_px // 8, batch.width_px // 8)

    def states(num_tokens: int, width: int) -> Tensor | None:
        return torch.empty(B, num_tokens, width, dtype=dtype) if num_tokens else None

    encoded = EncodedBatch(
        vlm_states=states(batch.num_vlm, shape.denoise_projector[0]),
        attention_mask=torch.empty(B, batch.num_vlm, dtype=torch.int64),
        image_ends=((),) * B,
        siglip_states=states(batch.num_siglip, shape.siglip_projector[0]),
        t5_states=states(batch.num_t5, config.joint_attention_dim),
        pooled=torch.empty(B, config.pooled_projection_dim, dtype=dtype),
        latent_mean=torch.empty(latent),
        latent_std=torch.empty(latent),
        region_weight=torch.empty(B, 1, *latent[2:]),
    )
    return encoded, torch.empty(latent), torch.empty(latent), torch.empty(B)
