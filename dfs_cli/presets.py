"""Named choices of options, with all that belongs to them."""

from __future__ import annotations

from typing import Literal

from dfs_cli.errors import ConfigError
from dfs_cli.validation import Json, validated

FULL_BITS = 32
"""The bitwidth that stands for running in floating point."""

BatchSize = int | Literal["dynamic"]
"""How many images an exported graph takes at once; ``dynamic``: any number."""

MOST_IMAGES = 2**16
"""The most images that an exported graph takes at once, where their number is fixed."""


@validated
class Preset(Json):
    """A named choice of options, with all that belongs to it.

    Args:
        bits: bitwidth options of a block.
        fixed_bits: bitwidth of what always runs.
        source: where it comes from.
    """

    bits: tuple[int, ...]
    fixed_bits: int = 8
    source: str = ""


PRESETS: dict[str, Preset] = {
    "lowbit": Preset((0, 2, 3, 4, 5, 6, 8)),
    "hardware": Preset((0, 4, 8, 16, 32)),
    "static": Preset((0, 2, 3, 4, 5, 6, 8, 16, 32)),
    "paper": Preset((0, 8, 10, 12, 14, 16, 32), FULL_BITS, "DFS (Shen et al., 2020)"),
    "skipnet": Preset((0, FULL_BITS), FULL_BITS, "SkipNet (Wang et al., 2018)"),
}
"""Named option lists."""


def parse_bits(text: str) -> Preset:
    """What ``text`` names: a preset, or bitwidths separated by commas.

    Raises:
        ConfigError: it is neither.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        return Preset(tuple(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"--bits {text!r}: expected bitwidths separated by commas, as 0,4,8,32, or one of {', '.join(PRESETS)}"
        ) from None


def parse_batch(batch: str | int) -> BatchSize:
    """How many images an exported graph takes at once.

    Raises:
        ConfigError: it is neither a number from 1 to ``MOST_IMAGES`` nor ``dynamic``.
    """
    if batch == "dynamic":
        return "dynamic"
    text = str(batch)
    if text.isascii() and text.isdigit() and len(text) <= len(str(MOST_IMAGES)) and 1 <= int(text) <= MOST_IMAGES:
        return int(text)
    raise ConfigError(
        f"--batch {text[:40]!r}: expected 1 to {MOST_IMAGES}, or dynamic for any number of images, as --batch 8"
    )


DEFAULT_MIX = "0:0.5,8:0.5"
"""Shares of the blocks by bitwidth in ``dfs bench`` where decisions are not real, by default."""


def parse_mix(text: str) -> dict[int, float]:
    """Shares of the blocks by bitwidth, from text such as ``0:0.5,8:0.5``.

    Raises:
        ConfigError: it is no such text, or the shares do not add up to one.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        mix = {int(bits): float(share) for bits, share in pairs}
    except ValueError:
        raise ConfigError(f"--mix {text!r}: expected bitwidth:share pairs, as 0:0.5,8:0.5") from None
    if len(mix) < len(pairs) or not min(mix.values()) >= 0 or abs(sum(mix.values()) - 1) > 1e-6:
        raise ConfigError(f"--mix {text!r}: expected each bitwidth once, with shares that add up to 1")
    return mix
