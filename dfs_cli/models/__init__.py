"""Small residual networks of our own, registered with timm, and the way to find and load any model."""

from dfs_cli.models import cifar as cifar
