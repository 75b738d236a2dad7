"""``dfs convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.config import check_budget
from dfs_cli.errors import BudgetMissedError, ConfigError


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A timm architecture, as resnet50 or resnet50.a1_in1k; see dfs list.")
    ],
    budget: Annotated[
        float,
        typer.Option("--budget", "-b", help="Target cost, gate included, as a fraction of the dense 32-bit network's."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path(
        "model.safetensors"
    ),
    bits: options.Bits = None,
    edge_bits: options.EdgeBits = None,
    gate: options.Gate = "probe",
    mirror: options.Mirror = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = True,
    num_classes: options.NumClasses = None,
    in_chans: options.InChans = None,
    data: options.DataDir = None,
    dataset: options.Dataset = "",
    train_split: options.TrainSplit = None,
    val_split: options.ValSplit = None,
    num_samples: options.NumSamples = None,
    dataset_download: options.Download = False,
    img_size: options.ImgSize = None,
    crop_pct: options.CropPct = None,
    mean: options.Mean = None,
    std: options.Std = None,
    epochs: options.Epochs = None,
    batch_size: options.TrainBatchSize = None,
    lr: options.LearningRate = None,
    freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="Tune gates and quantizers only.")] = False,
    hflip: options.HFlip = None,
    min_crop: options.MinCrop = None,
    amp: options.Amp = False,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    seed: options.Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its costs; train and write nothing.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Convert a pretrained ResNet to a budget, tune it, and write it with a cost report."""
    check_budget(budget)
    dynamic = options.dynamic_config(bits, edge_bits, gate, budget, mirror=False)
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "hflip": hflip, "min_crop": min_crop}
    given |= {"workers": workers, "amp": amp, "freeze_backbone": freeze_backbone, "device": device, "seed": seed}
    statistics = {"mean": options.numbers("--mean", mean), "std": options.numbers("--std", std)}
    data_config = options.data_config(data, dataset, train_split, val_split, num_samples, dataset_download)
    if not output.name:
        raise ConfigError(f"--output {str(output)!r} is not a file name")
    reports = (output.with_suffix(".report.json"), output.with_suffix(".report.md"))

    # Everything above needs no torch, so that a misspelt option answers at once.
    import dataclasses

    from dfs_cli import api
    from dfs_cli.artifact.files import check_writable, write_atomically
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible, load_model, load_outline
    from dfs_cli.report.markdown import render_markdown
    from dfs_cli.report.terminal import print_plan

    keep_freed_memory()
    check_convertible(model)
    if not dry_run:
        check_writable((output, *reports), force)
        data_config = api.default_data(model.partition(".")[0], data_config)
    tuning = options.tuned(api.default_tuning(data_config), **given)
    dynamic = dataclasses.replace(dynamic, mirror=options.mirrors(gate, mirror, tuning.hflip))
    api.resolve_device(tuning.device)
    if dry_run:
        module = load_outline(model, checkpoint, num_classes, in_chans)
    else:
        module = load_model(model, pretrained, checkpoint, num_classes, in_chans, seed)
    preprocessing = resolve_preprocessing(module, img_size, crop_pct, **statistics)
    console = stderr_console()
    if dry_run:
        from rich.console import Console

        table = api.plan(module, dynamic, preprocessing)
        print_plan(Console(), model, table, budget)
        table.check_budget(budget)
        return
    weights = str(checkpoint) if checkpoint else None if pretrained else "random"
    with create_observer(console) as observer:
        converted = api.convert(
            module,
            budget,
            data_config,
            dynamic=dynamic,
            tuning=tuning,
            preprocessing=preprocessing,
            source=api.describe_source(module, weights),
            observer=observer,
        )
    api.save(converted, output, force)
    report = api.cost_report(converted)
    write_atomically(reports[0], json.dumps(report, indent=1) + "\n")
    write_atomically(reports[1], render_markdown(report))
    _print_summary(console, report, (output, *reports))
    if not converted.keeps_budget:
        raise BudgetMissedError(
            f"the budget was missed: cost {report['cost']:.4f} on the validation split is outside "
            f"[{LOWEST_SHARE * budget:.4f}, {HIGHEST_SHARE * budget:.4f}]; {output} was written as it is"
        )


def _print_summary(console: Any, report: dict[str, Any], paths: tuple[Path, ...]) -> None:
    unreadable = report["unreadable_images"] + report["configuration"]["unreadable_training_images"]
    lines = [
        f"top-1   {report['top1_before']:.2f} % -> {report['top1_after']:.2f} % on {report['images']} images",
        f"cost    {report['cost']:.4f} of dense 32-bit, budget {report['budget']:g} "
        f"(everything statically at 8 bits: {report['cost_all_8_bit']:.4f})",
        f"wrote   {', '.join(map(str, paths))}",
    ]
    if unreadable:
        lines.insert(2, f"skipped {len(unreadable)} unreadable images: {', '.join(unreadable[:10])}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
