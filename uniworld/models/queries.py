"""Learned queries: tokens at the end of the VLM's input whose states alone go to the DiT, in place of the prompt's.

Source: MetaQueries (arXiv 2504.06256). Attention is causal, so that no state of the prompt depends on the queries: the
prompt is read once and without a graph, and the queries go on from its keys and values.

Letters: B prompts, N queries, D hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from uniworld.models.vlm import VLMStates


class LearnedQueries(nn.Module):
    """`weight` [N, D], input embeddings of the frozen VLM."""

    def __init__(self, num: int, width: int):
        super().__init__()
        self.num = num
        self.weight = nn.Parameter(torch.empty(num, width))

    @classmethod
    def fresh(cls, num: int, embeddings: Tensor, seed: int) -> "LearnedQueries":
        """Gaussian queries that vary as the VLM's own `embeddings` [V, D] do, on their device and in their dtype."""
        queries = cls(num, embeddings.shape[1])
        drawn = torch.randn(queries.weight.shape, generator=torch.Generator().manual_seed(seed))
        spread = embeddings.detach().float().std().cpu()
        queries.weight = nn.Parameter((drawn * spread).to(embeddings), requires_grad=False)
        return queries

    def forward(self, states_after: Callable[[VLMStates, Tensor], Tensor], prompt: VLMStates) -> Tensor:
        """The queries' states after a prompt, [B, N, D].

        Args:
            states_after: of the VLM. It is handed over, since this module is trained and the VLM is not.
            prompt: the VLM's pass over the prompts, with its cache.
        """
        return states_after(prompt, self.weight)

    def layout(self, image_ends: Sequence[Sequence[int]]) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
        """What `layout_text` needs of queries: a mask [B, N] of ones, and a column for each picture of a prompt.

        The order of text tokens means nothing to the DiT, so picture i simply stands before query i.

        Raises: ValueError where a prompt has more pictures than there are queries.
        """
        if (most := max(map(len, image_ends))) > self.num:
            raise ValueError(f"images: {most} given, a model with {self.num} learned queries takes at most {self.num}")
        mask = torch.ones(len(image_ends), self.num, dtype=torch.int64)
        return mask, tuple(tuple(range(len(ends))) for ends in image_ends)
