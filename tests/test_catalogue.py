import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from dfs_cli.catalogue import CATALOGUE, count_convertible, list_convertible

kept = pytest.mark.skipif(
    json.loads(CATALOGUE.read_text())["timm"] != version("timm"), reason="the catalogue is of another timm"
)


@kept
@pytest.mark.parametrize("pattern", ["resnet18", "seresnet50", "resnetv2_50x1_bit", "resnet20_digits"])
def test_the_catalogue_says_what_is_counted(pattern: str) -> None:
    assert list_convertible(pattern) == count_convertible(pattern) != []


@kept
@pytest.mark.slow
def test_the_whole_catalogue_says_what_is_counted() -> None:
    assert list_convertible() == count_convertible()


@kept
def test_listing_waits_for_no_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from dfs_cli.cli.app import app;"
        "result = CliRunner().invoke(app, ['list', 'resnet18*']); assert 'resnet18 ' in result.stdout, result.output;"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
