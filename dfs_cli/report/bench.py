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
_INTERRUPTED = 0.05
"""Share of interrupted runs that is worth a word."""
_HEADER = (
    f"{'':16}{'batch':>5}{'runs':>6}{'mean ms':>10}{'of passes':>18}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'images/s':>10}"
    f"{'memory MiB':>12}{'file MiB':>10}{'cost':>8}{'time':>7}{'top-1':>8}"
)


def print_inference(console: Console, record: dict[str, Any]) -> None:
    """How it was measured, a row per candidate, and how the dynamic ones compare."""
    lines = [
        f"{record['model']}, {_joined(record['image_size'], 'x')}, options {_joined(record['options'])}, "
        f"gate {record['gate']}, {record['threads']} threads, {record['images']} images, {record['repeats']} times in turns",
        "machine: " + ", ".join(f"{name} {text}" for name, text in record["machine"].items()),
        f"decisions: {record['decisions']}",
        _HINT if record["graph"] is None else f"ort-dfs: {_graph(record['graph'])}",
    ]
    if any(0 < bits < BYTE_BITS for bits in record["options"]):
        lines.append("no CPU library convolves with fewer than 8 bits: options of 2 to 7 bits take as long as 8")
    lines += [_HEADER, *map(_row, record["rows"])]
    if (interrupted := max(row["interrupted"] for row in record["rows"])) > _INTERRUPTED:
        counted = (
            "; these count with the time that they had a core"
            if record["threads"] == 1
            else ", which makes them slower"
        )
        lines.append(f"other programs ran: of some candidates {interrupted:.0%} of the runs were interrupted{counted}")
    for row in record["rows"]:
        lines += _comparison(row)
    for verdict in record["verdicts"]:
        lines += _verdict(verdict)
    _print(console, lines)


def _graph(graph: dict[str, Any]) -> str:
    what = f"features between blocks are {graph['features']}"
    if "images" not in graph:
        return f"{what}; not compared with the network, as there are no real images"
    same = f"{what}; same decisions as the network for {graph['same_decisions']:.2%} of {graph['images']} images"
    return same if graph["holds"] else f"{same}: dfs export would refuse it"


def _row(row: dict[str, Any]) -> str:
    memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
    return (
        f"{row['name']:16}{row['batch']:5}{row['runs']:6}{row['mean_ms']:10.3f}{row['low_ms']:9.3f} -{row['high_ms']:7.3f}"
        f"{row['p50_ms']:9.3f}{row['p95_ms']:9.3f}{row['p99_ms']:9.3f}{row['images_per_second']:10.1f}{memory:>12}"
        f"{row['file_bytes'] / 2**20:10.2f}{row['cost']:8.4f}{row['time']:7.2f}{top1:>8}"
    )


def _comparison(row: dict[str, Any]) -> list[str]:
    lines, name = [], f"{row['name']}, batch {row['batch']}"
    if row["controller_ms"] is not None:
        share = row["controller_ms"] / row["mean_ms"] * row["time"]
        lines.append(f"{name}: deciding takes {row['controller_ms']:.2f} ms, {share:.1%} of pytorch-dense")
    if row["name"] in ("pytorch-dfs", "ort-dfs"):
        ratios = row["speedup"].items()
        faster = (f"{ratio:.2f} x {other}{' (slower)' if ratio < 1 else ''}" for other, ratio in ratios)
        lines.append(f"{name}: {', '.join(faster)}")
    return lines


def _verdict(verdict: dict[str, Any]) -> list[str]:
    """The network beside each of the others, then what is fastest at its top-1 and most accurate in its time."""
    name, others = verdict["name"], {pairing["name"]: pairing for pairing in verdict["pairings"]}
    batch = "" if verdict["batch"] == 1 else f"batch {verdict['batch']}: "
    lines = [_pairing(name, pairing) for pairing in verdict["pairings"]]
    if any(pairing["top1"] is not None for pairing in verdict["pairings"]):
        fastest, best = verdict["at_equal_top1"], verdict["at_equal_time"]
        if fastest is None:
            lines.append(f"time at equal top-1: nothing else here has the top-1 of {name}")
        else:
            lines.append(
                f"time at equal top-1: {fastest} takes {1 / others[fastest]['time']:.2f} of the time of {name}"
            )
        if best is None:
            lines.append(f"top-1 at equal time: nothing else here takes as little time as {name}")
        else:
            lines.append(f"top-1 at equal time: {best} has {-others[best]['top1']:+.2f} beside {name}")
    return [f"{batch}{line}" for line in lines]


def _pairing(name: str, pairing: dict[str, Any]) -> str:
    text = f"{name} takes {pairing['time']:.2f} times the time of {pairing['name']} "
    text += f"({pairing['time_low']:.2f} to {pairing['time_high']:.2f} in single passes)"
    if pairing["top1"] is not None:
        text += f", top-1 {pairing['top1']:+.2f} (standard error {pairing['top1_error']:.2f})"
    kinds = {"first": f"{name} wins", "other": f"{pairing['name']} wins", "neither": "neither wins", "equal": "a draw"}
    return f"{text}: {kinds[pairing['winner']]}"


def print_costs(console: Console, record: dict[str, Any]) -> None:
    """A cost table (:class:`dfs_cli.cost.device.DeviceCosts` as a dictionary): a row per block, then what always runs."""
    unit, dense = record["unit"], record["dense"]
    lines = [
        f"{record['model']}, {_joined(record['image_size'], 'x')}, in {unit}: dense float32 {dense:.4g}, "
        f"static int8 {record['static_int8']:.4g} ({record['static_int8'] / dense:.4f} of it)",
        "machine: " + ", ".join(f"{name} {text}" for name, text in record["machine"].items()),
        f"{'block':16}" + "".join(f"{'skip' if bits == 0 else f'{bits} bit':>10}" for bits in record["options"]),
    ]
    lines += [f"{name:16}" + "".join(f"{cost:10.4f}" for cost in row) for name, row in record["blocks"].items()]
    lines.append(f"{'always':16}{record['fixed']:10.4f}")
    for gate, passes in record["deciding"].items():
        text = "; ".join(f"{always:.4f} and {block:.4f} for each block that runs" for always, block in passes)
        lines.append(f"deciding by {gate}, in each pass: {text}")
    if record["crowding"]:
        lines.append(f"a block that runs in both passes: {record['crowding']:.1%} more in the second")
    lines.append(
        f"predicted times of graphs that were not in the fit differ from measured ones by {record['error']:.1%} at most"
    )
    _print(console, lines)


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
