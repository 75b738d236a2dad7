import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfs_cli.data.decode import image_suffixes, read_image

RAMP = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
EXACT = ("BMP", "DIB", "GIF", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
LOSSY = ("AVIF", "JPEG", "JPEG2000", "MPO")


def encoded(image: Image.Image, name: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", EXACT + LOSSY)
def test_every_format_is_read(name: str) -> None:
    image = Image.fromarray(RAMP)
    colour = image.convert("RGB")
    options = {"lossless": True} if name == "WEBP" else {"quality": 100} if name in ("AVIF", "JPEG", "MPO") else {}
    read = read_image(encoded(image if name == "GIF" else colour, name, **options)).convert("L")
    assert np.abs(np.asarray(read).astype(int) - RAMP).max() <= (0 if name in EXACT else 4)


def test_suffixes() -> None:
    expected = [".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
    assert set(expected) <= image_suffixes()
    assert not image_suffixes() & {".eps", ".pdf", ".ps", ".txt", ".npy"}


@pytest.mark.parametrize("name", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bits_are_scaled(name: str) -> None:
    options = {"irreversible": False} if name == "JPEG2000" else {}
    read = read_image(encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), name, **options))
    assert read.mode == "L" and np.array_equal(np.asarray(read), RAMP)


def test_16_bit_colour_is_scaled() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(np.asarray(read_image(io.BytesIO(png))), pixels)


def test_floating_point_is_scaled_or_refused() -> None:
    read = read_image(encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"))
    assert np.array_equal(np.asarray(read), RAMP)
    for samples in (RAMP.astype(np.float32), -RAMP.astype(np.float32) / 255, RAMP.astype(np.int32) << 20):
        with pytest.raises(ValueError, match=r"not known|not between 0 and 1"):
            read_image(encoded(Image.fromarray(samples), "TIFF"))


def test_other_formats_are_refused_whatever_the_suffix(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.eps")
    for suffix in (".eps", ".jpg"):
        path = (tmp_path / "a.eps").replace(tmp_path / f"b{suffix}") if suffix == ".jpg" else tmp_path / "a.eps"
        with pytest.raises(OSError, match="cannot identify"):
            read_image(path)
    Image.fromarray(RAMP).save(tmp_path / "c.png")
    assert np.array_equal(np.asarray(read_image((tmp_path / "c.png").replace(tmp_path / "c.jpg"))), RAMP)


def test_palettes_with_transparency() -> None:
    colours = Image.fromarray(RAMP).convert("RGB").quantize(64)
    read = read_image(encoded(colours, "PNG", transparency=b"\x00\xff\x80"))
    assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(colours.convert("RGB")))
