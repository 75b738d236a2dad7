"""What inference costs on the clock: dense and dynamic, in PyTorch and in ONNX Runtime, measured in turns within one run."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.artifact.packing import packed_tensors
from dfs_cli.bench import bytes_of, on_threads, peak_bytes, size_of
from dfs_cli.config import LARGE_BATCH
from dfs_cli.errors import ConfigError
from dfs_cli.export.runtime import has_onnx
from dfs_cli.latency.subject import Subject
from dfs_cli.nn.gate import Gate
from dfs_cli.process import added_memory
from dfs_cli.surgery.folding import fold_norms

DENSE_OF = {"pytorch-dfs": "pytorch-dense", "ort-dfs": "ort-fp32", "ort-int8-static": "ort-fp32"}

_WARM_UP = 3
_LARGE_EVERY = 4  # one large batch for so many single images: it takes so much longer
# Seconds for which whoever's turn it is runs untimed: cores wake up, the threads of the one before, which go on waiting busily
# for some 15 ms, come to rest, and the caches hold its own weights.
_SETTLING = 0.03

Step = Callable[[Tensor], object]


class ObservedGate(nn.Module):
    """A gate that takes note of the ``seconds`` that pooling and scoring take and, given ``policies`` (N, L), decides so after
    all its work."""

    def __init__(self, gate: nn.Module, policies: Tensor | None) -> None:
        super().__init__()
        self.gate, self.policies = gate, policies
        self.seconds = 0.0

    def start(self, images: int, like: Tensor) -> Any:
        """See :meth:`dfs_cli.nn.gate.Gate.start`."""
        return cast(Gate, self.gate).start(images, like)

    def pool(self, *given: Any) -> Any:
        """See :meth:`dfs_cli.nn.gate.Gate.pool`."""
        began = time.perf_counter()
        result = cast(Gate, self.gate).pool(*given)
        self.seconds += time.perf_counter() - began
        return result

    def forward(self, *given: Any) -> Any:
        began = time.perf_counter()
        result = self.gate(*given)
        self.seconds += time.perf_counter() - began
        if self.policies is None:
            return result
        scores, state = result
        return nn.functional.one_hot(self.policies[: len(scores), given[0]], scores.shape[1]).to(scores.dtype), state


class Contender(NamedTuple):
    """One way to run the network.

    Args:
        name: of its row.
        batch: images per run.
        build: makes what runs; it is called once.
        size: bytes of its file.
        cost: mean cost of an image, as a fraction of the dense network's.
    """

    name: str
    batch: int
    build: Callable[[], Step]
    size: int
    cost: float


@torch.inference_mode()
def bench_inference(
    subject: Subject,
    threads: int,
    repeats: int = 50,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Time all contenders, in turns.

    Args:
        threads: for PyTorch and for ONNX Runtime; the process keeps to as many cores.
        repeats: rounds; in each, every contender for single images runs once, those for batches of 64 in every fourth.

    Returns:
        ``rows``, and how they were measured; times in milliseconds per run.
    """
    if repeats < 1:
        raise ConfigError(f"repeats {repeats} is below 1")
    with on_threads(threads) as cores:
        contenders, graph = list_contenders(subject, threads)
        steps, memory = [], []
        for contender in contenders:
            step, peak = _prepare(subject, contender)
            steps.append(step)
            memory.append(peak)
        runs = _in_turns(subject, contenders, steps, repeats, on_round)
    rows = [_row(*found) for found in zip(contenders, runs, memory, strict=True)]
    _compare(rows)
    return {
        "rows": rows,
        "threads": threads,
        "cores": cores,
        "repeats": repeats,
        "onnxruntime": has_onnx(),
        "options": list(subject.network.config.bits),
        "gate": subject.network.config.gate,
        "image_size": list(subject.images.shape[1:]),
        "images": len(subject.images),
        "decisions": subject.decisions,
        "graph": graph,
    }


