"""``dfs sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.config import BASELINES, SweepConfig, check_budget
from dfs_cli.errors import ConfigError


def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A timm architecture; see dfs list.")],
    budgets: Annotated[
        str, typer.Option("--budgets", "-b", metavar="B,B,...", help="Budgets of the dynamic networks.")
    ] = "0.4,0.1,0.05,0.03,0.015",
    baselines: Annotated[
        str, typer.Option("--baselines", help="What to compare with: some of these, or none.")
    ] = ",".join(BASELINES),
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Results: JSON; a CSV and a plot beside it.")
    ] = Path("sweep.json"),
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat with N seeds.")] = 1,
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
    hflip: options.HFlip = None,
    min_crop: options.MinCrop = None,
    amp: options.Amp = False,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    seed: options.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object on stdout.")] = False,
    force: options.Force = False,
) -> None:
    """Compare dynamic networks with static ones and others at equal cost. An interrupted sweep goes on where it stopped."""
    wanted = options.numbers("--budgets", budgets) or ()
    for budget in wanted:
        check_budget(budget)
    names = tuple(name for name in baselines.split(",") if name != "none")
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "hflip": hflip, "min_crop": min_crop}
    given |= {"workers": workers, "amp": amp, "device": device, "seed": seed}
    statistics = {"mean": options.numbers("--mean", mean), "std": options.numbers("--std", std)}
    data_config = options.data_config(data, dataset, train_split, val_split, num_samples, dataset_download)

    import json

    from rich.console import Console

    from dfs_cli import api
    from dfs_cli.artifact.files import check_writable, write_atomically
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible, load_model
    from dfs_cli.report.plot import has_matplotlib, save_plot
    from dfs_cli.report.sweep import plot_sweep, points_csv, print_sweep
    from dfs_cli.sweep import sweep as run_sweep

    keep_freed_memory()
    check_convertible(model)
    # What lies beside the results of a sweep belongs to it.
    check_writable([output, output.with_suffix(".csv"), output.with_suffix(".png")], force or output.exists())
    data_config = api.default_data(model.partition(".")[0], data_config)
    tuning = options.tuned(api.default_tuning(data_config), **given)
    api.resolve_device(tuning.device)
    mirrored = options.mirrors(gate, mirror, tuning.hflip)
    config = SweepConfig(
        budgets=wanted,
        baselines=names,  # type: ignore[arg-type]  # checked by the class
        seeds=seeds,
        dynamic={budget: options.dynamic_config(bits, edge_bits, gate, budget, mirrored) for budget in wanted},
    )
    module = load_model(model, pretrained, checkpoint, num_classes, in_chans, seed)
    console = stderr_console()
    with create_observer(console, brief=True) as observer:
        results = run_sweep(
            module,
            config,
            output,
            data_config,
            tuning=tuning,
            preprocessing=resolve_preprocessing(module, img_size, crop_pct, **statistics),
            observer=observer,
            restart=force,
        )
    written = [output, output.with_suffix(".csv")]
    write_atomically(written[1], points_csv(results))
    if has_matplotlib():
        written.append(output.with_suffix(".png"))
        save_plot(plot_sweep(results), written[2])
    if as_json:
        typer.echo(json.dumps(results))
    else:
        print_sweep(Console(), results)
    console.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True, markup=False)
