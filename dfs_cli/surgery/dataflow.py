"""How features flow through a block of timm: what reads its input, and what is added up at its end."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from timm.layers import DropPath
from torch import fx, nn

from dfs_cli.nn.layers import CONVOLUTIONS

_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)


class Dataflow(NamedTuple):
    """Paths inside a module; "" is the module's result.

    Args:
        readers: the convolutions that read the input as it is.
        norms: by convolution, the batch-norm that alone reads it.
        targets: by convolution, what alone reads its (normalised) result, perhaps behind a ReLU: another convolution, or the
            module's result, perhaps behind a maximum pooling.
        results: those of ``ends`` whose (normalised) result is what comes out of branch or shortcut.
    """

    readers: tuple[str, ...] = ()
    norms: dict[str, str] = {}  # noqa: RUF012
    targets: dict[str, str] = {}  # noqa: RUF012
    results: tuple[str, ...] = ()

    def within(self, path: str) -> Dataflow:
        """The same with the module's ``path`` before each."""

        def longer(names: dict[str, str]) -> dict[str, str]:
            return {f"{path}.{conv}": name and f"{path}.{name}" for conv, name in names.items()}

        readers, results = (tuple(f"{path}.{name}" for name in names) for names in (self.readers, self.results))
        return Dataflow(readers, longer(self.norms), longer(self.targets), results)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return isinstance(m, (nn.BatchNorm2d, DropPath)) or not any(True for _ in m.children())


def dataflow_of(module: nn.Module, ends: Collection[str] = ()) -> Dataflow:
    """The flow through ``module``, of which the convolutions ``ends`` are the last ones of branch and shortcut.

    Where its code cannot be traced, none is known.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever timm's code does with a proxy
        return Dataflow()
    modules = dict(module.named_modules())

    def layer(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    def source(node: fx.Node) -> fx.Node:
        while isinstance(layer(node), nn.Identity):
            node = node.all_input_nodes[0]
        return node

    def reader(node: fx.Node, kinds: tuple[type[nn.Module], ...] = _PASSING) -> fx.Node | None:
        """What alone reads ``node``, behind modules of ``kinds``."""
        while len(node.users) == 1:
            (node,) = node.users
            if not isinstance(layer(node), kinds):
                return node
        return None

    readers: list[str] = []
    norms: dict[str, str] = {}
    targets: dict[str, str] = {}
    results: list[str] = []
    for node in graph.nodes:
        if type(layer(node)) not in CONVOLUTIONS:
            continue
        name, last, user = str(node.target), node, reader(node, ())
        if source(node.all_input_nodes[0]).op == "placeholder":
            readers.append(name)
        if user is not None and isinstance(layer(user), nn.BatchNorm2d):
            last, norms[name] = user, str(user.target)
        if name in ends and (name in norms or user is None or isinstance(layer(user), (type(None), *_PASSING))):
            results.append(name)
        if not isinstance(getattr(layer(last), "act", None), (type(None), nn.ReLU, nn.Identity)):
            continue
        user = reader(last, (*_PASSING, nn.ReLU))
        if user is not None and type(layer(user)) in CONVOLUTIONS:
            targets[name] = str(user.target)
        elif (user := reader(last, (*_PASSING, nn.ReLU, nn.MaxPool2d))) is not None and user.op == "output":
            targets[name] = ""
    return Dataflow(tuple(readers), norms, targets, tuple(results))
