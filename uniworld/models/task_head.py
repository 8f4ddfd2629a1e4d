"""The routing head: from the VLM's state of the last "assistant" token to "answer in text" or "draw"."""

from pathlib import Path

import torch
from torch import Tensor, nn

DROPOUT = 0.3
DRAW_CLASS = 1
KEYS = ("0.weight", "0.bias", "3.weight", "3.bias")


class TaskHead(nn.Sequential):
    """Linear, SiLU, Dropout, Linear to two classes: 0 answers in text, 1 draws. Names as in `task_head_final.pt`."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__(nn.Linear(hidden_size, inner_size), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(inner_size, 2))
        self.eval()

    @classmethod
    def from_file(cls, path: Path, check_finite: bool = False) -> "TaskHead":
        """Load `task_head_final.pt`; the widths are those of its tensors.

        Raises:
            ValueError: not such a file, other keys or shapes in it, or NaN and infinity with `check_finite`.
        """
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # `torch.load` has as many ways to fail as there are broken files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: no torch file of plain tensors ({reason})") from None
        if not isinstance(weights, dict) or set(weights) != set(KEYS):
            found = sorted(weights) if isinstance(weights, dict) else type(weights).__name__
            raise ValueError(f"{path}: holds {found}, must be {list(KEYS)}")
        inner_size, hidden_size = weights["0.weight"].shape
        with torch.device("meta"):
            head = cls(hidden_size, inner_size)
        for key, parameter in head.state_dict().items():
            if weights[key].shape != parameter.shape:
                raise ValueError(f"{path}: {key} is {list(weights[key].shape)}, must be {list(parameter.shape)}")
            if check_finite and not torch.isfinite(weights[key]).all():
                raise ValueError(f"{path}: {key} holds NaN or infinite values")
        head.load_state_dict(weights, assign=True)
        return head.requires_grad_(False)

    @torch.no_grad()
    def draw_probability(self, state: Tensor) -> Tensor:
        """VLM states [..., hidden_size] -> the probability that a picture is asked for, [...] fp32."""
        logits = self(state.to(self[0].weight.device, self[0].weight.dtype))
        return logits.float().softmax(-1)[..., DRAW_CLASS]
