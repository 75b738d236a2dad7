"""The library's face: every public name, in whichever order things are imported."""

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import dfs_cli

pytestmark = pytest.mark.medium


def test_every_public_callable_has_a_signature_and_a_docstring() -> None:
    for name in dfs_cli.__all__:
        public = getattr(dfs_cli, name)
        assert callable(public), name
        inspect.signature(public)  # raises where there is none
        assert (inspect.getdoc(public) or "").strip(), name


def test_a_name_stays_what_it_is_however_often_it_is_looked_up() -> None:
    for name in dfs_cli.__all__:
        assert getattr(dfs_cli, name) is getattr(dfs_cli, name)
        assert not inspect.ismodule(getattr(dfs_cli, name)), name


SUBMODULES = [
    module.name
    for module in pkgutil.walk_packages(dfs_cli.__path__, "dfs_cli.")
    if not module.name.endswith("__main__")
]

CHECK = """
import importlib, inspect, sys
import dfs_cli
first, names = sys.argv[1], sys.argv[2].split(",")
def names_first():
    for name in dfs_cli.__all__:
        getattr(dfs_cli, name)
def modules():
    for name in names:
        importlib.import_module(name)
for part in (names_first, modules) if first == "names" else (modules, names_first):
    part()
for name in dfs_cli.__all__:
    assert not inspect.ismodule(getattr(dfs_cli, name)), name
    if inspect.isfunction(getattr(dfs_cli, name)):
        assert callable(getattr(dfs_cli, name)), name
"""


@pytest.mark.parametrize("first", ["names", "modules"])
def test_submodules_and_names_can_be_imported_in_both_orders(first: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK, first, ",".join(SUBMODULES)], check=True, timeout=120)


@pytest.mark.slow
def test_submodules_import_backwards() -> None:
    code = "import importlib, sys\nfor name in reversed(sys.argv[1].split(',')): importlib.import_module(name)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, ",".join(SUBMODULES)], check=True, timeout=120)


def test_the_stub_lists_what_the_face_has() -> None:
    assert sorted(dfs_cli.__all__) == sorted(import_module("dfs_cli.api").__all__)
