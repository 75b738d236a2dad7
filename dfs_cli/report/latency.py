"""The record of ``dfs bench`` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console

_HINT = "ONNX Runtime is not installed, its rows are left out: pip install 'dfs-cli[onnx]'"


def print_latency(record: dict[str, Any]) -> None:
    """A line on how it was measured, and a row per contender; see :func:`dfs_cli.latency.bench_inference`."""
    console = Console()
    cores = f" on {record['cores']} cores" if record["cores"] else ""
    lines = [
        f"{record['model']}, {'x'.join(map(str, record['image_size']))}, options "
        f"{','.join(map(str, record['options']))}, gate {record['gate']}, {record['threads']} threads{cores}, "
        "in turns",
        f"decisions: {record['decisions']}",
    ]
    lines.append(_HINT if record["graph"] is None else f"ort-dfs: {_graph(record['graph'])}")
    if any(2 <= bits <= 7 for bits in record["options"]):
        lines.append("no CPU library convolves with fewer than 8 bits: options of 2 to 7 bits take as long as 8")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    header = (
        f"{'':16}{'batch':>5}{'runs':>6}{'p50 ms':>10}{'quartiles':>19}{'p95 ms':>10}{'images/s':>10}{'memory MiB':>12}"
        f"{'file MiB':>10}{'cost':>8}{'time':>7}"
    )
    console.print(header, highlight=False, soft_wrap=True)
    for row in record["rows"]:
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        line = (
            f"{row['name']:16}{row['batch']:5}{row['runs']:6}{row['p50_ms']:10.2f}{row['p25_ms']:9.2f} -{row['p75_ms']:8.2f}"
            f"{row['p95_ms']:10.2f}{row['images_per_second']:10.1f}{memory:>12}{row['file_bytes'] / 2**20:10.2f}"
            f"{row['cost']:8.4f}{row['time']:7.2f}"
        )
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for row in record["rows"]:
        if row["gate_ms"] is not None:
            share = row["gate_ms"] / row["p50_ms"] * row["time"]
            line = f"{row['name']}, batch {row['batch']}: the gate takes {row['gate_ms']:.2f} ms, {share:.1%} of pytorch-dense"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if row["name"] in ("pytorch-dfs", "ort-dfs"):
            faster = ", ".join(
                f"{ratio:.2f} x {name}{' (slower)' if ratio < 1 else ''}" for name, ratio in row["speedup"].items()
            )
            console.print(
                f"{row['name']}, batch {row['batch']}: {faster}", highlight=False, soft_wrap=True, markup=False
            )


def _graph(graph: dict[str, Any]) -> str:
    what = f"blocks hand on {graph['features']}"
    if "images" not in graph:
        return f"{what}; not compared with the network, whose decisions are forced"
    same = f"{what}; same decisions as the network for {graph['same_decisions']:.2%} of {graph['images']} images"
    return same if graph["holds"] else f"{same}: dfs export would refuse it"
