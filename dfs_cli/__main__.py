"""``python -m dfs_cli``."""

from dfs_cli.cli.app import app

if __name__ == "__main__":
    app(prog_name="dfs")
