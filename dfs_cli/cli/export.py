"""``dfs export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.cli.output import Output
from dfs_cli.config import COMPARED_IMAGES
from dfs_cli.presets import parse_batch

EXAMPLES = """
Examples:

  dfs export model.safetensors --onnx model.onnx --data imagenet/

  dfs export model.safetensors --onnx plain.onnx --static --data imagenet/

  dfs export model.safetensors --onnx batches.onnx --batch dynamic --data imagenet/
"""


def export(
    file: options.FileName,
    onnx: Annotated[
        Path, typer.Option("--onnx", metavar="FILE", help="Where the graph goes.", rich_help_panel=options.OUTPUT)
    ],
    images: options.EvalDataOptions,
    sink: Output,
    limit: options.Limit = None,
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
    batch: Annotated[
        str,
        typer.Option(
            "--batch",
            metavar="N|dynamic",
            help="Images that the graph takes at once; dynamic: any number. The second pass runs on the unsure ones alone.",
        ),
    ] = "1",
    workers: options.Workers = None,
    force: options.Force = False,
) -> None:
    """Write a converted network as an ONNX graph that skips for real, and check it against the network."""
    size = parse_batch(batch)
    data = images.config()
    if data.num_samples is None and data.names_data:
        data = dataclasses.replace(data, num_samples=COMPARED_IMAGES)

    from dfs_cli import api
    from dfs_cli.outputs import check_writable
    from dfs_cli.report.cost import export_record
    from dfs_cli.report.terminal import print_export

    check_writable([onnx], force, [file, images.class_map])
    with sink.observer() as observer:
        converted = api.load(file, "cpu")
        if limit is not None:
            converted = api.recalibrate(converted, limit=limit)
        comparison = api.export_onnx(
            converted,
            onnx,
            data,
            static=static,
            tensorrt=tensorrt,
            batch=size,
            force=force,
            workers=workers,
            observer=observer,
        )
    record = export_record(onnx, static or tensorrt, tensorrt, size, comparison.to_dict())
    sink.result(record, lambda console: print_export(console, record, converted.manifest.dynamic.bits))
