"""What a checkpoint holds of a conversion before and while it is tuned."""

from __future__ import annotations

import copy
from typing import Any

from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import DynamicConfig
from dfs_cli.conversion.setup import Setup
from dfs_cli.conversion.stages import Planned, start_tuning, unreadable_log
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.records import Agreement
from dfs_cli.surgery.equalise import reserve_gains
from dfs_cli.surgery.swap import make_dynamic
from dfs_cli.tuning.state import TuningState

_PLANNED, _TUNING = "planned", "tuning"


class Progress:
    """The part of a conversion in its checkpoint."""

    def __init__(self, checkpoint: Checkpoint, setup: Setup) -> None:
        self.checkpoint, self.setup = checkpoint, setup

    def restore(self) -> tuple[Planned, TuningState] | None:
        """The network as it was saved, and the state of its tuning; None: nothing was saved.

        Nothing is measured again: on another machine, or in another order, something else might come of it.
        """
        planned, tuning = self.checkpoint.get(_PLANNED), self.checkpoint.take(_TUNING)
        if planned is None or tuning is None:
            return None
        setup = self.setup
        teacher = copy.deepcopy(setup.model).to(setup.device).eval()
        table = CostTable.from_dict(planned["table"])
        agreement = planned["agreement"] and Agreement.from_dict(planned["agreement"])
        dynamic = DynamicConfig.from_dict(planned["dynamic"])
        network = make_dynamic(teacher, dynamic, table, setup.plan).network
        network.controller.limit = setup.request.limit
        if agreement:
            reserve_gains(network, agreement.refitted)
        unreadable = unreadable_log(setup)
        unreadable.reasons.update(tuning["unreadable"])
        restored = Planned(network, dynamic, table, TuningTarget(*planned["target"]), teacher, unreadable, agreement)
        state = start_tuning(setup, restored)
        state.load_state_dict(tuning["state"])
        return restored, state

    def begin(self, planned: Planned, state: TuningState) -> None:
        """Everything is measured; save what came of it, and the state before the first step."""
        agreement = planned.agreement
        self.checkpoint.keep(
            _PLANNED,
            {
                "dynamic": planned.dynamic.to_dict(),
                "table": planned.table.to_dict(),
                "target": tuple(planned.target),
                "agreement": agreement and agreement.to_dict(),
            },
        )
        self.save(planned, state)

    def save(self, planned: Planned, state: TuningState) -> None:
        """Save the state of tuning."""
        self.checkpoint.save(_TUNING, self._state(planned, state))

    def reached(self, planned: Planned, state: TuningState) -> None:
        """A step is done; see :meth:`dfs_cli.checkpoint.Checkpoint.reached`."""
        ends_epoch = state.step % state.steps_per_epoch == 0
        self.checkpoint.reached(_TUNING, lambda: self._state(planned, state), ends_epoch)

    def _state(self, planned: Planned, state: TuningState) -> dict[str, Any]:
        planned.unreadable.join()
        return {"state": state.state_dict(), "unreadable": dict(planned.unreadable.reasons)}
