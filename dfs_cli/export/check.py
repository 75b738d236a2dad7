"""Does the graph decide and answer as the network does?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.export.network import BITS, IMAGES, LOGITS, NOT_RUN
from dfs_cli.export.runtime import open_session
from dfs_cli.nn.network import DynamicResNet

LEAST_SAME_DECISIONS = 0.995
LARGEST_TOP1_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Comparison:
    """A graph beside the network that it was made from.

    Args:
        images: how many were compared.
        labelled: whether ``top1`` are shares of right answers; on random images they are shares of the network's own.
        same_decisions: share of the images with the same decision in every block.
        same_answers: share of the images with the same most likely class.
        top1, onnx_top1: percent.
        logit_difference: the largest, over the largest logit.
        features: ``bytes`` or ``floats``: what blocks hand on.
    """

    images: int
    labelled: bool
    same_decisions: float
    same_answers: float
    top1: float
    onnx_top1: float
    logit_difference: float
    features: str = "floats"

    @property
    def holds(self) -> bool:
        """Whether decisions and accuracy, or on random images answers, are those of the network, within what is promised."""
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
    policy: Sequence[int] | None = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Comparison:
    """Run both on ``batches``.

    Args:
        policy: the decisions (P * L,) that a static graph was made with.

    Raises:
        DataError: there is no image.
    """
    session = open_session(model if isinstance(model, bytes) else str(model))
    bits = np.array([*network.config.bits, NOT_RUN])
    total = same = right = onnx_right = agree = 0
    difference = largest = 0.0
    for batch in batches:
        count = len(batch.targets)
        on_batch(batch)
        if not count:
            continue
        forced = None if policy is None else torch.tensor(policy).expand(count, -1)
        output = network.run(batch.images, forced)
        expected, decisions = output.logits.numpy(), bits[output.decisions.numpy()]
        for i, image in enumerate(batch.images.numpy()):
            found = dict(
                zip([o.name for o in session.get_outputs()], session.run(None, {IMAGES: image[None]}), strict=True)
            )
            same += bool(BITS not in found or (found[BITS][0] == decisions[i]).all())
            answer, own = int(found[LOGITS].argmax()), int(expected[i].argmax())
            target = int(batch.targets[i]) if labelled else own
            agree, right, onnx_right = agree + (answer == own), right + (own == target), onnx_right + (answer == target)
            difference = max(difference, float(np.abs(found[LOGITS][0] - expected[i]).max()))
        total, largest = total + count, max(largest, float(np.abs(expected).max()))
    if not total:
        raise DataError("there is no image to compare the graph on")
    percent = 100 / total
    return Comparison(
        total,
        labelled,
        same / total,
        agree / total,
        right * percent,
        onnx_right * percent,
        difference / (largest or 1.0),
    )


def check_holds(comparison: Comparison) -> None:
    """Raises ExportError unless the graph keeps what is promised."""
    if not comparison.holds:
        raise ExportError(
            f"the graph differs from the network: same decisions for {comparison.same_decisions:.2%} of "
            f"{comparison.images} images ({LEAST_SAME_DECISIONS:.1%} needed), top-1 {comparison.onnx_top1:.2f} in place of "
            f"{comparison.top1:.2f} ({LARGEST_TOP1_DIFFERENCE} may be between them); nothing was written"
        )
