"""The cost report and the profile: plain records, derived from cost table and evaluation."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.cost.weighting import RULE, mac_cost
from dfs_cli.errors import ConfigError
from dfs_cli.presets import FULL_BITS, BatchSize
from dfs_cli.records import Evaluation

_MACS = (
    "MACs are multiply-accumulates of convolutions and linear maps, as fvcore counts them (each counts as "
    "one), for one image at the evaluation size."
)
_INCLUDED = "The gate is included{}; so is everything else that always runs, and every pass that an image takes."


def conventions(table: CostTable) -> list[str]:
    """How costs are counted, a sentence each."""
    costs = table.device
    if costs is None:
        return [_MACS, RULE, _INCLUDED.format(", at 32 bits")]
    facts = ", ".join(f"{name} {text}" for name, text in costs.machine.items()) or "an unnamed device"
    return [
        _MACS,
        f"Costs are of {facts}, {'measured' if costs.measured else 'not measured here'}, as fractions of the dense float32 "
        f"network's {costs.dense:.4g} {costs.unit}; bit-weighted MACs stand beside them.",
        _INCLUDED.format(""),
        "A block's cost is divided among its layers by MACs, and so is that of all that always runs.",
    ]


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
    rows = [
        _row(
            layer.name,
            None if layer.block is None else table.blocks[layer.block],
            layer.macs,
            evaluation.passes,
            layer_shares(table, evaluation.choices, layer),
            table.dense_macs,
            _work(table, evaluation, layer),
        )
        for layer in table.layers
    ]
    if table.device is not None:
        _divide(table, evaluation, rows)
    macs = [sum(row) for row in table.controller_macs]
    mean_macs = sum(m * share for m, share in zip(macs, evaluation.pass_shares, strict=True))
    gate = _row("gate", None, sum(macs), mean_macs / max(1, sum(macs)), {FULL_BITS: 1.0}, table.dense_macs, mean_macs)
    gate["dense_share"] = 0.0  # the dense network has no gate
    if table.device is not None:
        shares = zip(table.controller_costs, evaluation.pass_shares, strict=True)
        gate["mean_cost"] = sum(cost * share for cost, share in shares)
    return [*rows, gate] if sum(macs) or any(table.controller_costs) else rows


def _divide(table: CostTable, evaluation: Evaluation, rows: list[LayerRow]) -> None:
    """Costs on a device are known for whole blocks, and for all that always runs: divide them among the layers by MACs."""
    choices = torch.tensor(evaluation.choices, dtype=torch.float64) / evaluation.images
    means: dict[int | None, float] = dict(enumerate((choices * table.option_costs).sum(dim=(0, 2)).tolist()))
    fixed = zip(table.fixed_layers_costs, evaluation.pass_shares, strict=True)
    means[None] = sum(cost * share for cost, share in fixed)
    macs: dict[int | None, int] = {}
    for layer in table.layers:
        macs[layer.block] = macs.get(layer.block, 0) + layer.macs
    for layer, row in zip(table.layers, rows, strict=True):
        row["mean_cost"] = means[layer.block] * layer.macs / (macs[layer.block] or 1)


def _work(table: CostTable, evaluation: Evaluation, layer: LayerCost) -> float:
    """Bit-weighted multiply-accumulates of an image in a layer, in the mean: a first pass may see smaller images."""
    total = 0.0
    for index, share in enumerate(evaluation.pass_shares):
        shares = layer_shares(table, evaluation.choices[index : index + 1], layer) if share else {}
        total += share * layer.macs_in(index == 0) * sum(part * mac_cost(bits) for bits, part in shares.items())
    return total


def layer_shares(table: CostTable, choices: Sequence[Sequence[Sequence[int]]], layer: LayerCost) -> dict[int, float]:
    """The share of a layer's runs, over all images and passes, at each bitwidth; at 0, runs in which its block is skipped.

    Args:
        choices: (P, L, K), see :class:`dfs_cli.records.Evaluation`.
    """
    if layer.block is None:
        return {layer.bits or FULL_BITS: 1.0}
    totals = [sum(counts) for counts in zip(*(blocks[layer.block] for blocks in choices), strict=True)]
    shares = {bits: n / sum(totals) for bits, n in zip(table.options, totals, strict=True)}
    if layer.bits is None:
        return shares
    skipped = shares.get(0, 0.0)
    return ({0: skipped} if skipped else {}) | ({layer.bits or FULL_BITS: 1 - skipped} if skipped < 1 else {})


def _row(
    name: str,
    block: str | None,
    macs: int,
    runs: float,
    histogram: dict[int, float],
    dense: int,
    bitweighted: float,
) -> LayerRow:
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


def bitweighted_gmacs(table: CostTable, evaluation: Evaluation) -> float:
    """Bit-weighted multiply-accumulates of an image, in the mean, whatever costs count."""
    return sum(row["mean_bitweighted_macs"] for row in layer_rows(table, evaluation)) / 1e9


def dynamics_record(evaluation: Evaluation) -> dict[str, Any]:
    """How dynamic the network is, for reports and ``--json``."""
    return {"passes": evaluation.passes, **evaluation.dynamics.to_dict()}


def agreement_text(agreement: dict[str, Any] | None) -> str:
    """How often the network at 8 bits, before tuning, answered as the original does, and what was done about it."""
    if agreement is None:
        return "not compared: no option of 8 bits or fewer"
    text = f"same answer as the original for {agreement['after']:.1%} of {agreement['images']} images, at 8 bits before tuning"
    if count := len(agreement["refitted"]):
        text += f" ({agreement['before']:.1%} before {count} layers were refitted)"
    return text


def block_shares(table: CostTable, evaluation: Evaluation) -> list[dict[int, float]]:
    """For each block (L), how often each bitwidth was chosen, over all images and passes; where layers have individual
    bitwidths, over the block's layers, too."""
    layers = [layer for layer in table.layers if layer.block is not None]
    blocks = []
    for block in range(len(table.blocks)):
        rows = [layer_shares(table, evaluation.choices, layer) for layer in layers if layer.block == block]
        blocks.append({bits: sum(row.get(bits, 0.0) for row in rows) / len(rows) for bits in table.options})
    return blocks


