"""Changes of valid files, one after the other from a source of chance, of many kinds."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from dfs_cli.artifact.artifact import tensor_digest

TEXTS = (
    "", " ", "x", "[red]x[/nope]", "[/]", "[link=file:///etc/passwd]x", ":smiley:", "\x1b[2J\x1b]0;x\x07", "a\nb\r\tc",
    "\x00", "\u202eevil", "\ud800", "../../etc/passwd", "/dev/zero", "hf-hub:timm/resnet18", "local-dir:/tmp", "resnet18",
    "resnet110_cifar", "vit_base_patch16_224", "resnetv2_152x4_bit", "tv_resnet50", "$(touch x)", "x" * 100_000,
    "{0.__class__}", "%n%s", "é" * 300, "nan", "1e999", "None", "torch.load",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 255, 4096, 65536, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**9, 10**18, 10**400,
    0.5, 1.5, -0.0, 1e-9, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf, 0.9999999, 1.0000001,
)  # fmt: skip


DEEP = "lists within lists"
"""Stands in a value of JSON for lists so deep that Python cannot hold them."""


def to_json(values: Any, rng: random.Random) -> str:
    """``values`` as JSON."""
    levels = rng.choice((10, 150, 300, 100_000))
    return json.dumps(values).replace(f'"{DEEP}"', "[" * levels + "]" * levels)


def any_value(rng: random.Random) -> Any:
    """A value of JSON that is seldom right."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind <= 2:
        return rng.choice(NUMBERS)
    return [None, True, [], {}, [rng.choice(NUMBERS)], {"a": rng.choice(TEXTS)}, DEEP][rng.randrange(7)]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within ``value``."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] + [path for key, item in inner for path in places(item, (*place, key))]


def change_value(rng: random.Random, values: dict[str, Any]) -> str:
    """Change one value of JSON in place, wherever it is; returns what was done."""
    # Half of the time near the top: nearly all values are of layers and choices.
    paths = places(values)[1:]
    depth = rng.choice((1, 2, 3, 9, 9))
    paths = [path for path in paths if len(path) <= depth]
    if not paths:
        return "nothing"
    *inner, key = rng.choice(paths)
    parent: Any = values
    for part in inner:
        parent = parent[part]
    old, action = parent[key], rng.choice(("replace", "replace", "delete", "add", "near", "near", "length"))
    if action == "delete":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = any_value(rng)
    elif action == "add":
        parent.insert(rng.randrange(len(parent) + 1), any_value(rng))
    elif action == "near" and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        parent[key] = rng.choice(
            (old + 1, old - 1, -old, old * 1000, old * 1.001, old / 2, float(old), str(old), [old])
        )
    elif action == "near" and isinstance(old, str):
        parent[key] = rng.choice((old + rng.choice(TEXTS), old[:-1], old.upper(), [old]))
    elif action == "length" and isinstance(old, list) and old:
        parent[key] = rng.choice((old[:-1], old + old[-1:], old[::-1], old * 50, old[1:]))
    else:
        parent[key] = any_value(rng)
    return f"{action} {'.'.join(map(str, (*inner, key)))[:80]}"


def change_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> str:
    """Change one tensor in place: its values, its shape, its type, its name, or whether it is there."""
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    action = rng.choice(("value", "value", "value", "shape", "type", "remove", "add", "rename", "stream", "stream"))
    if action == "value" and tensor.numel():
        flat = tensor.reshape(-1).clone()
        value = rng.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, 7.0, 100.0, -100.0, 3e38, 6e4, 1e-40))
        if not tensor.is_floating_point():
            value = rng.choice((0, 1, 2, 3, 127, 200))
        where = slice(None) if rng.random() < 0.3 else slice(rng.randrange(len(flat)), None, rng.choice((1, 7, 10**9)))
        flat[where] = value
        tensors[name] = flat.reshape(tensor.shape)
        return f"value {name} {value}"
    if action == "shape":
        shapes = (
            tensor.reshape(-1), tensor[None], tensor.reshape(-1)[:1].reshape(()) if tensor.numel() else tensor,
            tensor.reshape(-1)[:0], tensor.reshape(-1)[:-1], torch.cat([tensor.reshape(-1)] * 3),
        )  # fmt: skip
        tensors[name] = rng.choice(shapes).clone()
    elif action == "type":
        kinds = (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.int64,
            torch.bool,
            torch.uint8,
            torch.complex64,
        )
        tensors[name] = tensor.to(rng.choice(kinds))
    elif action == "remove":
        del tensors[name]
    elif action == "add":
        tensors[rng.choice((*TEXTS[2:8], f"{name}.weight_steps", f"{name}x"))] = torch.zeros(rng.choice((0, 1, 1000)))
    elif action == "rename":
        tensors[rng.choice((f"{name}x", name[:-1], *TEXTS[3:6]))] = tensors.pop(name)
    elif tensor.dtype == torch.uint8 and tensor.dim() == 1:
        tensors[name] = change_stream(rng, tensor)
    else:
        tensors[name] = tensor * rng.choice((-1, 2, 1000))
    return f"{action} {name}"


