"""Space to depth: the first convolution reads 2 x 2 pixels as channels.

Integer kernels gather the inputs of a result channel by channel; for images, which have three channels, gathering takes longer
than multiplying. With every 2 x 2 pixels moved into the channels, a convolution of stride 2 becomes one of stride 1 over four
times the channels with half the kernel: the same sums, and some zeros.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dfs_cli.export.graph import Graph
from dfs_cli.export.trace import QuantizedLayer
from dfs_cli.nn.quantization import Convolution

_MOST_CHANNELS = 4


def on_merged_pixels(layer: QuantizedLayer, height: int, width: int) -> QuantizedLayer | None:
    """``layer`` for an input (N, C, ``height``, ``width``) that :func:`merge_pixels` has rearranged.

    Returns:
        None where the layer is not a dense convolution of stride 2 over few channels, or the size is odd.
    """
    geometry = layer.geometry
    if geometry is None or (geometry.stride, geometry.dilation, geometry.groups) != ((2, 2), (1, 1), 1):
        return None
    outputs, channels, *kernel = layer.codes.shape
    if channels > _MOST_CHANNELS or height % 2 or width % 2:
        return None
    places, parities, before, after = zip(
        *(
            _taps(size, padding, pixels)
            for size, padding, pixels in zip(kernel, geometry.padding, (height, width), strict=True)
        ),
        strict=True,
    )
    codes = np.zeros((outputs, 2, 2, channels, *(int(place.max()) + 1 for place in places)))
    rows, columns = np.ix_(*(np.arange(size) for size in kernel))
    row_of, column_of = parities[0][rows], parities[1][columns]
    codes[:, column_of, row_of, :, places[0][rows], places[1][columns]] = layer.codes.transpose(2, 3, 0, 1)
    codes = codes.reshape(outputs, 4 * channels, *codes.shape[4:])
    return replace(layer, codes=codes, geometry=Convolution((1, 1), (*before, *after), (1, 1), 1))


def _taps(size: int, padding: int, pixels: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The taps of a kernel along one axis.

    Args:
        size, padding: of the kernel.
        pixels: of the input.

    Returns:
        For each tap its place in the new kernel, and which pixel of two it reads; and the new padding before and after.
    """
    places, parities = np.divmod(np.arange(size) - padding, 2)
    before = -int(places.min())
    places = places + before
    results = (pixels + 2 * padding - size) // 2 + 1
    return places, parities, before, results + int(places.max()) - pixels // 2 - before


def merge_pixels(graph: Graph, x: str, channels: int, height: int, width: int) -> str:
    """Rearrange ``x`` (N, C, H, W) to (N, 4 C, H / 2, W / 2), ordered by column parity, row parity and channel.

    Whole rows are moved first, then columns by the transposition that the kernel needs anyway; one transposition of six axes
    would take ten times as long.
    """
    rows = graph.add("Reshape", [x, graph.constant([0, channels, height // 2, 2, width], np.int64)])
    halves = [graph.name("rows"), graph.name("rows")]
    graph.add("Split", [rows], halves, axis=3)
    merged = graph.add("Concat", halves, axis=1)
    merged = graph.add("Reshape", [merged, graph.constant([0, 2 * channels, height // 2, width], np.int64)])
    last = graph.add("Transpose", [merged], perm=[0, 2, 3, 1])
    last = graph.add("Reshape", [last, graph.constant([0, height // 2, width // 2, 4 * channels], np.int64)])
    return graph.add("Transpose", [last], perm=[0, 3, 1, 2])
