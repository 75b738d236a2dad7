"""How features flow through a block of timm: what reads its input, and what is added up at its end."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from timm.layers import DropPath
from torch import fx, nn

from dfs_cli.nn.layers import CONVOLUTIONS

_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)


class Dataflow(NamedTuple):
    """Paths inside a block.

    Args:
        readers: the convolutions that read the block's input as it is.
        results: the last layers of branch and shortcut: a convolution, or the batch-norm that alone reads it.
    """

    readers: tuple[str, ...] = ()
    results: tuple[str, ...] = ()

    def within(self, path: str) -> Dataflow:
        """The same with the block's ``path`` before each."""
        return Dataflow(*(tuple(f"{path}.{name}" for name in names) for names in self))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return isinstance(m, (nn.BatchNorm2d, DropPath)) or not any(True for _ in m.children())


def dataflow_of(block: nn.Module, ends: Collection[str]) -> Dataflow:
    """The flow through ``block``, of which the convolutions ``ends`` are the last ones of branch and shortcut.

    A block whose code cannot be traced has none that is known.
    """
    try:
        graph = _Tracer().trace(block)
    except Exception:  # whatever timm's code does with a proxy
        return Dataflow()
    modules = dict(block.named_modules())

    def passes(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], _PASSING)

    def source(node: fx.Node) -> fx.Node:
        while passes(node):
            node = node.all_input_nodes[0]
        return node

    readers, results = [], []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in CONVOLUTIONS:
            continue
        if source(node.all_input_nodes[0]).op == "placeholder":
            readers.append(node.target)
        if node.target in ends:
            last = node
            users = list(node.users)
            if len(users) == 1 and users[0].op == "call_module" and not passes(users[0]):
                last = users[0]
            if last is node or isinstance(modules[last.target], nn.BatchNorm2d):
                results.append(last.target)
    return Dataflow(tuple(readers), tuple(results))
