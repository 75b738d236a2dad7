"""MACs of a layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dfs_cli.validation import Json, validated

Macs = Annotated[int, Field(ge=0, le=2**53)]  # sums in double precision stay exact


@validated
class LayerCost(Json):
    """One layer's MACs for one image.

    Args:
        name: module path.
        macs: multiply-accumulates.
        block: index of the residual block whose option it follows; None: it always runs.
        bits: the layer's individual bitwidth, whichever option its block has, unless skipped; None: the option's.
        first_macs: multiply-accumulates in a first pass that sees smaller images; None: as many.
    """

    name: str
    macs: Macs
    block: Annotated[int, Field(ge=0)] | None = None
    bits: Annotated[int, Field(ge=0, le=32)] | None = None
    first_macs: Macs | None = None

    def macs_in(self, is_first: bool) -> int:
        """Its MACs in the first pass, or in one that sees the full images."""
        return self.macs if self.first_macs is None or not is_first else self.first_macs
