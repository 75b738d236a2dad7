"""``dfs bench-tuning``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.cli.output import Output
from dfs_cli.config import TuningConfig
from dfs_cli.presets import parse_bits
from dfs_cli.ranges import check_budget

EXAMPLES = """
Examples:

  dfs bench-tuning resnet50 --no-pretrained

  dfs bench-tuning resnet50 --no-pretrained --gate rnn --device cuda --amp
"""


def bench_tuning(
    model: options.ModelName,
    weights: options.ModelOptions,
    sink: Output,
    budget: Annotated[
        float, typer.Option("--budget", "-b", help="The budget tuned for.", rich_help_panel=options.NETWORK)
    ] = 0.03,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            help="Options of a block, as 0,4,8,32, or the name of a preset (default: as many bits as the budget pays for).",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    fixed_bits: options.FixedBits = None,
    gate: options.Gate = "probe",
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Show the probe's second pass the mirrored image (default: mirrored).",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    img_size: options.ImgSize = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Images per step.", rich_help_panel=options.TUNING)
    ] = 16,
    seed: options.Seed = 0,
    amp: options.Amp = False,
    device: options.DeviceOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="Threads (default: those of PyTorch).",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option("--repeats", metavar="N", help="Steps of each kind, in turns.", rich_help_panel=options.TUNING),
    ] = 10,
) -> None:
    """Measure time and memory of a tuning step against a step of fine-tuning the dense network, on random images."""
    check_budget(budget)
    preset = None if bits is None else parse_bits(bits)
    tuning = TuningConfig(batch_size=batch_size, amp=amp, device=device, seed=seed)

    from dfs_cli.bench.clock import on_threads
    from dfs_cli.bench.tuning import bench_tuning as measure
    from dfs_cli.conversion.defaults import default_dynamic
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible
    from dfs_cli.report.bench import print_tuning

    check_convertible(model)
    dynamic = default_dynamic(budget, tuning, gate, preset, fixed_bits, mirror, spend=True)
    module = weights.load(model, seed).model
    preprocessing = resolve_preprocessing(module, img_size)
    with on_threads(threads) if threads is not None else nullcontext(), sink.observer() as observer:
        measured = measure(module, preprocessing, dynamic, budget, tuning, repeats, observer)
    record = {"model": model} | measured.to_dict()
    sink.result(record, lambda console: print_tuning(console, record))