def option_shares(table: CostTable, evaluation: Evaluation) -> dict[int, float]:
    """How often each bitwidth was chosen, over all images, passes and blocks."""
    blocks = block_shares(table, evaluation)
    return {bits: sum(row[bits] for row in blocks) / len(blocks) for bits in table.options}


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
        "source": manifest.source.to_dict(),
        "budget": manifest.budget,
        "unit": table.unit,
        "scale": table.scale,
        "device": device_record(table),
        "spend": manifest.spend,
        "keeps_budget": manifest.keeps_budget,
        "agreement": manifest.agreement.to_dict() if manifest.agreement else None,
        "held_out": manifest.held_out.to_dict() if manifest.held_out else None,
        "operating_point": manifest.operating_point,
        "conventions": conventions(table),
        "data_free": evaluation.is_synthetic,
        "bound": manifest.bound,
        "limit": manifest.limit,
        "keeps_limit": manifest.keeps_limit,
        "top1_before": manifest.source.top1,
        "top1_after": None if evaluation.is_synthetic else evaluation.top1,
        "top5_before": manifest.source.top5,
        "top5_after": None if evaluation.is_synthetic else evaluation.top5,
        "same_answers": evaluation.top1 if evaluation.is_synthetic else None,
        "images": evaluation.images,
        "cost": evaluation.cost,
        "cost_p50": evaluation.cost_p50,
        "cost_p95": evaluation.cost_p95,
        "cost_max": evaluation.cost_max,
        "cost_all_8_bit": table.uniform_cost(8),
        "cost_always": table.always,
        "reachable_budgets": list(manifest.movable or (table.cheapest, table.dearest)),
        "gmacs_dense": table.dense_macs / 1e9,
        "gmacs_bitweighted": bitweighted_gmacs(table, evaluation),
        "option_shares": option_shares(table, evaluation),
        "dynamics": dynamics_record(evaluation),
        "layers": layer_rows(table, evaluation),
        "not_counted": table.not_counted,
        "unreadable_images": list(evaluation.unreadable),
        "configuration": manifest.configuration.to_dict() if manifest.configuration else None,
    }


