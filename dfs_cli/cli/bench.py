"""``dfs bench``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.config import check_budget
from dfs_cli.errors import ConfigError


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A timm architecture; see dfs list.")],
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Time a tuning step against fine-tuning the dense network.")
    ] = False,
    budget: Annotated[float, typer.Option("--budget", "-b", help="The budget tuned for.")] = 0.03,
    bits: options.Bits = None,
    edge_bits: options.EdgeBits = None,
    gate: options.Gate = "probe",
    mirror: options.Mirror = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = True,
    img_size: options.ImgSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per step.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Measure N times, in turns.")] = 10,
    amp: options.Amp = False,
    device: options.DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure time and memory, in turns within one run."""
    if not tuning:
        raise ConfigError("say what to measure: --tuning")
    check_budget(budget)
    mirrored = options.mirrors(gate, mirror, hflip=0.5)
    dynamic = options.dynamic_config(bits, edge_bits, gate, budget, mirrored)

    from rich.console import Console

    from dfs_cli.bench import bench_tuning
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.config import TuningConfig
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible, load_model

    keep_freed_memory()
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
