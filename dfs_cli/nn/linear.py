"""The linear layer that runs at the bitwidth it is set to."""

from __future__ import annotations

from torch import Tensor, nn

from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.precision import Precision


class FractionalLinear(FractionalLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer that runs at ``precision.bits``."""

    @classmethod
    def from_module(cls, linear: nn.Linear, precision: Precision) -> FractionalLinear:
        """Adopt the parameters of ``linear`` (they are shared, not copied)."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.training = linear.training
        new._set_up(precision)
        return new

    def channel_shape(self) -> tuple[int, ...]:
        return (1, -1)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)
