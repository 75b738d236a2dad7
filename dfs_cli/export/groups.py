"""Batches whose images have different options: each option that some image has runs once, on its images alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from dfs_cli.export.graph import Graph

Run = Callable[[Graph, list[str]], Sequence[str]]
"""From the graph and the values of a group's images to its results."""


class Choice(NamedTuple):
    """The options of a batch of images in a block, by name.

    Args:
        options: (N,), option indices.
        exists: of each of the K options, whether an image has it.
        is_uniform: whether all images have the same one.
    """

    options: str
    exists: list[str]
    is_uniform: str


def write_choice(graph: Graph, options: str, count: int) -> Choice:
    """Add the tests on ``options`` (N,) to ``graph``; a node costs microseconds whatever it computes, so they are few.

    Args:
        count: K.
    """
    last = graph.constant([-1], np.int64)
    equal = graph.add("Equal", [graph.add("Unsqueeze", [options, last]), graph.constant(range(count), np.int64)])
    # (K,): whether an image has the option.
    found = graph.add("ReduceMax", [graph.add("Cast", [equal], to=TensorProto.INT32)], axes=[0], keepdims=0)
    exists = [graph.name("exists") for _ in range(count)]
    graph.add("Split", [graph.add("Cast", [found], to=TensorProto.BOOL)], exists, axis=0)
    distinct = graph.add("ReduceSum", [found], keepdims=0)
    return Choice(options, exists, graph.add("Equal", [distinct, graph.constant(1, np.int32)]))


def write_groups(
    graph: Graph, choice: Choice, values: list[str], runs: Sequence[Run], none: Sequence[np.ndarray]
) -> list[str]:
    """Add what each option makes of the images that have it; returns the results, in the order of the batch.

    An option that no image has is not entered.

    Args:
        values: what is divided into groups, by name, (N, ...) each.
        runs: one for each option.
        none: the results for no image, (0, ...) each.
    """

    def run_group(inner: Graph, option: int) -> Sequence[str]:
        is_member = inner.add("Equal", [choice.options, inner.constant(option, np.int64)])
        rows = rows_of(inner, is_member)
        return runs[option](inner, [inner.add("GatherND", [value, rows]) for value in values])

    def run_none(inner: Graph) -> list[str]:
        return [inner.constant(empty) for empty in none]

    parts = [
        graph.branch(exists, functools.partial(run_group, option=option), run_none)
        for option, exists in enumerate(choice.exists)
    ]

    def join(inner: Graph) -> list[str]:
        return [inner.add("Concat", results, axis=0) for results in zip(*parts, strict=True)]

    def sort(inner: Graph) -> list[str]:
        size, order, place = inner.add("Shape", [choice.options]), inner.name("order"), inner.name("place")
        # Groups follow each other, each in the order of the batch. Sorted once more, the order is its own inverse.
        inner.add("TopK", [choice.options, size], [inner.name("sorted"), order], axis=0, largest=0)
        inner.add("TopK", [order, size], [inner.name("sorted"), place], axis=0, largest=0)
        return [inner.add("Gather", [results, place], axis=0) for results in join(inner)]

    return graph.branch(choice.is_uniform, join, sort)


def rows_of(graph: Graph, mask: str) -> str:
    """The indices (M, 1) of the M images for which ``mask`` (N,) is true."""
    return graph.add("Transpose", [graph.add("NonZero", [mask])], perm=[1, 0])
