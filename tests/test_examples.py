"""The examples in the docstrings of public names are run."""

import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest

import dfs_cli

pytestmark = pytest.mark.slow


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in dfs_cli.__all__:
        yield from (test for test in finder.find(getattr(dfs_cli, name), name, globs={}) if test.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_example(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=printed.append)
    assert result.failed == 0, "".join(printed)
    assert list(tmp_path.iterdir()) == []
