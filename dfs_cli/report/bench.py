"""The records of ``dfs bench`` and ``dfs bench-tuning`` for people.

A record is a :class:`dfs_cli.bench.inference.InferenceBench` or :class:`dfs_cli.bench.tuning.TuningBench` as a dictionary,
with the name of the ``model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dfs_cli.nn.quantization import BYTE_BITS

_HINT = "ONNX Runtime is not installed, its rows are left out: pip install 'dfs-cli[onnx]'"
_HEADER = (
    f"{'':16}{'batch':>5}{'runs':>6}{'p50 ms':>10}{'quartiles':>19}{'p95 ms':>10}{'images/s':>10}{'memory MiB':>12}"
    f"{'file MiB':>10}{'cost':>8}{'time':>7}"
)


def print_inference(console: Console, record: dict[str, Any]) -> None:
    """How it was measured, a row per candidate, and how the dynamic ones compare."""
    cores = f" on {record['cores']} cores" if record["cores"] else ""
    lines = [
        f"{record['model']}, {_joined(record['image_size'], 'x')}, options {_joined(record['options'])}, "
        f"gate {record['gate']}, {record['threads']} threads{cores}, in turns",
        f"decisions: {record['decisions']}",
        _HINT if record["graph"] is None else f"ort-dfs: {_graph(record['graph'])}",
    ]
    if any(0 < bits < BYTE_BITS for bits in record["options"]):
        lines.append("no CPU library convolves with fewer than 8 bits: options of 2 to 7 bits take as long as 8")
    lines += [_HEADER, *map(_row, record["rows"])]
    for row in record["rows"]:
        lines += _comparison(row)
    _print(console, lines)


def _graph(graph: dict[str, Any]) -> str:
    what = f"features between blocks are {graph['features']}"
    if "images" not in graph:
        return f"{what}; not compared with the network, as there are no real images"
    same = f"{what}; same decisions as the network for {graph['same_decisions']:.2%} of {graph['images']} images"
    return same if graph["holds"] else f"{same}: dfs export would refuse it"


def _row(row: dict[str, Any]) -> str:
    memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return (
        f"{row['name']:16}{row['batch']:5}{row['runs']:6}{row['p50_ms']:10.2f}{row['p25_ms']:9.2f} -{row['p75_ms']:8.2f}"
        f"{row['p95_ms']:10.2f}{row['images_per_second']:10.1f}{memory:>12}{row['file_bytes'] / 2**20:10.2f}"
        f"{row['cost']:8.4f}{row['time']:7.2f}"
    )


def _comparison(row: dict[str, Any]) -> list[str]:
    lines, name = [], f"{row['name']}, batch {row['batch']}"
    if row["controller_ms"] is not None:
        share = row["controller_ms"] / row["p50_ms"] * row["time"]
        lines.append(f"{name}: deciding takes {row['controller_ms']:.2f} ms, {share:.1%} of pytorch-dense")
    if row["name"] in ("pytorch-dfs", "ort-dfs"):
        ratios = row["speedup"].items()
        faster = (f"{ratio:.2f} x {other}{' (slower)' if ratio < 1 else ''}" for other, ratio in ratios)
        lines.append(f"{name}: {', '.join(faster)}")
    return lines


def print_tuning(console: Console, record: dict[str, Any]) -> None:
    """How it was measured, both kinds of steps, and their ratios."""
    lines = [
        f"{record['model']}, batches of {record['batch_size']} images of {_joined(record['image_size'], 'x')}, options "
        f"{_joined(record['options'])}, gate {record['gate']}, {record['device']}, {record['threads']} threads, "
        f"{record['repeats']} steps each in turns"
    ]
    for name, kind in (("fine-tuning", "dense"), ("dfs tuning", "tuning")):
        seconds, peak = record[f"{kind}_seconds"], record[f"{kind}_bytes"]
        lines.append(
            f"{name:14} {seconds['median']:8.3f} s per step (quartiles {seconds['low']:.3f} to {seconds['high']:.3f}), "
            f"{peak / 2**20:8.0f} MiB at its peak"
        )
    lines.append(f"{'ratio':14} {record['time_ratio']:8.2f} of the time, {record['memory_ratio']:.2f} of the memory")
    _print(console, lines)


def _joined(values: Sequence[int], separator: str = ",") -> str:
    return separator.join(map(str, values))


def _print(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
