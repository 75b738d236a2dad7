import pytest
import torch
from common import RNN, SIZE, make_dynamic, spread_gate, tiny_resnet

from dfs_cli.cost.decisions import Decisions
from dfs_cli.data.images import Batch, Unreadable, UnreadableLog
from dfs_cli.errors import DataError
from dfs_cli.evaluation.evaluate import evaluate_accuracy, evaluate_network
from dfs_cli.records import Evaluation
from dfs_cli.surgery.plan import plan_costs

CPU = torch.device("cpu")
TABLE = plan_costs(tiny_resnet(), RNN, SIZE)


def batches(images: int = 50) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(images, *SIZE, generator=generator), torch.randint(5, (images,), generator=generator)
    return [Batch(a, b, ()) for a, b in zip(x.split(20), y.split(20), strict=True)]


def test_what_is_measured_agrees_with_a_plain_loop_over_single_images() -> None:
    network = make_dynamic(tiny_resnet())
    spread_gate(network)
    seen: list[int] = []
    told: list[torch.Tensor] = []
    log = UnreadableLog("validation", 50)

    def tell(logits: torch.Tensor, targets: torch.Tensor) -> None:
        told.append(logits.argmax(dim=1) == targets)

    found = evaluate_network(network, TABLE, batches(), CPU, log, on_batch=seen.append, on_logits=tell)
    with torch.no_grad():
        outputs = [network.run(x[None]) for batch in batches() for x in batch.images]
    decisions = Decisions.join(output.decisions for output in outputs)
    targets = torch.cat([batch.targets for batch in batches()])
    right = torch.cat([output.logits.argmax(dim=1) for output in outputs]) == targets
    cost = TABLE.cost(decisions)
    assert found.images == 50 and seen == [20, 20, 10]
    assert [len(part) for part in told] == seen and torch.equal(torch.cat(told), right)
    assert found.top1 == pytest.approx(100 * right.double().mean().item()) and found.top5 == 100
    assert found.cost == pytest.approx(cost.mean().item()) and found.cost_max == pytest.approx(cost.max().item())
    assert found.cost_p50 == pytest.approx(cost.quantile(0.5).item())
    assert found.cost_p95 == pytest.approx(cost.quantile(0.95).item())
    by_hand = [[[int((decisions.in_pass(0)[:, b] == k).sum()) for k in range(5)] for b in range(5)]]
    assert [[list(block) for block in blocks] for blocks in found.choices] == by_hand
    assert found.pass_shares == (1.0,) and found.passes == 1.0
    # What the most common policy gives for every image.
    policies, counts = decisions.in_pass(0).unique(dim=0, return_counts=True)
    common = policies[counts.argmax()]
    assert found.dynamics.policies == len(policies) > 5
    assert found.dynamics.common_share == pytest.approx(int(counts.max()) / 50)
    assert found.dynamics.common_cost == pytest.approx(TABLE.cost(Decisions.alike(common, 1)).item())
    with torch.no_grad():
        answers = [network.follow(batch.images, common.expand(len(batch.images), -1))[0] for batch in batches()]
    by_common = torch.cat([logits.argmax(dim=1) for logits in answers]) == targets
    assert found.dynamics.common_top1 == pytest.approx(100 * by_common.double().mean().item())


def test_passes_are_counted_by_hand() -> None:
    record = evaluation(choices=(((4, 6), (10, 0)), ((1, 2), (3, 0))))
    assert record.pass_shares == (1.0, 0.3) and record.passes == 1.3


def evaluation(choices: tuple[tuple[tuple[int, ...], ...], ...]) -> Evaluation:
    network = make_dynamic(tiny_resnet())
    measured = evaluate_network(network, TABLE, batches(10), CPU, UnreadableLog("validation", 10))
    return measured.replace(choices=choices)


def test_unreadable_images_are_left_out_and_named() -> None:
    network = make_dynamic(tiny_resnet())
    good, *_ = batches(20)
    mixed = [Batch(good.images, good.targets, (Unreadable("a.jpg", "broken"),)), empty("b.jpg")]
    told: list[int] = []
    log = UnreadableLog("validation", 1000)
    found = evaluate_network(network, TABLE, mixed, CPU, log, on_logits=lambda _, targets: told.append(len(targets)))
    assert told == [found.images] == [20] and found.unreadable == ("a.jpg", "b.jpg")
    with pytest.raises(DataError, match="no image to evaluate"):
        evaluate_network(network, TABLE, [empty("b.jpg")], CPU, UnreadableLog("validation", 1000))
    with pytest.raises(DataError, match="more than 1%"):
        evaluate_network(network, TABLE, mixed, CPU, UnreadableLog("validation", 20))


def empty(name: str) -> Batch:
    return Batch(torch.empty(0, *SIZE), torch.empty(0, dtype=torch.long), (Unreadable(name, "broken"),))


def test_accuracy_of_any_classifier() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5], [5, 0, 0, 0, 0, 1]])
    targets = torch.tensor([0, 0, 5])
    batch = Batch(logits, targets, ())
    # Right, not even among five, and second.
    top1, top5 = evaluate_accuracy(torch.nn.Identity(), [batch], CPU, UnreadableLog("validation", 3))
    assert (top1, top5) == pytest.approx((100 / 3, 200 / 3))
