"""Small residual networks, which this registers with timm, and functions that find and load any model."""

import dfs_cli.models.cifar  # noqa: F401