def change_stream(rng: random.Random, packed: Tensor) -> Tensor:
    """Another content of a packed tensor."""
    try:
        content = bytearray(zlib.decompress(packed.numpy().tobytes()))
    except zlib.error:
        return packed.flip(0)
    if rng.random() < 0.2:
        content = bytearray(rng.choice((0, 1, len(content) + 1, 10**8)))
    elif rng.random() < 0.5:
        planes = memoryview(content)[-len(content) // 4 :]
        planes[:] = bytes([rng.choice((0x7F, 0xFF, 0x80))]) * len(planes)  # exponents of infinite and undefined numbers
    else:
        for _ in range(rng.choice((1, 100))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return torch.frombuffer(bytearray(zlib.compress(bytes(content), 1)), dtype=torch.uint8)


def change_bytes(rng: random.Random, whole: bytes) -> tuple[bytes, str]:
    """A file with a few other bytes, or fewer, or more of them."""
    action = rng.choice(("flip", "flip", "cut", "remove", "repeat", "zero", "start"))
    at = rng.randrange(len(whole)) if rng.random() < 0.5 else rng.randrange(min(len(whole), 2000))
    if action == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :], f"flip {at}"
    if action == "cut":
        return whole[:at], f"cut {at}"
    length = rng.choice((1, 8, 1000))
    if action == "remove":
        return whole[:at] + whole[at + length :], f"remove {at}"
    if action == "repeat":
        return whole[:at] + whole[at : at + length] * 2 + whole[at + length :], f"repeat {at}"
    if action == "zero":
        return whole[:at] + bytes(length) + whole[at + length :], f"zero {at}"
    start = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, 99_999_999, len(whole)))
    return start.to_bytes(8, "little") + whole[8:], f"start {start}"


def change_header(rng: random.Random, whole: bytes) -> tuple[bytes, str]:
    """A safetensors file with another header before the same data."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    what = change_value(rng, header)
    text = to_json(header, rng).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :], f"header {what}"


def change_artifact(rng: random.Random, whole: bytes) -> tuple[bytes, str]:
    """A changed artifact; where the manifest or tensors are changed, half of the time with the right checksum."""
    kind = rng.choice(("bytes", "header", "manifest", "manifest", "manifest", "tensors", "tensors"))
    if kind == "bytes":
        return change_bytes(rng, whole)
    if kind == "header":
        return change_header(rng, whole)
    length = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"]
    tensors = load(whole)
    if kind == "manifest":
        values = json.loads(metadata["dfs_manifest"])
        done = [change_value(rng, values) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        metadata["dfs_manifest"] = to_json(values, rng)
    else:
        done = [change_tensor(rng, tensors) for _ in range(rng.choice((1, 1, 2)))]
    if is_right := rng.random() < 0.7:  # more than half, as changes of bytes and header cannot have it
        metadata["dfs_sha256"] = tensor_digest(tensors, metadata["dfs_manifest"])
    try:
        return save({k: v.contiguous() for k, v in tensors.items()}, metadata), f"{kind} {done} checksum {is_right}"
    except Exception:  # a name that safetensors cannot write
        return change_bytes(rng, whole)


class Trap:
    """What runs when a pickle that holds it is loaded without care."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> None:
    Trap.sprung = True


def change_checkpoint(rng: random.Random, state: dict[str, Tensor]) -> tuple[bytes, str, str]:
    """A changed checkpoint, what was done, and the suffix of its name."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    done = [change_tensor(rng, state) for _ in range(rng.choice((0, 1, 1, 2)))]
    if rng.random() < 0.3:
        try:
            whole = save({k: v.contiguous() for k, v in state.items()})
        except Exception:
            whole = b""
        if rng.random() < 0.4 and whole:
            whole, what = rng.choice((change_bytes, change_header))(rng, whole)
            done.append(what)
        return whole, f"safetensors {done}", ".safetensors"
    content: Any = state
    wrapper = rng.choice(
        ("", "", "state_dict", "model", "net", "model_ema", "[red]x", "two", "trap", "scalars", "nested")
    )
    if wrapper == "two":
        content = {"state_dict": state, rng.choice(("state_dict_ema", "other")): state}
    elif wrapper == "trap":
        content = rng.choice((Trap(), {"state_dict": state, "args": Trap()}, [Trap()], state | {"x": Trap()}))
    elif wrapper == "scalars":
        content = rng.choice(({"a": 1}, [state], state | {"x": any_value(rng)}, {1: state}, any_value(rng)))
    elif wrapper == "nested":
        content = {"a": {"b": {"c": {"d": {"e": state}}}}, "l": [[[[[[[[[[state]]]]]]]]]]}
    elif wrapper:
        content = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}
    if rng.random() < 0.3 and isinstance(content, dict) and content is state:
        content = {
            rng.choice(("module.", "model.", "_orig_mod.", "a.b.c.", "\x1b[2J.")) + k: v for k, v in state.items()
        }
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    except Exception:
        buffer = io.BytesIO(pickle.dumps(done))
    whole = buffer.getvalue()
    if rng.random() < 0.4:
        whole, what = change_bytes(rng, whole)
        done.append(what)
    return whole, f"pickle {wrapper!r} {done}", ".pth"


class Case(NamedTuple):
    """A changed file, and the command that reads it.

    Args:
        content: of the file.
        suffix: of its name.
        command: arguments; FILE stands for the file.
        what: was changed.
    """

    content: bytes
    suffix: str
    command: tuple[str, ...]
    what: str


FILE = "FILE"
READING = (
    ("profile", FILE), ("profile", FILE, "--csv"), ("profile", FILE, "--json"), ("eval", FILE, "--num-samples", "20"),
    ("eval", FILE, "--num-samples", "20"),
)  # fmt: skip
CHECKPOINT = ("convert", "resnet20_digits", "--budget", "0.1", "--dry-run", "--checkpoint", FILE)


def draw(rng: random.Random, artifacts: Sequence[bytes], state: dict[str, Tensor]) -> Case:
    """A case.

    Args:
        artifacts: valid files of the digits model.
        state: its weights.
    """
    if rng.random() < 0.15:
        content, what, suffix = change_checkpoint(rng, state)
        return Case(content, suffix, CHECKPOINT, what)
    content, what = change_artifact(rng, rng.choice(artifacts))
    return Case(content, ".safetensors", rng.choice(READING), what)
