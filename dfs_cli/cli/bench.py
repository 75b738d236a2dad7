"""``dfs bench``."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.cli.output import Output
from dfs_cli.config import COMPARED_IMAGES, DataConfig, DynamicConfig, GateKind
from dfs_cli.errors import ConfigError
from dfs_cli.presets import DEFAULT_MIX, Preset, parse_bits, parse_mix
from dfs_cli.ranges import BATCH_SIZES, LARGEST_SEED, check_batch_sizes, check_range

if TYPE_CHECKING:
    from dfs_cli.bench.workload import Workload

EXAMPLES = """
Examples:

  dfs bench model.safetensors --data imagenet/

  dfs bench model.safetensors --data imagenet/ --against static.safetensors --plot time.png

  dfs bench model.safetensors --mix 0:0.5,8:0.5

  dfs bench resnet50 --no-pretrained --mix 0:0.25,8:0.75 --threads 4

  dfs bench resnet50 --no-pretrained --gate probe --mix 8:1 --first-view 0.625 --refined 0.25

  dfs bench resnet50 --cost-table costs.json
"""

_MEASUREMENT = "Measurement"
_REFUSED = {
    "a converted network": (options.MODEL, options.PREPROCESSING, options.NETWORK),
    "MODEL": (options.DATA,),
}
"""The panels whose options have no meaning for what is measured."""
_GATES: tuple[GateKind, ...] = ("probe", "rnn", "ff")
"""Those that decide, of which a cost table says what that takes."""
_NEED_DATA = ("val_split", "num_samples", "checkpoint", "against", "plot")
"""Of a converted network, the options that are for real images."""


def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="FILE|MODEL", help="What dfs convert wrote, or a timm architecture; see dfs list."),
    ],
    weights: options.ModelOptions,
    sink: Output,
    mix: Annotated[
        str | None,
        typer.Option(
            "--mix",
            metavar="BITS:SHARE,...",
            help="Shares of the blocks by bitwidth, where decisions are not real (default: half at the fewest bits, "
            "half at 8).",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Compare with another converted network, dynamic or static, on the same images; may be given several times.",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", metavar="N", help="Threads of PyTorch and ONNX Runtime.", rich_help_panel=_MEASUREMENT
        ),
    ] = 1,
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats", metavar="N", help="Time every image N times, in turns.", rich_help_panel=_MEASUREMENT
        ),
    ] = 3,
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-sizes",
            metavar="N,...",
            help="Images per run in ONNX Runtime, besides single ones: divisors of 64; 1: single images alone.",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = ",".join(map(str, BATCH_SIZES)),
    seed: Annotated[int, typer.Option("--seed", help="Random seed.", rich_help_panel=_MEASUREMENT)] = 0,
    data: options.DataDir = None,
    val_split: options.ValSplit = None,
    num_samples: options.NumSamples = COMPARED_IMAGES,
    img_size: options.ImgSize = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            help="Options of a block, as 0,4,8,32, or the name of a preset (default: those of --mix).",
            rich_help_panel=options.NETWORK,
        ),
    ] = None,
    fixed_bits: options.FixedBits = None,
    gate: options.Gate = "rnn",
    first_view: options.FirstView = None,
    refined: Annotated[
        float,
        typer.Option(
            "--refined",
            metavar="SHARE",
            help="Of MODEL with --gate probe, how many of the images take the second pass, at one policy for all.",
            rich_help_panel=options.NETWORK,
        ),
    ] = 0.0,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw top-1 over mean time (.png, .svg or .pdf).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    cost_table: Annotated[
        Path | None,
        typer.Option(
            "--cost-table",
            metavar="FILE",
            help="Of MODEL: measure what each part takes in ONNX Runtime, for dfs convert --objective FILE, and nothing else "
            "(default --bits: lowbit; --gate: all).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Measure time and memory of inference, dense and dynamic, in turns.

    FILE: a converted network, with its own decisions on validation images of --data, beside the original and static int8,
    calibrated on training images; else with the decisions of --mix on random images.

    MODEL: an architecture, converted without tuning, with the decisions of --mix on random images.
    """
    is_file = model.endswith(".safetensors") or Path(model).is_file()
    _check_given(context, "a converted network" if is_file else "MODEL", data is not None)
    check_range("seed", seed, 0, LARGEST_SEED)
    shares = None if mix is None else parse_mix(mix)
    sizes = _batch_sizes(batch_sizes)

    from dfs_cli.outputs import reserve
    from dfs_cli.report.bench import print_inference

    if plot is not None:
        from dfs_cli.report.plot import check_plot_path

        check_plot_path(plot)
    if cost_table is not None:
        if is_file:
            raise ConfigError("--cost-table has no meaning for a converted network: pass its architecture")
        chosen = context.get_parameter_source("gate")
        gates = (gate,) if chosen is not None and chosen.name != "DEFAULT" else _GATES
        dynamic = _dynamic_config(shares, bits or "lowbit", fixed_bits, gate)
        _write_costs(cost_table, model, weights, dynamic, gates, img_size, threads, seed, force, sink)
        return
    files = [Path(model), *(against or [])] if is_file else []
    with reserve([plot] if plot else [], force, files) as outputs:
        rivals: dict[str, Workload] = {}
        if is_file:
            from dfs_cli.bench.workload import workload_of_file

            source = None
            if data is not None:
                source = DataConfig(data_dir=str(data), val_split=val_split, num_samples=num_samples)
            workload = workload_of_file(Path(model), shares, source, weights.checkpoint, seed, sink.say)
            for file in against or []:
                rivals[_free_name(file, rivals)] = workload_of_file(file, None, source)
        else:
            dynamic = _dynamic_config(shares, bits, fixed_bits, gate)
            dynamic = dynamic.replace(first_view=first_view, alike=refined > 0)
            workload = _workload_of_model(model, weights, dynamic, img_size, shares, seed, refined)

        from dfs_cli.bench.inference import bench_inference

        with sink.observer() as observer:
            measured = bench_inference(workload, threads, repeats, rivals, sizes, observer)
        record = {"model": model} | measured.to_dict()
        sink.result(record, lambda console: print_inference(console, record))
        if plot is not None:
            from dfs_cli.report.plot import plot_file, plot_times

            outputs.write([plot_file(plot_times(record), plot)])


