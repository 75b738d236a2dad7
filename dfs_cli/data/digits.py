"""The embedded dataset: scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998), 1,797 images of 8x8 pixels."""

from __future__ import annotations

import numpy as np
import torch

from dfs_cli.data.images import InMemory
from dfs_cli.errors import MissingDependencyError

CLASS_NAMES = tuple(str(digit) for digit in range(10))
_SPLIT_SEED = 2020
_VALIDATION, _CALIBRATION = 450, 180


class Digits(InMemory):
    """One split of the digits: ``train`` (1,167 images), ``calibration`` (180) or ``validation`` (450), always the same.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingDependencyError("the embedded digits need scikit-learn: pip install 'dfs-cli[demo]'") from None
        images, targets = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
        validation, calibration, train = np.split(order, [_VALIDATION, _VALIDATION + _CALIBRATION])
        chosen = {"train": train, "calibration": calibration, "validation": validation}[split]
        self.pixels = (images[chosen].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.targets = targets[chosen]
