"""``dfs export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.config import COMPARED_IMAGES


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What dfs convert wrote.")],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="Where the graph goes.")],
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="The most common policy for every image: no gate, no control flow (OpenVINO and others)."
        ),
    ] = False,
    tensorrt: Annotated[
        bool,
        typer.Option(
            "--tensorrt",
            help="As --static, of what TensorRT's importer takes; in ONNX Runtime it is several times slower.",
        ),
    ] = False,
    data: options.DataDir = None,
    dataset: options.Dataset = "",
    val_split: options.ValSplit = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples",
            metavar="N",
            help=f"Compare graph and network on at most N images [default: {COMPARED_IMAGES}; 256 random ones].",
        ),
    ] = None,
    dataset_download: options.Download = False,
    workers: options.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    force: options.Force = False,
) -> None:
    """Write a converted network as an ONNX graph that skips for real, and check it against the network."""
    if num_samples is None and (data is not None or dataset):
        num_samples = COMPARED_IMAGES
    data_config = options.data_config(data, dataset, None, val_split, num_samples, dataset_download)

    from dfs_cli import api
    from dfs_cli.cli.progress import create_observer, stderr_console

    with create_observer(stderr_console(), quiet=True) as observer:
        converted = api.load(file, "cpu")
        comparison = api.export_onnx(
            converted,
            onnx,
            data_config,
            static=static,
            tensorrt=tensorrt,
            force=force,
            workers=workers,
            observer=observer,
        )
    if as_json:
        record = {
            "onnx": str(onnx),
            "static": static or tensorrt,
            "tensorrt": tensorrt,
            "bytes": onnx.stat().st_size,
        } | comparison.to_dict()
        typer.echo(json.dumps(record))
        return
    kind = "images" if comparison.labelled else "random images"
    typer.echo(f"{onnx}, {onnx.stat().st_size / 2**20:.1f} MiB, blocks hand on {comparison.features}")
    if any(2 <= b <= 7 for b in converted.manifest.dynamic.bits):
        typer.echo("options of 2 to 7 bits run on 8-bit kernels: they take as long as 8 bits")
    typer.echo(f"compared on {comparison.images} {kind}")
    typer.echo(f"same decisions {comparison.same_decisions:8.2%}, same answers {comparison.same_answers:.2%}")
    if comparison.labelled:
        typer.echo(f"top-1          {comparison.onnx_top1:8.2f}, of the network {comparison.top1:.2f}")
