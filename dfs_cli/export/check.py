"""Comparing a graph with its network: decisions, answers, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dfs_cli.cost.decisions import Decisions
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.export.network import BITS, IMAGES, LOGITS
from dfs_cli.export.runtime import open_session
from dfs_cli.nn.network import DynamicResNet

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LEAST_SAME_DECISIONS = 0.995
"""Share of the images that must get the same decisions; on random images, also the same answer."""

LARGEST_TOP1_DIFFERENCE = 0.1
"""In points of top-1 accuracy."""

_DYNAMIC_BATCH = 32
"""Images at once where a graph takes any number; the rest of a batch is smaller."""


@dataclass(frozen=True)
class Comparison:
    """A graph beside the network that it was made from.

    Args:
        images: how many were compared.
        labelled: whether ``top1`` is accuracy; on random images the network's answers count as right.
        same_decisions: share of the images with the same decision in every block.
        same_answers: share of the images with the same most likely class.
        top1, onnx_top1: of the network and of the graph, in percent.
        logit_difference: the largest difference of a logit, divided by the largest logit.
        features: what blocks hand on, ``int8`` or ``float``.
    """

    images: int
    labelled: bool
    same_decisions: float
    same_answers: float
    top1: float
    onnx_top1: float
    logit_difference: float
    features: str = "float"

    @property
    def holds(self) -> bool:
        """Whether decisions and accuracy (on random images: decisions and answers) agree within the limits."""
        # A difference of just 0.1 point must not fail for the last digit of a floating point number.
        is_accurate = abs(self.top1 - self.onnx_top1) <= LARGEST_TOP1_DIFFERENCE + 1e-9
        is_right = is_accurate if self.labelled else self.same_answers >= LEAST_SAME_DECISIONS
        return self.same_decisions >= LEAST_SAME_DECISIONS and is_right

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def compare(
    model: Path | bytes,
    network: DynamicResNet,
    batches: Iterable[Batch],
    labelled: bool,
    decisions: Decisions | None = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Comparison:
    """Run graph and network on ``batches``, and compare the results.

    The graph sees as many images at once as it takes.

    Args:
        model: the graph's file, or the serialised graph.
        labelled: whether the batches' targets are the images' classes.
        decisions: (for one image) those of a graph that was written with them for every image.
        on_batch: called with each batch before it is compared.

    Raises:
        DataError: there is no image.
    """
    session = open_session(model if isinstance(model, bytes) else str(model))
    total = same_decisions = same_answers = right = onnx_right = 0
    difference = largest = 0.0
    for batch in batches:
        count = len(batch.targets)
        on_batch(batch)
        if not count:
            continue
        forced = None if decisions is None else Decisions.alike(decisions.options[0], count)
        output = network.run(batch.images, forced)
        expected, bits = output.logits.numpy(), output.decisions.bits(network.bits).numpy()
        results = _run(session, batch.images.numpy())
        onnx_answers, answers = results[LOGITS].argmax(axis=1), expected.argmax(axis=1)
        targets = batch.targets.numpy() if labelled else answers
        same_decisions += int((results[BITS] == bits).all(axis=1).sum()) if BITS in results else count
        same_answers += int((onnx_answers == answers).sum())
        right, onnx_right = right + int((answers == targets).sum()), onnx_right + int((onnx_answers == targets).sum())
        difference = max(difference, float(np.abs(results[LOGITS] - expected).max()))
        total, largest = total + count, max(largest, float(np.abs(expected).max()))
    if not total:
        raise DataError("there is no image to compare the graph on")
    return Comparison(
        images=total,
        labelled=labelled,
        same_decisions=same_decisions / total,
        same_answers=same_answers / total,
        top1=right * (100 / total),
        onnx_top1=onnx_right * (100 / total),
        logit_difference=difference / (largest or 1.0),
    )


def _run(session: InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    """The results of a graph for ``images`` (M, C, H, W), by name; where the last ones do not fill a batch of fixed size, the
    first ones fill it up."""
    names = [output.name for output in session.get_outputs()]
    fixed = session.get_inputs()[0].shape[0]
    size, results = fixed if isinstance(fixed, int) else _DYNAMIC_BATCH, []
    for start in range(0, len(images), size):
        given = images[start : start + size]
        if fixed == size:
            given = np.resize(given, (size, *images.shape[1:]))  # which repeats them
        results.append(session.run(None, {IMAGES: given}))
    joined = (np.concatenate(parts)[: len(images)] for parts in zip(*results, strict=True))
    return dict(zip(names, joined, strict=True))


def check_holds(comparison: Comparison) -> None:
    """Check that the graph agrees with the network.

    Raises:
        ExportError: it does not; the message says by how much.
    """
    if not comparison.holds:
        raise ExportError(
            f"the graph differs from the network: same decisions for {comparison.same_decisions:.2%} of "
            f"{comparison.images} images ({LEAST_SAME_DECISIONS:.1%} needed), same answers for {comparison.same_answers:.2%}, "
            f"top-1 {comparison.onnx_top1:.2f} instead of {comparison.top1:.2f} (a difference of {LARGEST_TOP1_DIFFERENCE} is "
            f"allowed); nothing was written"
        )
