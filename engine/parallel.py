"""Ulysses sequence parallelism (Jacobs et al., 2023): one request on several GPUs, each with a share of the tokens.

Every process holds the whole model and makes the same calls. Linears, norms and MLPs see only a process's own tokens,
image and text shared out apart; around attention an all-to-all trades tokens for heads, so that each process attends
with its heads to all tokens. Lengths need not divide by the number of processes; the number of heads must. Predictions
are gathered after every step, so that all hold the same latents, bit by bit.

Letters: P processes, B batch, S tokens of the joint sequence, s those of one process, H heads, Dh head channels.
"""

import os
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from uniworld.engine.request import Job
from uniworld.models.blocks import AttentionPlan, Rope
from uniworld.models.flux import FluxTransformer, PassPlan

DONE_ALONE = ("config", "x_embedder", "embed_txt", "modulation", "rope", "attention_backend")
PIECES = ("first_block", "remaining_blocks", "output")  # of a pass over own tokens, by a plan of `ParallelFlux.plan`


class TokenExchange:
    """Who holds which tokens of a pass, and the collectives that move them (`models.blocks.HeadExchange`)."""

    def __init__(self, group: dist.ProcessGroup, num_img: int, num_txt: int):
        """Shares are equal up to one token, in the order of the ranks."""
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if min(num_img, num_txt) < self.size:
            least = f"at least {self.size} tokens of image and of text, one for each process"
            raise ValueError(f"sequence_parallel: {num_img} image and {num_txt} text tokens, needs {least}")
        self.img, self.txt = shares(num_img, self.size), shares(num_txt, self.size)  # of each rank

    def own(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        """This process's tokens of both streams, [B, L, C] each."""
        return img[:, self.img[self.rank]], txt[:, self.txt[self.rank]]

    def scatter_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own tokens of all heads, each [B, s, H, Dh] -> all tokens of own heads [B, S, H / P, Dh], image first."""
        B, s, H, Dh = tensors[0].shape
        heads, N = H // self.size, len(tensors)
        sent = torch.stack([t.unflatten(2, (self.size, heads)) for t in tensors]).permute(3, 0, 1, 2, 4, 5)
        lengths = [_length(i) + _length(t) for i, t in zip(self.img, self.txt)]
        sizes = [N * B * length * heads * Dh for length in lengths]
        pieces = self._all_to_all(sent.flatten(), [N * B * s * heads * Dh] * self.size, sizes).split(sizes)
        pieces = [p.view(N, B, length, heads, Dh) for p, length in zip(pieces, lengths)]
        img = [p[:, :, : _length(i)] for p, i in zip(pieces, self.img)]
        txt = [p[:, :, _length(i) :] for p, i in zip(pieces, self.img)]
        return torch.cat(img + txt, dim=2).unbind(0)

    def gather_heads(self, x: Tensor) -> Tensor:
        """The way back, [B, S, H / P, Dh] -> [B, s, H, Dh]."""
        B, _, heads, Dh = x.shape
        num_img = self.img[-1].stop
        sent = [
            torch.cat([x[:, i], x[:, num_img + t.start : num_img + t.stop]], dim=1).flatten()
            for i, t in zip(self.img, self.txt)
        ]
        s = _length(self.img[self.rank]) + _length(self.txt[self.rank])
        received = self._all_to_all(torch.cat(sent), [len(piece) for piece in sent], [B * s * heads * Dh] * self.size)
        return received.view(self.size, B, s, heads, Dh).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, added up in one order: the same bits on all."""
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered.view(self.size, *x.shape).sum(0)

    def gather_img(self, x: Tensor) -> Tensor:
        """Own image tokens [B, L_own, C] -> those of all [B, L, C]."""
        longest = max(_length(i) for i in self.img)
        padded = torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])).contiguous()
        gathered = padded.new_empty(self.size * padded.shape[0], *padded.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        pieces = gathered.view(self.size, *padded.shape)
        return torch.cat([p[:, : _length(i)] for p, i in zip(pieces, self.img)], dim=1)

    def _all_to_all(self, sent: Tensor, sizes_out: list[int], sizes_in: list[int]) -> Tensor:
        received = sent.new_empty(sum(sizes_in))
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self.group)
        return received


