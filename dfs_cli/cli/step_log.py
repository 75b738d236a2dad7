"""A row for each tuning step in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dfs_cli.atomic import File, write_files
from dfs_cli.errors import OutputError
from dfs_cli.records import StepRecord

_NAMES = {"loss": "train_loss", "accuracy": "train_top1"}  # timm's
_COLUMNS = tuple(_NAMES.get(name, name) for name in StepRecord._fields)


class StepLog:
    """Appends to a file that may be of an interrupted run. Rows of steps that are done again are replaced: each step has one.

    Args:
        path: of the file; its name is held.
        has_jobs: the steps are of several networks, which have a column of their own.
        restart: whatever the file holds is of no use.

    Raises:
        OutputError: the file holds something else.
    """

    def __init__(self, path: Path, has_jobs: bool = False, restart: bool = False) -> None:
        self.path, self.has_jobs = path, has_jobs
        self._header = ["job", *_COLUMNS] if has_jobs else list(_COLUMNS)
        self._job = ""
        self._file: TextIO | None = None
        if restart:
            path.unlink(missing_ok=True)
        if (before := self._read()) and not before.startswith(_line(self._header)):
            raise OutputError(f"--log {path} exists and is not a log of this kind: pass another name")

    def job(self, name: str) -> None:
        """The steps that follow are those of another network."""
        self.close()
        self._job = name

    def step(self, record: StepRecord) -> None:
        """Write a step's row."""
        if self._file is None:
            self._drop_from(record.step)
            self._file = self.path.open("a", encoding="utf-8", newline="")
        self._file.write(_line([self._job, *record] if self.has_jobs else list(record)))
        self._file.flush()

    def close(self) -> None:
        """No more rows for now."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop_from(self, step: int) -> None:
        """Drop the job's rows from a step on, and a row that was not written to its end; write the header if there is none."""
        header, before = self._header, self._read()
        kept = [_line(header)]
        for line in before.splitlines(keepends=True)[1:]:
            row = dict(zip(header, next(csv.reader([line])), strict=False))
            is_whole = line.endswith("\n") and len(row) == len(header) and row["step"].isdigit()
            if is_whole and (row.get("job", "") != self._job or int(row["step"]) < step):
                kept.append(line)
        if (text := "".join(kept)) != before:
            write_files([File(self.path, text)], replace=True)

    def _read(self) -> str:
        """What the file holds."""
        return self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""


def _line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