def list_contenders(subject: Subject, threads: int) -> tuple[list[Contender], dict[str, Any] | None]:
    """Everything that can run here: without ONNX Runtime, PyTorch alone. With it, what the graph is like, too: what blocks hand
    on, and, where it was compared with the network, the comparison."""
    graph = None
    dense, network = subject.dense.eval(), subject.network
    weights = bytes_of(dense.state_dict().values())
    size = subject.file_size
    if size is None:
        size = bytes_of(packed_tensors(network).values())
    cost = float(subject.table.cost(network.run(subject.images).decisions).mean())

    def dynamic(policies: Tensor | None) -> Step:
        model = fold_norms(copy.deepcopy(network))
        model.gate = ObservedGate(model.gate, policies)  # type: ignore[assignment]
        return model

    found = [
        Contender("pytorch-dense", n, functools.partial(copy.deepcopy, dense), weights, 1.0) for n in (1, LARGE_BATCH)
    ]
    found.append(Contender("pytorch-dfs", 1, functools.partial(dynamic, None), size, cost))
    policies = subject.policies
    large_cost = cost if policies is None else float(subject.table.cost(policies).mean())
    found.append(Contender("pytorch-dfs", LARGE_BATCH, functools.partial(dynamic, policies), size, large_cost))
    if has_onnx():
        from dfs_cli.export.baselines import export_dense, quantize_dense
        from dfs_cli.export.network import IMAGES, LOGITS
        from dfs_cli.export.runtime import open_session

        shape = (int(subject.images.shape[1]), int(subject.images.shape[2]), int(subject.images.shape[3]))
        plain = export_dense(dense, shape)
        own, graph = _own_graph(subject, shape)
        models = {
            "ort-fp32": (plain, 1.0),
            "ort-int8-static": (quantize_dense(plain, subject.images), subject.table.uniform_cost(8)),
            "ort-dfs": (own, cost),
        }

        def opened(model: bytes) -> Step:
            session = open_session(model, threads, spin=True)
            return lambda images: session.run([LOGITS], {IMAGES: images.numpy()})

        found += [
            Contender(name, 1, functools.partial(opened, model), len(model), share)
            for name, (model, share) in models.items()
        ]
    return found, graph


def _own_graph(subject: Subject, shape: tuple[int, int, int]) -> tuple[bytes, dict[str, Any]]:
    """The dynamic network's graph as ``dfs export`` writes it; forced decisions are no matter of comparison."""
    from dfs_cli.export.network import Parts
    from dfs_cli.export.write import SCALE_IMAGES, make_graph, serialise

    if subject.known is not None:
        content, comparison = make_graph(subject.network, shape, [subject.known], labelled=True)
        return content, comparison.to_dict() | {"holds": comparison.holds}
    parts = Parts(subject.network, shape, subject.images[:SCALE_IMAGES].numpy())
    return serialise(parts, None), {"features": parts.features}


def _images(subject: Subject, contender: Contender, turn: int) -> Tensor:
    """The images of a turn: the same for all contenders of a batch size."""
    total = len(subject.images)
    if contender.batch == 1:
        return subject.images[turn % total : turn % total + 1]
    return subject.images[[(turn * contender.batch + i) % total for i in range(contender.batch)]]


def _prepare(subject: Subject, contender: Contender) -> tuple[Step, int | None]:
    """What runs, and the most bytes that it holds at a time: PyTorch counts them, of ONNX Runtime the process's growth is
    taken."""
    images = _images(subject, contender, 0)
    if not contender.name.startswith("pytorch"):
        return added_memory(contender.build, lambda step: step(images))
    model = contender.build()
    assert isinstance(model, nn.Module)
    model(images)
    return model, size_of(model) + peak_bytes(lambda: model(images), torch.device("cpu"))


def _in_turns(
    subject: Subject,
    contenders: Sequence[Contender],
    steps: Sequence[Step],
    repeats: int,
    on_round: Callable[[int], None],
) -> list[list[tuple[float, float]]]:
    """Milliseconds of every run, and of the gate in it where it is observed, per contender."""
    runs: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for turn in range(_WARM_UP + repeats):
        for contender, step, found in zip(contenders, steps, runs, strict=True):
            if contender.batch > 1 and (turn < _WARM_UP or (turn - _WARM_UP) % _LARGE_EVERY):
                continue
            images = _images(subject, contender, turn)
            began = time.perf_counter()
            while time.perf_counter() - began < _SETTLING:
                step(images)
            before, began = _gate_seconds(step), time.perf_counter()
            step(images)
            spent = time.perf_counter() - began
            if turn >= _WARM_UP:
                found.append((1000 * spent, 1000 * (_gate_seconds(step) - before)))
        on_round(1)
    return runs


def _gate_seconds(step: Step) -> float:
    gate = getattr(step, "gate", None)
    return gate.seconds if isinstance(gate, ObservedGate) else 0.0


def _row(contender: Contender, runs: list[tuple[float, float]], peak: int | None) -> dict[str, Any]:
    values, gate = zip(*runs, strict=True)
    percentiles = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return {
        "name": contender.name,
        "batch": contender.batch,
        "p50_ms": statistics.median(values),
        "p25_ms": percentiles[24],
        "p75_ms": percentiles[74],
        "p95_ms": percentiles[94],
        # A mean: there may be images that no gate looks at, too many for a median.
        "gate_ms": statistics.fmean(gate) if any(gate) else None,
        "runs": len(values),
        "images_per_second": 1000 * contender.batch / statistics.median(values),
        "peak_bytes": peak,
        "file_bytes": contender.size,
        "cost": contender.cost,
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row how many times as many images per second it does as the others of its batch size, and its share of
    the dense network's time."""
    for row in rows:
        others = [other for other in rows if other["batch"] == row["batch"] and other is not row]
        row["speedup"] = {other["name"]: other["p50_ms"] / row["p50_ms"] for other in others}
        dense = row["speedup"].get(DENSE_OF.get(row["name"], ""))
        row["time"] = 1.0 if dense is None else 1 / dense
