"""``dfs bench``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.config import (
    COMPARED_IMAGES,
    DEFAULT_EDGE_BITS,
    DEFAULT_MIX,
    PRESET_EDGE_BITS,
    DynamicConfig,
    GateKind,
    check_budget,
    parse_bits,
    parse_mix,
)
from dfs_cli.errors import ConfigError

_THREADS = 2

if TYPE_CHECKING:
    from dfs_cli.latency.subject import Subject

# What each way of measuring can be told; anything else that is given is a mistake.
_COMMON = {"model", "tuning", "threads", "repeats", "seed", "as_json"}
_OF_MODEL = {"bits", "edge_bits", "gate", "checkpoint", "pretrained", "img_size"}
_ALLOWED = {
    "a converted network": _COMMON | {"mix", "data", "val_split"},
    "MODEL": _COMMON | _OF_MODEL | {"mix"},
    "--tuning": _COMMON | _OF_MODEL | {"mirror", "budget", "batch_size", "amp", "device"},
}


def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="FILE|MODEL", help="What dfs convert wrote, or a timm architecture; see dfs list."),
    ],
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Time a tuning step of MODEL against fine-tuning the dense network.")
    ] = False,
    mix: Annotated[
        str | None,
        typer.Option(
            "--mix", help="Shares of the blocks by bitwidth, where decisions are not real [default: 0:0.5,8:0.5]."
        ),
    ] = None,
    data: options.DataDir = None,
    val_split: options.ValSplit = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="Threads, on as many cores [default: 2; with --tuning as many as there are cores].",
        ),
    ] = None,
    budget: Annotated[float, typer.Option("--budget", "-b", help="With --tuning: the budget tuned for.")] = 0.03,
    bits: options.Bits = None,
    edge_bits: options.EdgeBits = None,
    gate: Annotated[
        GateKind | None, typer.Option("--gate", help="The gate of MODEL [default: rnn; with --tuning probe].")
    ] = None,
    mirror: options.Mirror = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = True,
    img_size: options.ImgSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="With --tuning: images per step.")] = 16,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", metavar="N", help="Measure N times, in turns [default: 50; with --tuning 10]."),
    ] = None,
    seed: options.Seed = 0,
    amp: options.Amp = False,
    device: options.DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure time and memory, in turns within one run: of inference, or of tuning."""
    keep_freed_memory()
    is_file = model.endswith(".safetensors") or Path(model).is_file()
    way = "--tuning" if tuning else "a converted network" if is_file else "MODEL"
    for name in context.params:
        if name not in _ALLOWED[way] and _is_given(context, name):
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning for {way}")
    if is_file and tuning:
        raise ConfigError("--tuning measures a MODEL: a converted network is not tuned again")
    if not tuning:
        if is_file:
            subject = _subject_of_file(Path(model), mix, data, val_split, seed)
        else:
            subject = _subject_of_model(
                model, mix, bits, edge_bits, gate or "rnn", checkpoint, pretrained, img_size, seed
            )
        record = {"model": model} | _measure(
            subject, _THREADS if threads is None else threads, 50 if repeats is None else repeats
        )
        if as_json:
            typer.echo(json.dumps(record))
        else:
            from dfs_cli.report.latency import print_latency

            print_latency(record)
        return
    gate, repeats = gate or "probe", 10 if repeats is None else repeats
    check_budget(budget)
    mirrored = options.mirrors(gate, mirror, hflip=0.5)
    dynamic = options.dynamic_config(bits, edge_bits, gate, budget, mirrored)

    from rich.console import Console

    from dfs_cli.bench import bench_tuning, on_threads
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.config import TuningConfig
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible, load_model

    check_convertible(model)
    settings: dict[str, Any] = {"batch_size": batch_size, "amp": amp, "device": device, "seed": seed}
    module = load_model(model, pretrained, checkpoint)
    with (
        on_threads(threads) if threads is not None else nullcontext(),
        create_observer(stderr_console(), quiet=True) as observer,
    ):
        observer.stage("steps in turns", repeats + 2)
        record = {"model": model} | bench_tuning(
            module,
            resolve_preprocessing(module, img_size),
            dynamic,
            budget,
            TuningConfig(**settings),
            repeats,
            lambda done: observer.advance(1),
        )
    if as_json:
        typer.echo(json.dumps(record))
        return
    console = Console()
    size = "x".join(map(str, record["image_size"]))
    lines = [
        f"{model}, batches of {batch_size} images of {size}, options {','.join(map(str, record['options']))}, "
        f"gate {gate}, {record['device']}, {record['threads']} threads, {repeats} steps each in turns",
        *(
            f"{name:14} {t['median']:8.3f} s per step (quartiles {t['low']:.3f} to {t['high']:.3f}), "
            f"{record[f'{key}_bytes'] / 2**20:8.0f} MiB at its peak"
            for name, key, t in (
                ("fine-tuning", "dense", record["dense_seconds"]),
                ("dfs tuning", "tuning", record["tuning_seconds"]),
            )
        ),
        f"{'ratio':14} {record['time_ratio']:8.2f} of the time, {record['memory_ratio']:.2f} of the memory",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _subject_of_file(path: Path, mix: str | None, data: Path | None, val_split: str | None, seed: int) -> Subject:
    from dfs_cli.latency.subject import subject_of_file

    if val_split is not None and data is None:
        raise ConfigError("--val-split names a part of --data: pass that too")
    source = None if data is None else options.data_config(data, "", None, val_split, COMPARED_IMAGES, False)
    return subject_of_file(path, mix, source, seed)


def _subject_of_model(
    model: str,
    mix: str | None,
    bits: str | None,
    edge_bits: int | None,
    gate: GateKind,
    checkpoint: Path | None,
    pretrained: bool,
    img_size: int | None,
    seed: int,
) -> Subject:
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.latency.subject import default_mix, subject_of_model
    from dfs_cli.models.zoo import check_convertible, load_model

    check_convertible(model)
    dynamic = _dynamic_for(mix or DEFAULT_MIX, bits, edge_bits, gate)
    module = load_model(model, pretrained, checkpoint)
    size = resolve_preprocessing(module, img_size).input_size
    return subject_of_model(module, dynamic, size, mix or default_mix(dynamic.bits), seed)


def _measure(subject: Subject, threads: int, repeats: int) -> dict[str, Any]:
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.latency.measure import bench_inference

    with create_observer(stderr_console(), quiet=True) as observer:
        observer.stage("rounds", None)
        return bench_inference(subject, threads, repeats, observer.advance)


def _dynamic_for(mix: str, bits: str | None, edge_bits: int | None, gate: GateKind) -> DynamicConfig:
    """The options that ``bits`` names, or else those of the mix."""
    chosen = parse_bits(bits) if bits is not None else tuple(sorted(parse_mix(mix)))
    if len(chosen) == 1:
        chosen = (0, *chosen) if chosen[0] else (0, 8)
    edges = PRESET_EDGE_BITS.get(bits or "", DEFAULT_EDGE_BITS) if edge_bits is None else edge_bits
    return DynamicConfig(bits=chosen, edge_bits=edges, gate=gate)
