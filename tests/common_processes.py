"""What tests of two processes run in each of them: a module that a spawned process finds, however pytest named the test's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SIZE, tiny_resnet
from torch.multiprocessing.spawn import spawn

from dfs_cli import distributed
from dfs_cli.comparison.cascade import Answers
from dfs_cli.config import DynamicConfig, TuningConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, eval_loader
from dfs_cli.evaluation.evaluate import evaluate_network
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.surgery.swap import make_dynamic
from dfs_cli.tuning.loop import tuning_step
from dfs_cli.tuning.state import TuningState, start_state
from dfs_cli.tuning.step import StepLoss


def in_two_processes(function: Callable[[int, Path], None], folder: Path) -> list[Any]:
    """Call ``function`` in two processes that have joined each other; what each saved in ``folder``."""
    store = folder / "store"
    spawn(_process, (function, folder, store), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, function: Callable[[int, Path], None], folder: Path, store: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(rank, folder)
    torch.distributed.destroy_process_group()


def figures(rank: int, folder: Path) -> None:
    own = torch.arange(distributed.share(5).start, distributed.share(5).stop, dtype=torch.float64)
    joined, place = distributed.joined_rows(own)
    sampler = EpochSampler(11, seed=3, batch_size=5)
    sampler.start = 0
    torch.save(
        {
            "share": own,
            "joined": joined,
            "own": joined[place],
            "mean": distributed.mean(own),
            "none": distributed.mean(own[:0]),
            "some": distributed.mean(own if rank else own[:0]),
            "weights": distributed.weights(len(own), 3 * rank),
            "total": distributed.total(torch.tensor([1.0, rank])),
            "largest": distributed.largest(rank, 5 - rank),
            "first": distributed.of_first(f"of {rank}"),
            "all": distributed.of_all(rank),
            "order": list(sampler),
            "length": len(sampler),
        },
        folder / f"{rank}.pt",
    )


def validation() -> Images:
    """Images of which one cannot be read."""
    generator = torch.Generator().manual_seed(2)
    source = [
        (torch.randn(SIZE, generator=generator), int(torch.randint(5, (), generator=generator))) for _ in range(120)
    ]
    source[70] = None  # type: ignore[call-overload]
    return Images(source)


def right_in(images: Images) -> dict[str, Any]:
    """Which images a network answers right, of which this process has its share."""
    torch.manual_seed(0)
    model = tiny_resnet()
    table = plan_costs(model, DYNAMIC["static"], SIZE)
    network = make_dynamic(model, DYNAMIC["static"], table).network
    told: list[Answers] = []
    loader = eval_loader(images.subset(distributed.share(len(images))), 16, 0)
    log = UnreadableLog("validation", len(images))
    found = evaluate_network(
        network, table, loader, torch.device("cpu"), log, on_logits=lambda *batch: told.append(Answers.of(*batch))
    )
    return {"right": [Answers.join(told).right], "unreadable": list(found.unreadable), "top1": found.top1}


def right_in_all(rank: int, folder: Path) -> None:
    torch.save(right_in(validation()), folder / f"{rank}.pt")


def step_of(dynamic: DynamicConfig, pieces: int, steps: int = 2) -> dict[str, Any]:
    """Two steps on a batch, of which this process has its share; no random choice is made in them."""
    torch.manual_seed(0)
    model = tiny_resnet()
    table = plan_costs(model, dynamic, SIZE)
    network = make_dynamic(model, dynamic, table).network
    sample, images = torch.randn(8, *SIZE), torch.randn(11, *SIZE)
    targets = torch.arange(11) % 5
    fit_steps(network, sample)
    harm = Sensitivity(torch.linspace(1.0, 0.1, len(dynamic.bits)).repeat(5, 1))
    budget = (table.cheapest + table.dearest) / 2
    controller, request = controller_of(network), Request(budget, True, 64, 64)
    target = (
        TuningTarget(budget) if dynamic.gate != "probe" else controller.start(network, table, harm, request, sample)
    )
    target = target._replace(explored=0.0, share=0.1)
    config = TuningConfig(steps=steps, grad_accum_steps=pieces, label_weight=0.0)  # the teacher sees all images
    state: TuningState = start_state(network.train(), config, 1)
    loss: torch.nn.Module = StepLoss(network, model, table, config)
    if distributed.size() > 1:
        loss = torch.nn.parallel.DistributedDataParallel(loss, broadcast_buffers=False, find_unused_parameters=True)
    own = distributed.share(11)
    part = slice(own.start, own.stop)
    records = [tuning_step(state, loss, images[part], targets[part], target, config) for _ in range(steps)]
    moments = {str(i): s["exp_avg"] for i, s in state.optimizer.state_dict()["state"].items()}
    return {"records": [tuple(r) for r in records], "network": network.state_dict(), "moments": moments}


DYNAMIC = {
    "static": DynamicConfig(bits=(4, 8), gate="static"),
    "probe": DynamicConfig(bits=(0, 4), gate="probe", mirror=True),
    "rnn": DynamicConfig(bits=(0, 4), gate="rnn"),
}


def steps_of_all(rank: int, folder: Path) -> None:
    found = {f"{gate} {pieces}": step_of(DYNAMIC[gate], pieces) for gate in DYNAMIC for pieces in (1, 2)}
    torch.save(found, folder / f"{rank}.pt")
