"""The whole state of a tuning run, in one object."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from dfs_cli.config import TuningConfig
from dfs_cli.distributed import of_all, rank
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.tuning.scales import ParameterSizes, sizes_of

_GATE_RATE, _BACKBONE_RATE = 5.0, 0.3
# Adam divides by the gradient's size. The gate's gradient is small and mostly noise: with the usual epsilon that noise
# would move the gate at full speed; with this one the gate moves in proportion to the gradient.
_GATE_EPSILON = 1e-2
_WEIGHT_DECAY = 1e-4
_QUANTIZERS = ("log_weight_steps", "log_input_steps", "log_feature_steps", "bit_weight", "bit_bias")


@dataclass
class TuningState:
    """The whole state of a run: ``state_dict()`` is all that must be saved to continue after any step. All processes call it
    together.

    The position in the data is the step itself: epoch ``step // steps_per_epoch``, batch ``step % steps_per_epoch``.

    Args:
        network: the network that is tuned.
        optimizer: AdamW over controller, quantizers and backbone, with a learning rate for each.
        scheduler: cosine, per step.
        steps_per_epoch, total_steps: lengths of an epoch and of the run.
        step: number of steps done.
        pieces: into which a batch is divided, whose gradients are added up.
        sizes: to which steps are proportional; None: they are not.

    The Lagrange multiplier of the budget is the controller's ``cost_multiplier``: raised while the cost is above the target,
    lowered below it (dual ascent).
    """

    network: DynamicResNet
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    pieces: int = 1
    sizes: ParameterSizes | None = None

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        generators = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "operating_point": self.network.controller.operating_point,
            "sizes": self.sizes.state() if self.sizes else None,
            "step": self.step,
            "pieces": self.pieces,
            "plan": (self.steps_per_epoch, self.total_steps),
            "generators": of_all(generators),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``, strictly.

        Raises:
            ConfigError: it is the state of a run of another length or batch size.
        """
        if tuple(state["plan"]) != (plan := (self.steps_per_epoch, self.total_steps)):
            raise ConfigError(f"the saved run has {state['plan'][1]} steps in epochs of {state['plan'][0]}, not {plan}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.network.controller.operating_point, self.step = state["operating_point"], state["step"]
        # They are those of the network before it was tuned.
        self.sizes = None if state["sizes"] is None else ParameterSizes(self.network.backbone)
        if self.sizes is not None:
            self.sizes.load(state["sizes"])
        self.pieces = state["pieces"]
        if rank() < len(state["generators"]):  # where there are more processes now, they keep their own
            generators = state["generators"][rank()]
            random.setstate(generators["python"])
            torch.set_rng_state(generators["torch"])
            if generators["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(generators["cuda"])


def start_state(network: DynamicResNet, config: TuningConfig, steps_per_epoch: int) -> TuningState:
    """The state before the first step. The backbone's learning rate is 0.3 times that of the quantizers; a frozen backbone has
    none."""
    gate, quantizers, backbone = parameter_groups(network)
    groups = [
        {"params": gate, "lr": config.lr * _GATE_RATE, "weight_decay": 0.0, "eps": _GATE_EPSILON},
        {"params": quantizers, "lr": config.lr, "weight_decay": 0.0},
    ]
    for parameter in backbone:
        parameter.requires_grad_(not config.freeze_backbone)
    if not config.freeze_backbone:
        groups.append({"params": backbone, "lr": config.lr * _BACKBONE_RATE, "weight_decay": _WEIGHT_DECAY})
    optimizer = create_optimizer_v2([g for g in groups if g["params"]], opt="adamw", lr=config.lr)
    total = config.total_steps(steps_per_epoch)
    scheduler = CosineLRScheduler(optimizer, t_initial=total, lr_min=0.0, t_in_epochs=False)
    return TuningState(
        network,
        optimizer,
        scheduler,
        steps_per_epoch,
        total,
        pieces=config.grad_accum_steps,
        sizes=sizes_of(network.backbone),
    )


def parameter_groups(
    network: DynamicResNet,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters of the controller, of the quantizers (step sizes, batch-norm per bitwidth) and of the backbone."""
    gate: list[torch.nn.Parameter] = []
    quantizers: list[torch.nn.Parameter] = []
    backbone: list[torch.nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] in _QUANTIZERS:
            quantizers.append(parameter)
        else:
            (backbone if name.startswith("backbone.") else gate).append(parameter)
    return gate, quantizers, backbone
