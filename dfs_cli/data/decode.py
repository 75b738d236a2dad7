"""Image files as Pillow images of 8 bits per channel."""

from __future__ import annotations

import os
import warnings
from typing import IO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""Formats that are read, where Pillow was built with them. None of them starts another program, as EPS does."""

_BITS_PER_SAMPLE = 258  # the tag of TIFF


def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that are read, in lower case, as ``.jpg``."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """The first image in a file, decoded, with 8 bits per channel. The file's suffix does not matter.

    Samples of 16 bits are divided by 256; those in floating point are taken to lie between 0 and 1.

    Raises:
        Exception: whatever Pillow's decoders raise, or ValueError where the range of the samples is not known.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and large images; an image that cannot be read is an error
        image: Image.Image
        with Image.open(file, formats=formats) as image:
            image.load()
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                return image.convert("RGBA")
            return _in_8_bits(image)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """``image``, whose samples may be of 16 bits or in floating point: Pillow would clip them."""
    if image.mode.startswith("I"):
        # TIFF alone has other ranges than 16 bits: 12, or 32.
        bits: int = image.tag_v2[_BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16
        samples = np.asarray(image)
        if bits > 16 or samples.min() < 0:
            raise ValueError(f"the range of {image.mode} samples is not known")
        return Image.fromarray((samples >> (bits - 8)).astype(np.uint8))
    if image.mode == "F":
        samples = np.asarray(image)
        if not (samples.min() >= 0 and samples.max() <= 1):
            raise ValueError("samples in floating point are not between 0 and 1")
        return Image.fromarray((samples * 255).round().astype(np.uint8))
    return image
