"""Rules of the house that a machine can check; `lint-imports` checks which room may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import dfs_cli
from dfs_cli.control.base import Controller

PACKAGE = Path(dfs_cli.__file__).parent
FILES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
METHODS = {
    "GatedController",
    "ProbeController",
    "StaticController",
    "RecurrentGate",
    "FeedForwardGate",
    "SecondPassGate",
}


def is_type_check(node: ast.AST) -> bool:
    """Whether ``node`` asks if something is a certain controller or gate."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")
    ):
        return False
    return bool({part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & METHODS)


def is_name_check(node: ast.AST) -> bool:
    """Whether ``node`` compares the attribute ``gate`` of something with a value."""
    if not isinstance(node, ast.Compare):
        return False
    return any(isinstance(side, ast.Attribute) and side.attr == "gate" for side in (node.left, *node.comparators))


def test_only_the_factory_asks_which_method_it_has() -> None:
    checks = {name for name, f in FILES.items() for n in ast.walk(ast.parse(f.read_text())) if is_type_check(n)}
    assert checks == set()
    checks = {name for name, f in FILES.items() for n in ast.walk(ast.parse(f.read_text())) if is_name_check(n)}
    # The settings check themselves: which options and which views go with a gate.
    assert checks == {"control/factory.py", "config.py"}


def test_only_the_exporter_knows_single_controllers() -> None:
    rooms = {f"dfs_cli.control.{module}" for module in ("gated", "gates", "probe", "static")}
    importing = set()
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            modules = {node.module} if isinstance(node, ast.ImportFrom) else set()
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module == "dfs_cli.control":
                modules = {f"dfs_cli.control.{alias.name}" for alias in node.names}
            if modules & rooms:
                importing.add(name.partition("/")[0])
    assert importing == {"control", "export"}


def test_every_controller_is_known() -> None:
    from dfs_cli.control import factory  # noqa: F401  # imports them all

    known = {controller.__name__ for controller in Controller.__subclasses__() if "dfs_cli" in controller.__module__}
    assert known == {name for name in METHODS if name.endswith("Controller")}


def test_files_stay_short() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 330} == {}


def test_no_private_member_of_another_module_is_imported() -> None:
    private = []
    for name, file in FILES.items():
        imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        members = {alias.name for n in imports for alias in n.names if (n.module or "").startswith("dfs_cli")}
        private += [f"{name}: {m}" for m in members if m.startswith("_") and m != "__version__"]
    assert private == []


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from dfs_cli.cli.app import app;"
        "names = [c.name for c in app.registered_commands]; assert len(names) >= 8, names;"
        "results = [CliRunner().invoke(app, [*c, '--help']) for c in ([], *([n] for n in names))];"
        "assert all(r.exit_code == 0 for r in results), results;"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
