"""The convertible architectures, with blocks, MACs and weights: counted once per version of timm, and kept in the package.

Counting builds every architecture, which takes half a minute. ``python -m dfs_cli.catalogue`` counts again.
"""

from __future__ import annotations

import fnmatch
import json
from importlib.metadata import version
from pathlib import Path

from dfs_cli.validation import Json, validated

CATALOGUE = Path(__file__).parent / "catalogue.json"


@validated
class ModelSummary(Json):
    """One architecture.

    Args:
        name: timm's name.
        family: the class of its blocks.
        blocks: number of residual blocks.
        macs: MACs for one image at the evaluation size.
        params: number of parameters.
        image_size: evaluation size, in pixels.
        weights: names of timm's pretrained weights.
    """

    name: str
    family: str
    blocks: int
    macs: int
    params: int
    image_size: int
    weights: tuple[str, ...]


def list_convertible(pattern: str = "*") -> list[ModelSummary]:
    """Every architecture that can be converted and whose name matches the wildcard ``pattern``, in order.

    They are counted again where the catalogue is for another version of timm.
    """
    catalogue = json.loads(CATALOGUE.read_text())
    if catalogue["timm"] != version("timm"):
        return count_convertible(pattern)
    return [ModelSummary.from_dict(m) for m in catalogue["models"] if fnmatch.fnmatchcase(m["name"], pattern)]


def count_convertible(pattern: str = "*") -> list[ModelSummary]:
    """As :func:`list_convertible`, but counted now."""
    import timm
    import torch
    from timm.models import get_pretrained_cfg
    from torch.utils.flop_counter import FlopCounterMode

    from dfs_cli.errors import UnsupportedModelError
    from dfs_cli.models.zoo import candidate_names
    from dfs_cli.surgery.plan import find_blocks

    summaries = []
    for name in fnmatch.filter(candidate_names(), pattern):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        try:
            blocks = find_blocks(model)
        except UnsupportedModelError:
            continue
        cfg = get_pretrained_cfg(name)
        size = (cfg.test_input_size or cfg.input_size) if cfg else (3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *size, device="meta"))
        summaries.append(
            ModelSummary(
                name=name,
                family=type(next(iter(blocks.values()))).__name__,
                blocks=len(blocks),
                macs=counter.get_total_flops() // 2,
                params=sum(p.numel() for p in model.parameters()),
                image_size=size[-1],
                weights=tuple(timm.list_pretrained(name + ".*")),
            )
        )
    return summaries


if __name__ == "__main__":
    models = [summary.to_dict() for summary in count_convertible()]
    lines = ",\n".join(json.dumps(model) for model in models)
    CATALOGUE.write_text(f'{{"timm": "{version("timm")}", "models": [\n{lines}\n]}}\n')