def device_record(table: CostTable) -> dict[str, Any] | None:
    """The device that costs are of, without the costs of its blocks; None where MACs count."""
    if table.device is None:
        return None
    known = ("unit", "measured", "machine", "dense", "static_int8", "error")
    return {name: value for name, value in table.device.to_dict().items() if name in known}


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
        "limit": manifest.limit,
        "scale": table.scale,
        "keeps_budget": manifest.keeps_budget,
        "keeps_limit": manifest.keeps_limit,
        "cost_all_8_bit": table.uniform_cost(8),
        "gmacs_dense": table.dense_macs / 1e9,
        "gmacs_bitweighted": bitweighted_gmacs(table, evaluation),
        "param_count": param_count,
        "img_size": preprocessing.input_size[-1],
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "images_per_second": evaluation.images_per_second,
        "option_shares": option_shares(table, evaluation),
        "dynamics": dynamics_record(evaluation),
        "agreement": manifest.agreement.to_dict() if manifest.agreement else None,
        "unreadable": list(evaluation.unreadable),
    }


def profile_record(manifest: Manifest, evaluation: Evaluation) -> dict[str, Any]:
    """What ``dfs profile --json`` prints."""
    return {
        "model": manifest.architecture,
        "images": evaluation.images,
        "data_free": evaluation.is_synthetic,
        "top1": None if evaluation.is_synthetic else evaluation.top1,
        "cost": evaluation.cost,
        "budget": manifest.budget,
        "options": list(manifest.table.options),
        "dynamics": dynamics_record(evaluation),
        "layers": layer_rows(manifest.table, evaluation),
    }


def layers_csv(table: CostTable, evaluation: Evaluation) -> str:
    """A row per layer: MACs, runs, share of each bitwidth, mean bits and mean cost."""
    rows = layer_rows(table, evaluation)
    bits = sorted({b for row in rows for b in row["histogram"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "block", "macs", "runs", *(f"bits_{b}" for b in bits), "mean_bits", "mean_cost"])
    for row in rows:
        shares = [row["histogram"].get(b, 0.0) for b in bits]
        writer.writerow(
            [row["name"], row["block"], row["macs"], row["runs"], *shares, row["mean_bits"], row["mean_cost"]]
        )
    return text.getvalue()


def plan_record(name: str, table: CostTable, budget: float) -> dict[str, Any]:
    """What ``dfs convert --dry-run --json`` prints."""
    return {
        "model": name,
        "budget": budget,
        "unit": table.unit,
        "device": device_record(table),
        "dense_macs": table.dense_macs,
        "reachable_budgets": [table.cheapest, table.dearest],
        "cost_all_8_bit": table.uniform_cost(8),
        "fixed_layers_cost": table.fixed_layers_costs[-1],
        "gate_cost": sum(table.controller_costs),
        "options": list(table.options),
        "blocks": [
            {"name": block, "macs": macs, "costs": costs}
            for block, macs, costs in zip(table.blocks, table.block_macs, table.option_costs[-1].tolist(), strict=True)
        ],
    }


def export_record(
    path: Path, static: bool, tensorrt: bool, batch: BatchSize, comparison: dict[str, Any]
) -> dict[str, Any]:
    """What ``dfs export --json`` prints."""
    kind = {"onnx": str(path), "static": static, "tensorrt": tensorrt, "batch": batch}
    return kind | {"bytes": path.stat().st_size} | comparison
