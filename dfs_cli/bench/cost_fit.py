"""Costs of parts from times of whole graphs: a call of the runtime costs as much as a small block, so that the parts' own times
would say little about the whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from dfs_cli.cost.decisions import Decisions


class BlockCosts:
    """Costs of each option of each block, fitted to times of whole networks.

    Blocks of the same kind cost the same. Skipping costs nothing: what runs all the same, as a shortcut, is part of ``fixed``.

    Args:
        kinds: (L,), of each block.
        options: the K bitwidths; the first one is 0.
    """

    def __init__(self, kinds: Sequence[Hashable], options: Sequence[int]) -> None:
        order = list(dict.fromkeys(kinds))
        self.kinds, self.options = [order.index(kind) for kind in kinds], len(options)
        self.bits = tuple(options)
        self.unknowns = 1 + len(order) * (self.options - 1)
        self.costs = np.zeros(self.unknowns)

    def draw(self, policies: int, seed: int) -> Tensor:
        """Policies (N, L) that tell options and kinds of blocks apart: every option for all blocks, then drawn ones, from
        mostly skipped to mostly run."""
        uniform = torch.arange(self.options)[:, None].expand(-1, len(self.kinds))
        generator = torch.Generator().manual_seed(seed)
        count = max(0, policies - self.options)
        drawn = torch.randint(1, self.options, (count, len(self.kinds)), generator=generator)
        share = 0.2 + 0.8 * torch.rand(count, 1, generator=generator)
        runs = torch.rand(count, len(self.kinds), generator=generator) < share
        return torch.cat([uniform, drawn * runs])[:policies]

    def fit(self, policies: Tensor, seconds: Sequence[float]) -> None:
        """Fit to the times of static networks of one pass, by non-negative least squares of relative errors.

        Args:
            policies: (N, L), option indices.
            seconds: (N,).
        """
        self.costs = fit_non_negative(self._rows(policies), np.asarray(seconds))

    def narrowed(self, options: Sequence[int]) -> BlockCosts:
        """The costs of some of the options, the first one among them."""
        columns = [self.bits.index(bits) - 1 for bits in options[1:]]
        made = BlockCosts(self.kinds, options)
        per_kind = self.costs[1:].reshape(-1, self.options - 1)
        made.costs = np.concatenate([self.costs[:1], per_kind[:, columns].ravel()])
        return made

    @property
    def fixed(self) -> float:
        """Seconds that a pass takes in any case."""
        return float(self.costs[0])

    def of_blocks(self) -> list[list[float]]:
        """Seconds of each option of each block, (L, K)."""
        per_kind = self.costs[1:].reshape(-1, self.options - 1)
        return [[0.0, *per_kind[kind].tolist()] for kind in self.kinds]

    def predict(self, decisions: Decisions) -> np.ndarray:
        """Seconds (N, P) of each pass, without deciding; 0 where it is not run."""
        columns = [self._rows(decisions.in_pass(i).clamp_min(0)) @ self.costs for i in range(decisions.passes)]
        seconds: np.ndarray = np.stack(columns, axis=1) * decisions.ran.numpy()
        return seconds

    def _rows(self, policies: Tensor) -> np.ndarray:
        """How often each unknown occurs in each policy, (N, unknowns)."""
        rows = np.zeros((len(policies), self.unknowns))
        rows[:, 0] = 1
        for block, kind in enumerate(self.kinds):
            for n, option in enumerate(policies[:, block].tolist()):
                if option:
                    rows[n, 1 + kind * (self.options - 1) + option - 1] += 1
        return rows


class Deciding:
    """What graphs that decide take besides what their blocks do, fitted to times of whole networks.

    Deciding takes some time in each pass, in any case and for each block that runs: a gate pools what such a block hands on,
    and the runtime cannot join it with its neighbours. A block that runs in both passes takes longer in the second one, see
    :class:`dfs_cli.cost.device.DeviceCosts`.

    Args:
        costs: of the blocks.
        decisions: what each graph decided.
        seconds: (N,), that it took.
    """

    def __init__(self, costs: BlockCosts, decisions: Decisions, seconds: Sequence[float]) -> None:
        self._costs = costs
        of_blocks = costs.predict(decisions).sum(axis=1)
        self._found = fit_non_negative(self._rows(decisions), np.asarray(seconds), of_blocks)

    @property
    def passes(self) -> list[tuple[float, float]]:
        """Seconds of deciding in each pass: in any case, and for each block that runs."""
        found = self._found[:-1].reshape(-1, 2)
        return [(float(always), float(per_block)) for always, per_block in found]

    @property
    def crowding(self) -> float:
        """By which share a block takes longer in the second pass where it ran in the first one."""
        return float(self._found[-1])

    def predict(self, decisions: Decisions) -> np.ndarray:
        """Seconds (N,) of whole graphs."""
        seconds: np.ndarray = self._costs.predict(decisions).sum(axis=1) + self._rows(decisions) @ self._found
        return seconds

    def _rows(self, decisions: Decisions) -> np.ndarray:
        """For each pass, whether it is run and how many of its blocks run, and the seconds of the second pass's blocks that ran
        in the first one: (N, 2 * P + 1)."""
        running = decisions.options > 0
        again = np.zeros(len(running))
        if decisions.passes > 1:
            both = running.all(dim=1)
            options = decisions.in_pass(1).clamp_min(0)
            seconds = torch.tensor(self._costs.of_blocks(), dtype=torch.float64)
            again = (seconds.gather(1, options.T).T * both).sum(dim=1).numpy()
        counts = torch.stack([decisions.ran, running.sum(dim=2)], dim=2).flatten(1).double().numpy()
        return np.column_stack([counts, again])


def fit_non_negative(rows: np.ndarray, seconds: np.ndarray, known: np.ndarray | float = 0.0) -> np.ndarray:
    """Costs (U,), none negative, whose sums by ``rows`` (N, U), with what is ``known`` (N,), are closest to ``seconds`` (N,),
    relative to these (Lawson and Hanson, 1974, by SciPy)."""
    found, _ = nnls(rows / seconds[:, None], 1 - known / seconds)
    costs: np.ndarray = found
    return costs


def largest_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The largest relative difference."""
    return float(max(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)))