def shares(length: int, size: int) -> list[slice]:
    """`length` tokens as `size` slices whose lengths differ by one at most."""
    return [slice(a, b) for a, b in pairwise(length * r // size for r in range(size + 1))]


def _length(part: slice) -> int:
    return part.stop - part.start


class ParallelFlux:
    """A `FluxTransformer` to the sampling loop, whose passes are shared among the processes of a group."""

    def __init__(self, model: FluxTransformer, group: dist.ProcessGroup):
        self.model, self.group = model, group
        size, num_heads = dist.get_world_size(group), model.config.num_attention_heads
        if num_heads % size:
            raise ValueError(f"sequence_parallel: {size} processes, must be a divisor of the DiT's {num_heads} heads")

    def __getattr__(self, name: str) -> Any:
        """What a request prepares once every process does alone, and pieces of a pass run on its own tokens. Nothing
        else of the model is to be had: it would run on whole tensors here."""
        if name not in DONE_ALONE + PIECES:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.model, name)

    def denoise(
        self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, txt_lengths: tuple[int, ...] | None = None
    ) -> Tensor:
        """As `FluxTransformer.denoise`, from and to whole tensors that are the same on every process."""
        plan = self.plan(img.shape[1], txt.shape[1], modulation, pe, txt_lengths)
        img, txt = plan.attention.exchange.own(img, txt)
        streams = self.model.first_block(self.model.x_embedder(img), txt, plan)
        return plan.attention.exchange.gather_img(self.model.remaining_blocks(streams, plan)[1])

    def plan(
        self, num_img: int, num_txt: int, modulation: Tensor, pe: Rope, txt_lengths: tuple[int, ...] | None = None
    ) -> PassPlan:
        """As `FluxTransformer.plan`, for this process's tokens of so many, which its `exchange` knows."""
        exchange = TokenExchange(self.group, num_img, num_txt)
        own = exchange.img[exchange.rank]
        lengths = None if txt_lengths is None else tuple(num_img + n for n in txt_lengths)
        attention = AttentionPlan(Rope(pe.cos[own], pe.sin[own]), lengths, self.attention_backend, exchange)
        return self.model.plan(_length(own), modulation, pe)._replace(attention=attention)

    def same(self, value: Any) -> Any:
        """The first process's value, on all; what is random or decided must not differ. A collective."""
        values, device = [value], self.x_embedder.weight.device
        dist.broadcast_object_list(values, group=self.group, group_src=0, device=device)
        return values[0]

    def agree_on_cancelled(self, batch: list[Job]) -> None:
        """A job that one process cancelled is cancelled on all. A collective, where a job has an `on_step`."""
        if all(job.request.on_step is None for job in batch):
            return
        flags = torch.tensor([job.cancelled for job in batch], dtype=torch.int32, device=self.x_embedder.weight.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        for job, cancelled in zip(batch, flags.tolist()):
            job.cancelled = bool(cancelled)


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0 of torchrun's, or one without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def join_launched(device: str | None = None) -> tuple[dist.ProcessGroup, str]:
    """The group of all processes that torchrun started, and this process's device: NCCL on GPUs, gloo on CPUs.

    device: "cpu" or "cuda"; None takes GPUs where there are any.

    Raises: ValueError without a launcher, or with fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        example = "torchrun --nproc-per-node 2 -m uniworld.cli edit ... --sequence-parallel"
        raise ValueError(f"sequence_parallel: start one process a GPU, for example with {example}")
    local_rank = int(os.environ["LOCAL_RANK"])
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"sequence_parallel: process {local_rank} of this machine has no GPU, torch sees "
                f"{torch.cuda.device_count()}"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(device) if on_gpu else None)
    return dist.group.WORLD, device
