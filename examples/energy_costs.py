"""A file of costs for ``dfs convert --objective``, from published energies per operation.

    python examples/energy_costs.py resnet18 energy.json

Energies of arithmetic in 45 nm at 0.9 V (Horowitz, 2014, "Computing's energy problem (and what we can do about it)", ISSCC). A
multiplication of integers scales with the square of the bitwidth; sums are 32-bit integers. Memory is left out.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import dfs_cli

MULTIPLY_8, ADD_32 = 0.2, 0.1  # pJ, integers
FLOAT_32 = 3.7 + 0.9  # pJ, a multiplication and an addition
OPTIONS = (0, 2, 3, 4, 5, 6, 8)
GATES: tuple[Literal["probe", "rnn", "ff"], ...] = ("probe", "rnn", "ff")


def picojoules(bits: int) -> float:
    """Energy of a multiply-accumulate."""
    if bits == 0:
        return 0.0
    return FLOAT_32 if bits == 32 else MULTIPLY_8 * (bits / 8) ** 2 + ADD_32


def energy_costs(model: str) -> dfs_cli.DeviceCosts:
    """The costs of a timm model, in millijoules per image."""
    module: Any = dfs_cli.load_model(model, pretrained=False)
    tables = {gate: dfs_cli.plan(module, dfs_cli.DynamicConfig(OPTIONS, gate=gate)) for gate in GATES}
    table = tables["probe"]
    always = sum(layer.macs * picojoules(layer.bits or 32) for layer in table.layers if layer.block is None)
    return dfs_cli.DeviceCosts(
        model=model,
        image_size=tuple(module.default_cfg["input_size"]),
        unit="mJ",
        measured=False,
        machine={"source": "Horowitz (2014), arithmetic in 45 nm, without memory"},
        options=OPTIONS,
        blocks={
            name: tuple(macs * picojoules(bits) * 1e-9 for bits in OPTIONS)
            for name, macs in zip(table.blocks, table.block_macs, strict=True)
        },
        fixed=always * 1e-9,
        dense=table.dense_macs * FLOAT_32 * 1e-9,
        static_int8=table.dense_macs * picojoules(8) * 1e-9,
        # Gates decide in floating point.
        deciding={
            gate: tuple((sum(macs) * FLOAT_32 * 1e-9, 0.0) for macs in planned.controller_macs)
            for gate, planned in tables.items()
        },
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(energy_costs(sys.argv[1]).to_dict(), indent=1) + "\n")
    print(f"wrote {sys.argv[2]}")
