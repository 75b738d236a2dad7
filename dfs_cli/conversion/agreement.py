"""Whether the network answers as the original does before it is tuned, and what is done where it does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfs_cli.conversion.setup import Setup
from dfs_cli.distributed import of_first
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.observer import MEASURING, REFITTING, Observer
from dfs_cli.records import Agreement
from dfs_cli.surgery.equalise import equalise, input_gains
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.surgery.swap import make_dynamic
from dfs_cli.tuning.sensitivity import measure_alone

LEAST_AGREEMENT = 0.95
"""Share of the images for which the network at 8 bits must answer as the original does; below it, layers are refitted."""

_HARMLESS = 0.002
"""In nats, of a single layer at 8 bits. Those of ordinary networks do a tenth of that at most."""
_NAMED = 6


class Refitted(NamedTuple):
    """The network to go on with, its agreement (None: nothing was compared), and the gains, by name of layer, with which it was
    reached."""

    network: DynamicResNet
    agreement: Agreement | None
    gains: dict[str, Tensor]


@torch.no_grad()
def ensure_agreement(
    network: DynamicResNet, setup: Setup, teacher: nn.Module, images: Tensor, observer: Observer
) -> Refitted:
    """Compare the network at 8 bits with the original, and equalise the layers to blame where they differ: of ``network`` in
    place, or of a copy.

    Outliers are what 8 bits cannot hold, so 8 bits are compared whatever the options are: fewer bits disagree more even where
    there is none. Where 8 bits are no option, a network made for the comparison stands in.

    Args:
        network: its step sizes are set.
        teacher: the original, in evaluation mode.
        images: (N, C, H, W).
    """
    if not any(0 < bits <= BYTE_BITS for bits in setup.dynamic.bits):
        return Refitted(network, None, {})
    compared = _at_8_bits(network, setup, teacher, images)
    expected = teacher(images)
    before = after = of_first(_agreement(compared, images, expected))
    gains: dict[str, Tensor] = {}
    if before < LEAST_AGREEMENT:
        harm = of_first(measure_alone(compared, setup.plan, setup.table, images, expected))
        blamed = [name for name in sorted(harm, key=lambda name: -harm[name]) if not harm[name] <= _HARMLESS]
        refitted = copy.deepcopy(compared)
        gains, after = _refit(refitted, (blamed, list(harm)), images, expected, before, observer)
        if gains and compared is network:
            network = refitted
        elif gains:
            equalise(network, gains)
            fit_steps(network, images)
        observer.note(_describe(before, after, len(images), blamed, len(gains)))
        observer.stage(MEASURING, None)
    return Refitted(network, Agreement(len(images), before, after, tuple(gains)), gains)


def _at_8_bits(network: DynamicResNet, setup: Setup, teacher: nn.Module, images: Tensor) -> DynamicResNet:
    """``network`` itself, if all of it can run at 8 bits or more; otherwise one that can."""
    dynamic = setup.dynamic
    if BYTE_BITS in dynamic.bits and dynamic.fixed_bits >= BYTE_BITS:
        return network
    dynamic = dynamic.replace(
        bits=(BYTE_BITS,), fixed_bits=max(BYTE_BITS, dynamic.fixed_bits), gate="static", mirror=False
    )
    table = plan_costs(teacher, dynamic, setup.preprocessing.input_size, setup.plan)
    stand_in = make_dynamic(teacher, dynamic, table, setup.plan).network
    fit_steps(stand_in, images)
    return stand_in


def _agreement(network: DynamicResNet, images: Tensor, expected: Tensor) -> float:
    """Share of the images for which every block at 8 bits gives the answer of the logits ``expected`` (N, classes)."""
    options = torch.full((len(images), len(network.blocks)), network.bits.index(BYTE_BITS))
    logits, _ = network.follow(images, options)
    return float((logits.argmax(dim=1) == expected.argmax(dim=1)).double().mean())


def _refit(
    network: DynamicResNet,
    attempts: Sequence[list[str]],
    images: Tensor,
    expected: Tensor,
    before: float,
    observer: Observer,
) -> tuple[dict[str, Tensor], float]:
    """Equalise one list of layers after the other, in place, until the agreement suffices.

    Returns:
        The gains of the last attempt and the agreement with them; none where that is no better than ``before``.
    """
    gains: dict[str, Tensor] = {}
    share = before
    for names in filter(None, attempts):
        observer.stage(REFITTING, None)
        gains = input_gains(network, names, images)
        equalise(network, gains)
        fit_steps(network, images)
        share = of_first(_agreement(network, images, expected))
        if share >= LEAST_AGREEMENT:
            break
    return (gains, share) if share > before else ({}, before)


def _describe(before: float, after: float, images: int, blamed: list[str], refitted: int) -> str:
    named = ", ".join(blamed[:_NAMED]) or "none alone"
    others = f" and {len(blamed) - _NAMED} others" if len(blamed) > _NAMED else ""
    result = (
        f"with {refitted} layers equalised: {after:.1%}"
        if refitted
        else "equalising them changes nothing for the better"
    )
    return (
        f"at 8 bits, before tuning, the network answers as the original does for {before:.1%} of {images} images "
        f"({LEAST_AGREEMENT:.0%} expected); layers to blame: {named}{others}; {result}"
    )
