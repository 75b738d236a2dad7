"""The probe controller: a cheap pass over the whole network decides which images take a second, better one.

Cost falls with the square of the bitwidth, so a low-bit pass is nearly free, and its own confidence tells difficult
images from easy ones far better than any block's features do. An image whose first answer is sure is done; for the
others a gate that sees that answer chooses the bitwidths of a second pass, and the logits of both passes are added up. On a
device, where deciding costs more than it saves, the second pass has one policy, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dfs_cli.control.base import Ceiling, Controller, HeldOut, Need, Request, Sensitivity, Tell, join_batches
from dfs_cli.control.division import divide, divide_by_rule
from dfs_cli.control.gates import SecondPassGate, shift_preference, summarise
from dfs_cli.control.ladder import affordable_scores
from dfs_cli.control.static import mix_within
from dfs_cli.control.threshold import ALWAYS_REFINE, LEAST_MULTIPLIER, NEVER_REFINE, best_threshold, multiplier_for
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.operating_point import (
    HIGHEST_SHARE,
    LOWEST_SHARE,
    OperatingPoint,
    find_operating_point,
)
from dfs_cli.cost.table import CostTable
from dfs_cli.distributed import joined_rows, of_first
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import Answer, Output, TuningTarget, View, uncertainty

_TRAINED_SHARE = 0.2  # of a batch, at most, takes the second pass in tuning: a step stays cheap
# The middle of the interval that the budget promises: what the gate is sure of on held-out images, it need not be as sure of on
# new ones.
_AIM = (LOWEST_SHARE + HIGHEST_SHARE) / 2
# With at least so large log-odds the first answer stands, where no images are there to find out what a second look changes.
_SURE = 5.0


class ProbeController(Controller):
    """Two passes: one policy for all images, then a second look at those whose answer is not sure.

    The first pass runs every image with ``policy`` (L,), one option per block. Images whose :func:`uncertainty` is above
    ``operating_point`` take the second, whose options maximise ``scores - cost_multiplier * option costs``, or are those of
    ``second_policy`` (L,), where there is no gate; the answer is then the sum of both passes' logits, weighted by
    ``logit_weights``. No block has a dearer option in the second pass than ``ceiling`` says. A mirrored second pass is a second
    view, which tells more than a second look at the same.

    Under a ``limit`` the second pass has what the first one leaves. Where the options of an image cost more, it gets those of a
    larger multiplier (:mod:`dfs_cli.control.ladder`); where even the cheapest do, no image takes the second pass.

    ``tuned_multiplier`` is the multiplier at the end of tuning, from which the network is moved to a budget, whatever it was at
    before.

    Args:
        gate: scores the second pass's options; None: they are the same for all images.
        mirror: show the second pass the mirrored image.
        first_view: height and width of the images that the first pass sees, as a share of the full ones.
    """

    needs = Need.BLOCKS
    gate: SecondPassGate | None
    policy: Tensor
    second_policy: Tensor
    multiplier: Tensor
    tuned_multiplier: Tensor

    def __init__(self, table: CostTable, gate: SecondPassGate | None, mirror: bool, first_view: float = 1.0) -> None:
        super().__init__(table, (View(scale=first_view), View(mirrored=mirror)))
        self.gate = gate
        self.ceiling = Ceiling(self.blocks, len(self.bits))
        widest = torch.full((self.blocks,), len(self.bits) - 1)
        self.register_buffer("policy", widest)
        self.register_buffer("second_policy", widest.clone(), persistent=gate is None)
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        self.register_buffer("tuned_multiplier", torch.zeros((), dtype=torch.float64))
        self.logit_weights = nn.Parameter(torch.tensor([0.5, 0.5]))
        self._operating_point = NEVER_REFINE

    @property
    def operating_point(self) -> float:
        """The uncertainty above which an image takes the second pass."""
        return self._operating_point

    @operating_point.setter
    def operating_point(self, value: float) -> None:
        self._operating_point = value

    @property
    def cost_multiplier(self) -> float:
        """What a unit of cost counts in the second pass."""
        return float(self.multiplier)

    @cost_multiplier.setter
    def cost_multiplier(self, value: float) -> None:
        self.multiplier.fill_(value)

    def run(
        self,
        network: DynamicResNet,
        images: Tensor,
        decisions: Decisions | None = None,
        target: TuningTarget | None = None,
    ) -> Output:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run`.

        In tuning the share of the images that the target names, the least sure ones, take the second pass, whatever the
        operating point; at most a fifth of the batch, drawn from them, so that a step stays cheap.
        """
        first_choice = self.policy.expand(len(images), -1) if decisions is None else decisions.in_pass(0)
        first, features = network.follow(images, first_choice, view=self.views[0])
        first_decisions = Decisions.of_pass(first_choice)
        if decisions is not None and decisions.passes == 1:
            return Output(first, first_decisions, (Answer(None, first),))
        rows = self._unsure(first, decisions, target).nonzero().flatten()
        not_run = torch.full_like(first_choice, NOT_RUN)
        if not len(rows):
            return Output(first, first_decisions.followed_by(not_run), (Answer(None, first),))
        all_refined = len(rows) == len(images)

        def entering(tensor: Tensor) -> Tensor:
            return tensor if all_refined else tensor[rows]

        choice, probs = self._choose(entering(first.detach()), entering(features.detach()))
        if decisions is not None:
            choice = entering(decisions.in_pass(1))
        explored = target.explored if target else 0.0
        second, _ = network.follow(entering(images), choice, probs, explored, self.views[1])
        both = (self.logit_weights[0] * entering(first.detach()) + self.logit_weights[1] * second).to(first.dtype)
        return Output(
            both if all_refined else first.index_copy(0, rows, both),
            first_decisions.followed_by(choice if all_refined else not_run.index_copy(0, rows, choice)),
            (Answer(None, first), Answer(rows, both, probs)),
        )

    def _choose(self, first: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The options (N, L) of the second pass and, in training, the gate's probabilities (N, L, K).

        Args:
            first: (N, classes), the logits of the first pass.
            features: (N, C, H, W), those before its head.
        """
        if not self.gate:
            return self.second_policy.expand(len(first), -1), None
        scores = self.gate(summarise(first, features))
        most = None if self.limit == math.inf else self.limit - self.base_costs()[0]
        # Not self.cost_multiplier, a number: an accelerator would be waited for.
        scores = affordable_scores(scores, self.multiplier, self.option_costs[1], self.ceiling, most)
        return scores.argmax(dim=2), scores.softmax(dim=2) if self.training else None

    def _unsure(self, first: Tensor, decisions: Decisions | None, target: TuningTarget | None) -> Tensor:
        """(N,), whether an image takes the second pass, from the first one's logits (N, classes).

        In tuning, of several processes, they are the least sure ones of all of them.
        """
        if decisions is not None:
            return decisions.ran[:, 1]
        if self.limit < math.inf and not self.can_refine:
            return torch.zeros(len(first), dtype=torch.bool, device=first.device)
        if target is None:
            return uncertainty(first) > self.operating_point
        uncertain, own = joined_rows(uncertainty(first.detach()))
        images = len(uncertain)
        wanted = min(images, max(round(target.share * images), 1 if target.share > 0 else 0))
        chosen = uncertain.topk(wanted).indices
        limit = max(1, round(_TRAINED_SHARE * images))
        if self.training and len(chosen) > limit:
            chosen = chosen[of_first(torch.randperm(len(chosen), device=chosen.device))[:limit]]
        unsure = torch.zeros(images, dtype=torch.bool, device=first.device)
        unsure[chosen] = True
        return unsure[own]

    @property
    def can_refine(self) -> bool:
        """Whether the limit pays for a second pass."""
        always, least = self.base_costs()
        return bool(self.limit - always >= least)

    def base_costs(self) -> tuple[Tensor, Tensor]:
        """What an image costs that takes both passes, besides the blocks of the second, and what these cost at least."""
        first = self.option_costs[0].gather(1, self.policy[:, None]).sum()
        least = self.ceiling.extras(self.option_costs[1])[1]
        if not self.gate:
            least = self.option_costs[1].gather(1, self.second_policy[:, None]).sum()
        return sum(self.fixed_costs) + first, least

    @torch.no_grad()
    def start(
        self,
        network: DynamicResNet,
        table: CostTable,
        sensitivity: Sensitivity | None,
        request: Request,
        sample: Tensor,
    ) -> TuningTarget:
        """Divide the budget between the passes: see :mod:`dfs_cli.control.division`.

        The second pass has the mix that the gate's preferences give for its cost.
        """
        assert sensitivity is not None, "declared as needed"
        self.limit = request.limit
        if self.gate:
            shift_preference(self.gate.preference, sensitivity.blocks)
        if request.is_bound:
            return self._start_within(network, table, sensitivity.blocks, request.budget, sample)
        if table.device is None:
            division = divide_by_rule(table, sensitivity.blocks, request)
        else:
            division = divide(network, table, sensitivity.blocks, request.budget, sample, self.views, request.limit)
        self.policy.copy_(division.first)
        table = self.settle(table)
        if self.gate:
            self.cost_multiplier = multiplier_for(self.gate.preference, table, division.second)
        elif division.again is not None:
            self._repeat_with(division.again)
        self._normalise_input(network, sample)
        if not self.gate:  # there is nothing to be aimed at within a pass
            return TuningTarget(self._first_cost(table) + division.share * division.second, share=division.share)
        return TuningTarget(division.second, share=division.share)

    def settle(self, table: CostTable) -> CostTable:
        table = table.after(self.policy.cpu())
        self.option_costs.copy_(table.option_costs)
        return table

    def _start_within(
        self, network: DynamicResNet, table: CostTable, harm: Tensor, budget: float, sample: Tensor
    ) -> TuningTarget:
        """Start so that both passes together cost no image more than ``budget``; where one pass alone does less harm than both
        would, it has the whole budget, and no image is refined."""
        mix, has_second = mix_within(table, harm, budget, self.limit)
        self.policy.copy_(mix)
        self._repeat_with(mix)
        self.operating_point = -_SURE if has_second else NEVER_REFINE
        self.cost_multiplier = LEAST_MULTIPLIER
        self._normalise_input(network, sample)
        return TuningTarget(self.ceiling.cost(table, 1), share=float(has_second))

    def _repeat_with(self, mix: Tensor) -> None:
        """Let no block of the second pass have a dearer option than in ``mix`` (L,); without a gate these are its options."""
        self.ceiling.highest.copy_(mix)
        self.second_policy.copy_(mix)

    def _normalise_input(self, network: DynamicResNet, sample: Tensor) -> None:
        """Scale the gate's input to what the first pass finds in ``sample`` (N, C, H, W)."""
        if not self.gate:
            return
        logits, features = network.follow(sample, self.policy.expand(len(sample), -1), view=self.views[0])
        self.gate.normalise_input(summarise(logits, features))

    def _first_cost(self, table: CostTable) -> float:
        """Cost of the first pass."""
        return table.cost(Decisions.alike(self.policy.cpu(), 1)).item()

    @torch.inference_mode()
    def set_operating_point(
        self,
        network: DynamicResNet,
        table: CostTable,
        held_out: HeldOut,
        request: Request,
        tell: Tell = lambda value, cost: None,
    ) -> OperatingPoint:
        """Set the threshold of uncertainty; where all images may take the second pass and the budget is to be spent, lower the
        multiplier."""
        network.eval()
        if not self.can_refine:
            self.operating_point = NEVER_REFINE
        if request.is_bound or not self.can_refine:
            costs, top1 = held_out.measure(network, table)
            return OperatingPoint(self.operating_point, float(costs.mean()), top1)

        def run_all(multiplier: float) -> tuple[list[Output], Tensor]:
            """Outputs and costs (N,) of the held-out images, all of them in both passes."""
            self.cost_multiplier, self.operating_point = multiplier, ALWAYS_REFINE
            outputs = [network.run(images) for images in held_out.batches]
            costs = join_batches([table.cost(output.decisions) for output in outputs])
            tell(multiplier, float(costs.mean()))
            return outputs, costs

        outputs, costs = run_all(float(self.tuned_multiplier))
        target = _AIM * request.budget
        if request.spend and float(costs.mean()) <= target and self.gate:
            point = find_operating_point(lambda value: run_all(value)[1], target, start=self.cost_multiplier)
            self.cost_multiplier, self.operating_point = point.value, ALWAYS_REFINE
            return OperatingPoint(ALWAYS_REFINE, point.cost)
        first_cost = self._first_cost(table)
        point = best_threshold(outputs, costs, first_cost, target, held_out, request.spend)
        self.operating_point = point.value
        tell(point.value, point.cost)
        return point

    def uses_hard_crops(self, spend: bool) -> bool:
        return True

    def movable(self, table: CostTable) -> tuple[float, float]:
        low = self._first_cost(table)
        return low, min(low + self.ceiling.cost(table, 1), self.limit) if self.can_refine else low

    def largest_cost(self, table: CostTable) -> float:
        return self.movable(table)[0 if self.operating_point >= NEVER_REFINE else 1]

    def check(self, table: CostTable) -> None:
        super().check(table)
        self.ceiling.check()
        for name in ("policy", "second_policy"):
            policy = getattr(self, name)
            if not torch.equal(policy, policy.clamp(0, len(self.bits) - 1)):
                raise ValueError(f"controller.{name}: an option is none of the {len(self.bits)} there are")
        if table.first_runs != table.after(self.policy).first_runs:
            raise ValueError("controller.policy: not the first pass of the cost table")

    def freeze(self) -> None:
        self.tuned_multiplier.copy_(self.multiplier)
        super().freeze()

    @torch.no_grad()
    def force(self, policies: Tensor) -> None:
        """The first pass alone; a second one, at another operating point, has the last of the policies."""
        rows = torch.atleast_2d(policies)
        self.policy.copy_(rows[0])
        self.operating_point, self.limit = NEVER_REFINE, math.inf
        if not self.gate:
            self._repeat_with(rows[-1])
            return
        nn.init.zeros_(self.gate.head.weight)
        self.gate.preference.copy_(nn.functional.one_hot(rows[-1], self.gate.options))
        self.cost_multiplier = 0.0
