"""Rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import dfs_cli

PACKAGE = Path(dfs_cli.__file__).parent
# Lowest first; a room imports only itself and rooms before it.
ROOMS = [
    "errors",
    "config",
    "process",
    "nn",
    "cost",
    "surgery",
    "models",
    "data",
    "artifact",
    "tuning",
    "evaluation",
    "export",
]
ROOMS += ["report", "resolve", "pipeline", "sweep", "bench", "latency", "api", "cli", "__main__"]


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dfs_cli"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dfs_cli.")}
    return found - {"__version__"}


def test_rooms_import_only_rooms_below_them() -> None:
    broken = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        allowed = set(ROOMS[: ROOMS.index(room) + 1])
        broken += [f"{file.relative_to(PACKAGE)} imports {other}" for other in imported_rooms(file) - allowed]
    assert broken == []


def test_files_stay_short() -> None:
    long = {
        str(f.relative_to(PACKAGE)): n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 330
    }
    assert long == {}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from dfs_cli.cli.app import app;"
        "commands = ([], ['convert'], ['eval'], ['profile'], ['list'], ['sweep'], ['export'], ['bench']);"
        "results = [CliRunner().invoke(app, [*c, '--help']) for c in commands];"
        "assert all(r.exit_code == 0 for r in results), results;"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there() -> None:
    for name in dfs_cli.__all__:
        assert getattr(dfs_cli, name) is not None
