"""A program: evaluates networks on an accelerator that computes on the CPU, and prints what they waited for as JSON.

PyTorch lets Python stand in for a device. Its tensors say that they are elsewhere and hold their values here; an operation that
mixes devices is an error, as it is on a GPU, and what a GPU must be waited for is counted: reading its results, and copies to
or from it, but for those to it that need not be waited for (``non_blocking``). What is registered for that holds for the whole
process, so that this is a program of its own.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from common import RNN, make_dynamic, spread_gate, tiny_resnet
from safetensors import safe_open
from timm.models.resnet import Bottleneck
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import dfs_cli
import dfs_cli.api

DEVICE = torch.device("privateuseone", 0)
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}
AMP_OPERATIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


class There(torch.Tensor):
    """A tensor that says that it lies on the accelerator."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
            )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        return run(func, args, kwargs or {})

    def tolist(self):  # type: ignore[no-untyped-def]
        return self.cpu().tolist()


waits: Counter[str] = Counter()


def run(func, args, kwargs):  # type: ignore[no-untyped-def]
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    asked = kwargs.get("device")
    to_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if name == "copy_":
        to_there = isinstance(args[0], There)
    here = [x for x in tensors if not isinstance(x, There) and x.dim()]
    indices = [x for x in args[1] if x is not None] if name in INDEXING else []
    if there and name != "copy_" and any(all(x is not i for i in indices) for x in here):
        raise RuntimeError(f"{name} mixes devices")
    if any(isinstance(i, There) for i in indices) and not isinstance(args[0], There):
        raise RuntimeError(f"{name} takes indices from elsewhere")
    reads = name in READS or not to_there or any(i.dtype == torch.bool for i in indices)
    # An index of the CPU is copied first; an element of it, or a number, goes with the call.
    sends = here and to_there and not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
    if (there and reads) or sends:
        waits[name] += 1
    if not there and not to_there:
        return func(*args, **kwargs)
    args_here, kwargs_here = tree_map_only(There, lambda x: x.here, (args, kwargs))
    if asked is not None:
        kwargs_here["device"] = torch.device("cpu")
    result = lstm_cell(*args_here) if name == "_thnn_fused_lstm_cell" else func(*args_here, **kwargs_here)
    if not to_there:
        return result
    result = tree_map_only(torch.Tensor, There, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def lstm_cell(inputs, hidden, memory, *biases):  # type: ignore[no-untyped-def]
    """The kernel that accelerators have for it, and the CPU has not."""
    i, f, g, o = (inputs + hidden + sum(biases)).chunk(4, dim=1)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory, inputs


class Accelerator(TorchDispatchMode):
    """Makes tensors on the accelerator where they are asked for."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return run(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def lower(operation):  # type: ignore[no-untyped-def]
    """What automatic mixed precision makes of ``operation``."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def run(*args, **kwargs):  # type: ignore[no-untyped-def]
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in args), **kwargs)

    return run


@torch.no_grad()
def network_waits(gate: str) -> dict[str, int]:
    """Waits of one batch and of one image, once they proved to be answered as on the CPU."""
    network = make_dynamic(tiny_resnet(Bottleneck), RNN.replace(gate=gate)).eval().requires_grad_(False)
    if gate != "static":
        spread_gate(network)
    if gate == "probe":
        network.controller.operating_point = -1.0
    # Images for which no sum is a tie between two codes: the last bit, in which devices differ, would round it.
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = network.run(images)
    assert (expected.decisions.distinct() > 2) == (gate != "static"), "the images must be decided on differently"
    found = {}
    with Accelerator():
        network.to(DEVICE)
        network.run(images.to(DEVICE))  # what is read once is read
        for kind, batch in (("batch", images), ("image", images[:1])):
            batch = batch.to(DEVICE)
            waits.clear()
            output = network.run(batch)
            found[kind] = waits.total()
            options = output.decisions.options
            assert isinstance(output.logits, There) and isinstance(options, There)
            assert torch.equal(options.here, expected.decisions.options[: len(batch)])
            torch.testing.assert_close(output.logits.here, expected.logits[: len(batch)], rtol=1e-4, atol=1e-4)
        batch = images.to(DEVICE)
        waits.clear()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            network.run(batch)
        found["mixed"] = waits.total()
    return found


def evaluate(file: Path) -> dict[str, float]:
    """Evaluate ``file`` there, in full and in mixed precision, and save it again."""
    expected = dfs_cli.evaluate(dfs_cli.load(file), workers=0)
    with Accelerator(), mock.patch.object(dfs_cli.api, "resolve_device", lambda _: DEVICE):
        converted = dfs_cli.load(file, "cuda")
        converted.network.requires_grad_(False)
        found = dfs_cli.evaluate(converted, workers=0)
        assert (found.top1, found.cost, found.choices) == (expected.top1, expected.cost, expected.choices)
        mixed = dfs_cli.evaluate(converted, workers=0, amp=True, channels_last=True)
        again = file.with_name("again.safetensors")
        dfs_cli.save(converted, again)
    with safe_open(str(file), "pt") as first, safe_open(str(again), "pt") as second:
        assert first.metadata() == second.metadata()  # checksums, too
    return {"top1": found.top1, "mixed_top1": mixed.top1, "mixed_is_lower": mixed.choices != found.choices}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(backend_module=Backend())
    # torch.tensor(..., device=DEVICE) makes a tensor here and moves it; parameters are replaced by those of another class.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    amp = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for operation in AMP_OPERATIONS:
        amp.impl(operation, lower(operation))
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    found = {gate: network_waits(gate) for gate in ("rnn", "ff", "probe", "static")}
    sys.stdout.write(json.dumps(found | {"file": evaluate(Path(sys.argv[1]))}))
