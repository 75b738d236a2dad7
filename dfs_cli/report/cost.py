"""The cost report and the profile: plain records, derived from cost table and evaluation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypedDict

from dfs_cli.artifact.manifest import Evaluation, Manifest
from dfs_cli.config import FULL_BITS
from dfs_cli.cost.table import CostTable, relative_cost
from dfs_cli.errors import ConfigError

CONVENTIONS = (
    "MACs are multiply-accumulates of convolutions and linear maps, as fvcore counts them (one multiply-accumulate counts "
    "one), for one image at the evaluation size.",
    "A b-bit MAC costs (b/32)^2 of a 32-bit one; costs are fractions of the dense 32-bit network's MACs.",
    "The gate is included, at 32 bits; so is everything else that always runs, and every pass that an image takes.",
)


class LayerRow(TypedDict):
    """One layer: ``histogram`` maps bitwidths to shares of its runs, of which an image has one per pass.

    ``macs`` are those of one run, ``mean_cost`` that of all runs of an image as a fraction of the dense network's.
    """

    name: str
    block: str | None
    macs: int
    dense_share: float
    runs: float
    histogram: dict[int, float]
    mean_bits: float
    mean_bitweighted_macs: float
    mean_cost: float


def layer_rows(table: CostTable, evaluation: Evaluation) -> list[LayerRow]:
    """A row per layer, in the order of the network, and one for the gate."""
    rows = []
    for layer in table.layers:
        if layer.block is None:
            assert layer.bits is not None
            histogram = {layer.bits: 1.0}
        else:
            counts = evaluation.choices[layer.block]
            histogram = {b: n / sum(counts) for b, n in zip(table.options, counts, strict=True)}
        block = None if layer.block is None else table.blocks[layer.block]
        rows.append(_row(layer.name, block, layer.macs, evaluation.passes, histogram, table.dense_macs))
    gate_runs = evaluation.passes - (table.passes - 1)
    gate = _row("gate", None, sum(table.gate_macs), gate_runs, {FULL_BITS: 1.0}, table.dense_macs)
    gate["dense_share"] = 0.0  # the dense network has no gate
    return [*rows, gate]


def _row(name: str, block: str | None, macs: int, runs: float, histogram: dict[int, float], dense: int) -> LayerRow:
    bitweighted = macs * runs * sum(share * relative_cost(bits) for bits, share in histogram.items())
    return LayerRow(
        name=name,
        block=block,
        macs=macs,
        dense_share=macs / dense,
        runs=runs,
        histogram=histogram,
        mean_bits=sum(share * bits for bits, share in histogram.items()),
        mean_bitweighted_macs=bitweighted,
        mean_cost=bitweighted / dense,
    )


def dynamics_record(evaluation: Evaluation) -> dict[str, Any]:
    """How dynamic the network is, for reports and ``--json``."""
    return {"passes": evaluation.passes, **asdict(evaluation.dynamics)}


def option_shares(table: CostTable, evaluation: Evaluation) -> dict[int, float]:
    """How often each option was chosen, over all images, blocks and passes."""
    totals = [sum(column) for column in zip(*evaluation.choices, strict=True)]
    return {b: n / sum(totals) for b, n in zip(table.options, totals, strict=True)}


def cost_report(manifest: Manifest) -> dict[str, Any]:
    """The cost report of a converted and evaluated network, ready for JSON.

    Raises:
        ConfigError: the network was never evaluated.
    """
    table, evaluation = manifest.table, manifest.validation
    if evaluation is None:
        raise ConfigError("the network was never evaluated: there is nothing to report")
    return {
        "model": manifest.architecture,
        "source": manifest.source,
        "budget": manifest.budget,
        "operating_point": manifest.operating_point,
        "conventions": list(CONVENTIONS),
        "top1_before": manifest.source.get("top1"),
        "top1_after": evaluation.top1,
        "top5_before": manifest.source.get("top5"),
        "top5_after": evaluation.top5,
        "images": evaluation.images,
        "cost": evaluation.cost,
        "cost_p50": evaluation.cost_p50,
        "cost_p95": evaluation.cost_p95,
        "cost_max": evaluation.cost_max,
        "cost_all_8_bit": table.uniform_cost(8),
        "cost_always": table.fixed,
        "reachable_budgets": [table.cheapest, table.dearest],
        "gmacs_dense": table.dense_macs / 1e9,
        "gmacs_bitweighted": table.dense_macs * evaluation.cost / 1e9,
        "option_shares": option_shares(table, evaluation),
        "dynamics": dynamics_record(evaluation),
        "layers": layer_rows(table, evaluation),
        "not_counted": table.not_counted,
        "unreadable_images": list(evaluation.unreadable),
        "configuration": manifest.configuration,
    }


def evaluation_record(manifest: Manifest, evaluation: Evaluation, param_count: float) -> dict[str, Any]:
    """What ``dfs eval --json`` prints; keys as in timm's validation script where it has them."""
    table, preprocessing = manifest.table, manifest.preprocessing
    return {
        "model": manifest.architecture,
        "images": evaluation.images,
        "top1": round(evaluation.top1, 4),
        "top5": round(evaluation.top5, 4),
        "cost": evaluation.cost,
        "cost_p50": evaluation.cost_p50,
        "cost_p95": evaluation.cost_p95,
        "cost_max": evaluation.cost_max,
        "budget": manifest.budget,
        "cost_all_8_bit": table.uniform_cost(8),
        "gmacs_dense": table.dense_macs / 1e9,
        "gmacs_bitweighted": table.dense_macs * evaluation.cost / 1e9,
        "param_count": param_count,
        "img_size": preprocessing.input_size[-1],
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "images_per_second": evaluation.images_per_second,
        "option_shares": option_shares(table, evaluation),
        "dynamics": dynamics_record(evaluation),
        "unreadable": list(evaluation.unreadable),
    }
