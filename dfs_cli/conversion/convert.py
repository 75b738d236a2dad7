"""One way through a conversion: set-up, surgery, tuning, operating point, evaluation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, SynthesisConfig, TuningConfig
from dfs_cli.control.base import controller_of
from dfs_cli.conversion import planning, stages
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.resume import Progress
from dfs_cli.conversion.setup import Setup, prepare
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.data.splits import Splits
from dfs_cli.errors import DataError
from dfs_cli.freeze.weights import freeze_weights
from dfs_cli.observer import Observer
from dfs_cli.records import Source
from dfs_cli.tuning.state import TuningState

_ORIGINAL = "original"  # in the checkpoint


def convert(
    model: nn.Module | str,
    budget: float,
    data: DataConfig | Splits | SynthesisConfig | None = None,
    *,
    dynamic: DynamicConfig | None = None,
    tuning: TuningConfig | None = None,
    preprocessing: Preprocessing | None = None,
    source: Source | None = None,
    spend: bool = False,
    costs: DeviceCosts | None = None,
    limit: float | None = None,
    observer: Observer | None = None,
    checkpoint: Checkpoint | None = None,
) -> Converted:
    """Make a timm ResNet input-adaptive, tune it towards ``budget`` and evaluate it.

    Args:
        model: a timm model, which is left unchanged, or the name of one, loaded with its pretrained weights.
        budget: what an image may cost in the mean: bit-weighted MACs of the whole network, gate included, as a fraction of
            the dense 32-bit network's.
        data: where the images are, or splits opened by the caller, or how to make images where there are none. None: the
            embedded digits, for their model, else images are made.
        dynamic: options and gate; None: :func:`dfs_cli.conversion.defaults.default_dynamic`.
        tuning: None: :func:`dfs_cli.default_tuning`.
        preprocessing: None: the model's own.
        source: what to record about the original weights; None: what timm says where ``model`` is a name, else unknown.
        spend: reach for the budget itself, 0.9 of it at least, even where less does as well on held-out images.
        costs: of the network's parts on a device, in place of bit-weighted MACs: see :func:`dfs_cli.measure_costs`. Options
            that a wider one is as cheap as are left out.
        limit: what no image may cost more than, in the unit of the budget, whatever it shows; None: there is no limit.
        observer: told about progress.
        checkpoint: where the run is saved now and then, and what it goes on from.

    Returns:
        The network in evaluation mode, at its operating point. ``keeps_budget`` tells whether the validation split's cost is
        what is promised.

    Raises:
        ConfigError: a setting is out of range, or the budget cannot be reached.
        UnsupportedModelError: the model cannot be converted.
        DataError: images are missing, unreadable, or of other classes.
        DivergedError: tuning failed.
        OutputError: the checkpoint is of another run.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=4, batch_size=64, hflip=0.0)
        >>> converted = dfs_cli.convert("resnet20_digits", budget=0.1, tuning=tuning)
        >>> converted.keeps_budget
        True
    """
    observer, checkpoint = observer or Observer(), checkpoint or Checkpoint()
    setup = prepare(
        model, budget, data, dynamic, tuning, preprocessing, source, spend, observer, costs, checkpoint, limit
    )
    return run(setup, observer, checkpoint=checkpoint)


def run(
    setup: Setup,
    observer: Observer,
    original: tuple[float, float] | None = None,
    checkpoint: Checkpoint | None = None,
    on_logits: Callable[[Tensor, Tensor], None] = lambda logits, targets: None,
) -> Converted:
    """Go through all stages.

    Args:
        original: top-1 and top-5 of the original network, where they are known already.
        checkpoint: as for :func:`prepare`.
        on_logits: of the validation images, as for :func:`dfs_cli.evaluation.evaluate.evaluate_network`.
    """
    observer.configured(setup.configuration, setup.table)
    with stages.own_generators(setup.tuning.seed):
        progress = Progress(checkpoint or Checkpoint(), setup)
        if (restored := progress.restore()) is not None:
            planned, state = restored
            observer.note(f"going on after step {state.step} of {state.total_steps}")
        else:
            planned = planning.make_network(setup, observer)
            state = stages.start_tuning(setup, planned)
            progress.begin(planned, state)
        if original is None and setup.synthesis is None:
            original = _original(setup, observer, progress, planned, state)
        if state.step < state.total_steps:
            _tune(setup, planned, state, observer, progress)
        freeze_weights(planned.network)
        held_out = stages.held_out_images(
            setup.splits.calibration,
            setup.synthesis is None and controller_of(planned.network).uses_hard_crops(setup.request.spend),
            setup.preprocessing,
            setup.tuning,
            setup.workers,
            setup.device,
            planned.unreadable,
            observer,
        )
        point = stages.set_operating_point(planned.network, planned.table, held_out, setup.request, observer)
        planned.unreadable.join()
        return stages.finish(setup, planned, point, original, observer, on_logits)


def _tune(setup: Setup, planned: stages.Planned, state: TuningState, observer: Observer, progress: Progress) -> None:
    stop = progress.checkpoint.stop
    try:
        with stop.waited_for():
            stages.tune_network(setup, planned, state, observer, lambda: progress.reached(planned, state))
    except DataError:  # between two steps
        if stop.number is not None:  # it reached the processes that load images, too
            progress.save(planned, state)
            stop.obey()
        raise
    except RuntimeError:  # the same, within a step
        stop.obey()
        raise
    progress.save(planned, state)
    stop.obey()


def _original(
    setup: Setup, observer: Observer, progress: Progress, planned: stages.Planned, state: TuningState
) -> tuple[float, float]:
    """Top-1 and top-5 of the original network, which are found out once."""
    known = progress.checkpoint.get(_ORIGINAL)
    if known is None:
        known = stages.evaluate_original(setup, observer)
        progress.checkpoint.keep(_ORIGINAL, known)
        progress.save(planned, state)
    top1, top5 = known
    return top1, top5
