"""Linears of the DiT in fewer bits, and the calls of a block that know both these and plain ones.

A norm or a GELU writes e4m3 rows itself where every linear that reads them takes e4m3; else it writes the model's
dtype, and a linear in e4m3 quantizes what it is given.

Letters: B batch, L tokens, D channels, K input channels, N output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniworld.kernels import extension
from uniworld.kernels.adaln_fp8 import adaln_modulate_fp8, gate_residual_adaln_fp8
from uniworld.kernels.adaln_modulate import adaln_modulate
from uniworld.kernels.fp8_linear import fp8_linear
from uniworld.kernels.gate_residual import gate_residual_adaln
from uniworld.kernels.gelu import gelu
from uniworld.kernels.gelu_linear import gelu_linear
from uniworld.kernels.linear import linear, takes_onednn
from uniworld.kernels.quantize_rows import E4M3, QuantizedRows, quantize_rows

NF4_BLOCK = 64  # consecutive weights that share a scale

Normed = Tensor | QuantizedRows


class Fp8Linear(nn.Module):
    """A linear whose weight is e4m3 with one fp32 scale an output row; inputs are quantized by row.

    Parameters: weight [N, K] e4m3, weight_scale [N, 1] fp32, bias [N] in the model's dtype.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen((out_features, in_features), E4M3, device)
        self.weight_scale = _frozen((out_features, 1), torch.float32, device)
        self.bias = _frozen((out_features,), dtype, device)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device and keep the result."""
        rows = quantize_rows(weight)
        self.weight.copy_(rows.values)
        self.weight_scale.copy_(rows.scale)
        self.bias.copy_(bias)

    def forward(self, x: Normed) -> Tensor:
        """[..., K], or rows of it in e4m3 -> [..., N]."""
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        return fp8_linear(rows.values, rows.scale, self.weight, self.weight_scale, self.bias)


class Fp8Rows(Fp8Linear):
    """Some rows of an `Fp8Linear` as a linear of their own, without weights of its own."""

    def __init__(self, joint: Fp8Linear, start: int, stop: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = joint.in_features, stop - start
        self._rows, self._joint = slice(start, stop), (joint,)  # a tuple hides it: its weights are named once

    @property
    def weight(self) -> Tensor:
        return self._joint[0].weight[self._rows]

    @property
    def weight_scale(self) -> Tensor:
        return self._joint[0].weight_scale[self._rows]

    @property
    def bias(self) -> Tensor:
        return self._joint[0].bias[self._rows]


def joined(first: Fp8Linear, second: Fp8Linear) -> tuple[Fp8Linear, Fp8Rows, Fp8Rows]:
    """A linear with the rows of both behind each other, and each of the two as rows of it."""
    height, total = first.out_features, first.out_features + second.out_features
    joint = Fp8Linear(first.in_features, total, first.bias.dtype, first.weight.device)
    for name, parameter in joint.named_parameters():
        parameter[:height].copy_(getattr(first, name))
        parameter[height:].copy_(getattr(second, name))
    return joint, Fp8Rows(joint, 0, height), Fp8Rows(joint, height, total)


class Nf4Linear(nn.Module):
    """A linear whose weight is bitsandbytes' NF4, 64 weights to an fp32 scale; it is unpacked for every product.

    Parameters: weight [N * K / 2, 1] uint8, absmax [N * K / 64] fp32, bias [N] in the model's dtype.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        num_weights = in_features * out_features
        self.weight = _frozen((num_weights // 2, 1), torch.uint8, device)
        self.absmax = _frozen((num_weights // NF4_BLOCK,), torch.float32, device)
        self.bias = _frozen((out_features,), dtype, device)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device and keep the result."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        self.weight.copy_(packed)
        self.absmax.copy_(state.absmax)
        self.bias.copy_(bias)

    def dense_weight(self) -> Tensor:
        """[N, K] in the model's dtype."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.absmax, shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.bias.dtype)
        return dequantize_4bit(self.weight, state)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.dense_weight(), self.bias)


def _frozen(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def takes_fp8(*readers: nn.Module) -> bool:
    """Whether all of these linears take e4m3 rows."""
    return all(isinstance(reader, Fp8Linear) for reader in readers)


def adaln_for(readers: tuple[nn.Module, ...], x: Tensor, scale: Tensor, shift: Tensor) -> Normed:
    """`adaln_modulate` for the linears that read it."""
    return adaln_modulate_fp8(x, scale, shift) if takes_fp8(*readers) else adaln_modulate(x, scale, shift)


def gate_adaln_for(
    readers: tuple[nn.Module, ...], x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Normed]:
    """`gate_residual_adaln` for the linears that read its second result."""
    op = gate_residual_adaln_fp8 if takes_fp8(*readers) else gate_residual_adaln
    return op(x, y, gate, scale, shift)


def gelu_of_linear(linear: nn.Module, x: Normed) -> Tensor:
    """GELU(linear(x)), [..., K] -> [..., N]; in one op where the weight is dense. Others (e4m3, LoRA) are called."""
    if isinstance(linear, nn.Linear | Nf4Linear):
        return gelu_linear(x, dense_weight(linear), linear.bias)
    return gelu(linear(x))


def linear_of_both(attn: Tensor, mlp: nn.Module, x: Normed, out: nn.Module) -> Tensor:
    """out(cat([attn, GELU(mlp(x))], -1)): attn [B, L, D], x [B, L, D] -> [B, L, N].

    In e4m3 both parts are quantized together, as rows with one scale.
    """
    if takes_fp8(mlp):
        return linear_with_gelu(attn, mlp(x), out)
    return _linear_of_parts(attn, gelu_of_linear(mlp, x), out)


def linear_with_gelu(attn: Tensor, hidden: Tensor, out: nn.Module) -> Tensor:
    """out(cat([attn, GELU(hidden)], -1)): attn [B, L, D], hidden [B, L, G] -> [B, L, N]; both may be parts of rows."""
    if takes_fp8(out):
        return out(quantize_rows(attn, gelu_of=hidden))
    return _linear_of_parts(attn, gelu(hidden), out)


def _linear_of_parts(attn: Tensor, hidden: Tensor, out: nn.Module) -> Tensor:
    if isinstance(out, nn.Linear | Nf4Linear):
        return linear_of_pair(attn, hidden, dense_weight(out), out.bias)
    return out(torch.cat([attn, hidden], dim=-1))


def linear_of_pair(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(cat([a, b], -1))` without the copy: the second product is added into the first.

    On a CPU in bf16 without AMX the copy costs less than a second product and gradients of parts of a weight do, and
    the result is rounded once.

    a: [B, L, D_a]; b: [B, L, D_b]; weight: [N, D_a + D_b]; bias: [N] -> [B, L, N].
    """
    if takes_onednn(a, b, weight, bias) and "amx_bf16" not in extension.CPU_FEATURES:
        return linear(torch.cat([a, b], dim=-1), weight, bias)
    weight_a, weight_b = weight[:, : a.shape[-1]], weight[:, a.shape[-1] :]
    first = F.linear(a, weight_a, bias)
    return torch.addmm(first.flatten(0, 1), b.flatten(0, 1), weight_b.t()).view_as(first)


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a plain linear or of one in NF4."""
    return linear.dense_weight() if isinstance(linear, Nf4Linear) else linear.weight