def _write_costs(
    path: Path,
    model: str,
    weights: options.ModelOptions,
    dynamic: DynamicConfig,
    gates: Sequence[GateKind],
    img_size: int | None,
    threads: int,
    seed: int,
    force: bool,
    sink: Output,
) -> None:
    """Measure the cost table of a model, and write it."""
    from dfs_cli.atomic import File
    from dfs_cli.bench.cost_table import measure_costs
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible
    from dfs_cli.outputs import reserve
    from dfs_cli.report.bench import print_costs

    check_convertible(model)
    with reserve([path], force, [weights.checkpoint]) as outputs:
        module = weights.load(model, seed).model
        input_size = resolve_preprocessing(module, img_size).input_size
        with sink.observer() as observer:
            costs = measure_costs(module, dynamic, input_size, gates, threads, model, seed, observer)
        record = costs.to_dict()
        outputs.write([File(path, json.dumps(record, indent=1) + "\n")])
        sink.result(record, lambda console: print_costs(console, record))
        sink.say(f"wrote {path}")


def _batch_sizes(text: str) -> tuple[int, ...]:
    """The sizes in ``text``, separated by commas."""
    try:
        sizes = tuple(int(part) for part in text[:100].split(","))
    except ValueError:
        raise ConfigError(f"--batch-sizes {text[:40]!r}: expected numbers separated by commas, as 1,8,32") from None
    check_batch_sizes(sizes)
    return sizes


def _free_name(file: Path, taken: Collection[str]) -> str:
    """The name of a file's row: that of the file, or its path where that is taken."""
    return str(file) if file.stem in taken else file.stem


def _check_given(context: typer.Context, measured: str, has_data: bool) -> None:
    """Raises ConfigError where an option is given that has no meaning for what is measured."""
    for parameter in context.command.params:
        source = None if parameter.name is None else context.get_parameter_source(parameter.name)
        if source is None or source.name == "DEFAULT":
            continue
        needs_data = measured != "MODEL" and parameter.name in _NEED_DATA
        if needs_data and not has_data:
            raise ConfigError(f"{parameter.opts[0]} is for real images: pass --data DIR, too")
        is_refused = getattr(parameter, "rich_help_panel", None) in _REFUSED[measured]
        if (is_refused and not needs_data) or (measured == "MODEL" and parameter.name in ("against", "plot")):
            raise ConfigError(f"{parameter.opts[0]} has no meaning for {measured}")


def _dynamic_config(
    shares: dict[int, float] | None, bits: str | None, fixed_bits: int | None, gate: GateKind
) -> DynamicConfig:
    """The options that ``bits`` names, or else those of the mix."""
    if bits is not None:
        preset = parse_bits(bits)
    else:
        mixed = tuple(sorted(shares or parse_mix(DEFAULT_MIX)))
        preset = Preset(mixed if len(mixed) > 1 else (0, mixed[0] or 8))
    return DynamicConfig(preset.bits, preset.fixed_bits if fixed_bits is None else fixed_bits, gate)


def _workload_of_model(
    model: str,
    weights: options.ModelOptions,
    dynamic: DynamicConfig,
    img_size: int | None,
    shares: dict[int, float] | None,
    seed: int,
    refined: float,
) -> Workload:
    from dfs_cli.bench.workload import workload_of_model
    from dfs_cli.data.preprocessing import resolve_preprocessing
    from dfs_cli.models.zoo import check_convertible

    check_convertible(model)
    module = weights.load(model, seed).model
    input_size = resolve_preprocessing(module, img_size).input_size
    return workload_of_model(module, dynamic, input_size, shares, seed, refined)
