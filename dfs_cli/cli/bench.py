"""``dfs bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.config import (
    DEFAULT_EDGE_BITS,
    DEFAULT_MIX,
    LARGE_BATCH,
    PRESET_EDGE_BITS,
    DynamicConfig,
    GateKind,
    check_budget,
    parse_bits,
    parse_mix,
)
from dfs_cli.errors import ConfigError


def bench(
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
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="Threads, on as many cores.")] = 2,
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
    if not tuning:
        record = _inference(
            model, mix, data, val_split, threads, bits, edge_bits, gate, checkpoint, pretrained, img_size, repeats, seed
        )
        if as_json:
            typer.echo(json.dumps(record))
        else:
            from dfs_cli.report.latency import print_latency

            print_latency(record)
        return
    if mix is not None or data is not None:
        raise ConfigError("--mix and --data are for inference: leave them out, or --tuning")
    gate, repeats = gate or "probe", 10 if repeats is None else repeats
    check_budget(budget)
    mirrored = options.mirrors(gate, mirror, hflip=0.5)
    dynamic = options.dynamic_config(bits, edge_bits, gate, budget, mirrored)

    from rich.console import Console

    from dfs_cli.bench import bench_tuning
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.config import TuningConfig
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible, load_model

    check_convertible(model)
    settings: dict[str, Any] = {"batch_size": batch_size, "amp": amp, "device": device}
    module = load_model(model, pretrained, checkpoint)
    with create_observer(stderr_console(), quiet=True) as observer:
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


def _inference(
    model: str,
    mix: str | None,
    data: Path | None,
    val_split: str | None,
    threads: int,
    bits: str | None,
    edge_bits: int | None,
    gate: GateKind | None,
    checkpoint: Path | None,
    pretrained: bool,
    img_size: int | None,
    repeats: int | None,
    seed: int,
) -> dict[str, Any]:
    repeats = 50 if repeats is None else repeats
    if not model.endswith(".safetensors"):
        if data is not None:
            raise ConfigError(f"--data is for the decisions of a converted network, which {model} is not: pass --mix")
        dynamic = _dynamic_for(mix or DEFAULT_MIX, bits, edge_bits, gate or "rnn")
    elif given := [name for name, value in (("bits", bits), ("edge-bits", edge_bits), ("gate", gate)) if value]:
        raise ConfigError(f"--{given[0]} is for MODEL: {model} has its own")

    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.latency.measure import bench_inference
    from dfs_cli.latency.subject import subject_of_file, subject_of_model
    from dfs_cli.models.zoo import check_convertible, load_model

    if model.endswith(".safetensors"):
        source = None if data is None else options.data_config(data, "", None, val_split, LARGE_BATCH, False)
        subject = subject_of_file(Path(model), mix, source, seed)
    else:
        check_convertible(model)
        module = load_model(model, pretrained, checkpoint)
        size = resolve_preprocessing(module, img_size).input_size
        subject = subject_of_model(module, dynamic, size, mix or DEFAULT_MIX, seed)
    with create_observer(stderr_console(), quiet=True) as observer:
        observer.stage("rounds", None)
        return {"model": model} | bench_inference(subject, threads, repeats, observer.advance)


def _dynamic_for(mix: str, bits: str | None, edge_bits: int | None, gate: GateKind) -> DynamicConfig:
    """The options that ``bits`` names, or else those of the mix."""
    chosen = parse_bits(bits) if bits is not None else tuple(sorted(parse_mix(mix)))
    if len(chosen) == 1:
        chosen = (0, *chosen) if chosen[0] else (0, 8)
    edges = PRESET_EDGE_BITS.get(bits or "", DEFAULT_EDGE_BITS) if edge_bits is None else edge_bits
    return DynamicConfig(bits=chosen, edge_bits=edges, gate=gate)
