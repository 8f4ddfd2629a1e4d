"""The MLP connectors that bring VLM and semantic-encoder states into the DiT's text stream."""

from torch import Tensor, nn

from uniworld.kernels.connector_mlp import connector_mlp


class Connector(nn.Sequential):
    """Linear, SiLU, Linear (`mlp2x_gelu` in the authors' config, but with SiLU), on the fused op.

    Parameter names are `0.weight, 0.bias, 2.weight, 2.bias`, as in the authors' checkpoints.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, hidden_features), nn.SiLU(), nn.Linear(hidden_features, out_features))

    def forward(
        self, states: Tensor, rows: Tensor | None = None, num_rows: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Project `states` [T, in] to [T, out], or scatter them to `rows` of a [num_rows, out] text sequence.

        Args:
            states: [T, in_features].
            rows: [T] int64, the row of the result that each input row goes to; negative drops it.
            num_rows: rows of the result when `out` is not given; the rows nobody writes are zero.
            out: [num_rows, out_features] sequence to write into; in place when no gradient is needed.
        """
        first, _, second = self
        return connector_mlp(
            states, first.weight, first.bias, second.weight, second.bias, rows=rows, num_rows=num_rows, out=out
        )
