import pytest
import torch

from dfs_cli.cost.decisions import NOT_RUN, Decisions

# Four images, two passes, two blocks; the second and the last image take one pass.
OPTIONS = torch.tensor([[[0, 1], [2, 2]], [[0, 1], [NOT_RUN, NOT_RUN]], [[0, 1], [2, 1]], [[0, 1], [NOT_RUN, NOT_RUN]]])
DECISIONS = Decisions(OPTIONS)


def test_shapes_and_passes_by_hand() -> None:
    assert (len(DECISIONS), DECISIONS.passes, DECISIONS.blocks) == (4, 2, 2)
    assert DECISIONS.ran.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    assert DECISIONS.in_pass(1).tolist() == [[2, 2], [-1, -1], [2, 1], [-1, -1]]
    assert DECISIONS[1:3].options.tolist() == OPTIONS[1:3].tolist()
    assert DECISIONS[torch.tensor([3, 0])].options.tolist() == OPTIONS[[3, 0]].tolist()


def test_counts_and_bits_by_hand() -> None:
    # First pass: block a always skips, block b always takes option 1. Second: a takes 2 twice, b takes 1 and 2 once each.
    assert DECISIONS.counts(3) == (((4, 0, 0), (0, 4, 0)), ((0, 0, 2), (0, 1, 1)))
    assert DECISIONS.bits((0, 4, 32)).tolist() == [[0, 4, 32, 32], [0, 4, -1, -1], [0, 4, 32, 4], [0, 4, -1, -1]]


def test_policies_by_hand() -> None:
    assert DECISIONS.distinct() == 3
    common = DECISIONS.most_common()
    assert common.options.tolist() == [[[0, 1], [NOT_RUN, NOT_RUN]]]
    assert DECISIONS.equal(common).tolist() == [False, True, False, True]
    assert DECISIONS.equal(DECISIONS).all()
    tied = Decisions.of_pass(torch.tensor([[2, 0], [1, 0]]))
    assert tied.most_common().options.tolist() == [[[1, 0]]], "of equally common ones the first in ascending order"


def test_decisions_are_put_together() -> None:
    one = Decisions.of_pass(torch.tensor([[0, 1], [2, 0]]))
    assert one.options.tolist() == [[[0, 1]], [[2, 0]]]
    both = one.followed_by(torch.tensor([[1, 1], [NOT_RUN, NOT_RUN]]))
    assert both.options.tolist() == [[[0, 1], [1, 1]], [[2, 0], [NOT_RUN, NOT_RUN]]]
    assert Decisions.join([both[:1], both[1:]]).equal(both).all()
    assert Decisions.alike(torch.tensor([0, 1]), 3).options.tolist() == [[[0, 1]]] * 3
    assert Decisions.alike(torch.tensor([[0, 1], [2, 2]]), 2).options.tolist() == [[[0, 1], [2, 2]]] * 2


def test_decisions_do_not_change() -> None:
    with pytest.raises(AttributeError):
        DECISIONS.options = OPTIONS  # type: ignore[misc]
