"""The state of a long run on disk, so that the run can be gone on with after it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dfs_cli.atomic import File, write_files
from dfs_cli.config import CHECKPOINT_MINUTES
from dfs_cli.distributed import is_first, largest, of_first
from dfs_cli.errors import ConfigError, DivergedError, OutputError, Stopped, WriteError
from dfs_cli.locks import locked

_FORMAT = 2
_WRITTEN = "written"
# At the end of an epoch nothing is saved where so many times the time that saving takes have not passed since the last time: an
# epoch may be a single step.
_SPARING = 10
_SHOWN = 6


class StopRequest:
    """A signal that asks a run to end once it can be gone on with."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_waited_for = False

    def ask(self, number: int) -> bool:
        """Ask; False where the run should end at once, since it is not in the middle of steps, or was asked before."""
        if not self.is_waited_for or self.number is not None:
            return False
        self.number = number
        return True

    def obey(self) -> None:
        """Raises Stopped where the run was asked to end."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Steps are done within the context, after each of which the run may end."""
        self.is_waited_for = True
        try:
            yield
        finally:
            self.is_waited_for = False


class Checkpoint:
    """What a run needs to go on, in parts that are saved together. Loading it executes nothing.

    Of several processes the first one reads and writes; all of them call what is called here at the same time.

    A part is what has been found out (kept in every file from then on), or the state of what is being done.

    Args:
        path: of the file; hold its name (:func:`dfs_cli.locks.locked`) where others may want it. None: nothing is saved.
        resume: read what an earlier run saved there, if there is anything.
        minutes: the longest time between two files, in steps that take less.
        stop: asked to end the run, at a step after which it is saved.
        say: told where a file cannot be written; the run goes on.

    Raises:
        OutputError: with ``resume``, the file is not an intact checkpoint.

    Example:
        >>> import dfs_cli, pathlib, tempfile
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = dfs_cli.Checkpoint(pathlib.Path(folder) / "run.checkpoint", resume=True)
        ...     converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning, checkpoint=checkpoint)
        ...     checkpoint.remove()  # once the network is saved
    """

    def __init__(
        self,
        path: Path | None = None,
        resume: bool = False,
        minutes: float = CHECKPOINT_MINUTES,
        stop: StopRequest | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path, self.stop = path, stop or StopRequest()
        self._minutes, self._say = minutes, say
        self._parts: dict[str, Any] = {}
        self._identity: str | None = None
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        if resume and path is not None:
            found = _read(path) if is_first() and path.exists() else None
            self._identity, self._parts = of_first(found) or (None, {})

    def identify(self, identity: dict[str, Any]) -> None:
        """Say which run this is, in plain values.

        Raises:
            OutputError: what was read is of another run; the message names what differs.
        """
        text = json.dumps(identity, sort_keys=True)
        if self._identity is not None and self._identity != text:
            there, here = (dict(_flat(json.loads(t))) for t in (self._identity, text))
            names = [n for n in sorted({*there, *here}) if there.get(n) != here.get(n)]
            shown = "; ".join(
                f"{n} is {_brief(there.get(n))} there, {_brief(here.get(n))} here" for n in names[:_SHOWN]
            )
            more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise OutputError(
                f"{self.path} is a checkpoint of another run: {shown}{more}. Pass the same options to go on with it, or "
                "--force without --resume to start again"
            )
        self._identity = text

    def get(self, part: str) -> Any:
        """A part that was found out, or read; None: there is none."""
        return self._parts.get(part)

    def take(self, part: str) -> Any:
        """As :meth:`get`, of a state, which is given away."""
        return self._parts.pop(part, None)

    def keep(self, part: str, value: Any) -> None:
        """Something has been found out. It is saved with whatever is saved next."""
        self._parts[part] = value

    def save(self, part: str, state: Any) -> None:
        """Save a state, and all that was found out."""
        if self.path is None or not is_first():
            return
        began = time.monotonic()
        try:
            _write(self.path, self._identity, {**self._parts, part: state})
        except WriteError as error:
            self._say(f"the run cannot be saved, and goes on: {error}")
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def reached(self, part: str, state: Callable[[], Any], milestone: bool = False) -> None:
        """A step is done: save the state where that is due, and end the run where it was asked to end.

        Args:
            milestone: it is due whatever the time.

        Raises:
            Stopped: the run was asked to end; it is saved.
        """
        since = time.monotonic() - self._saved_at
        is_due = since >= 60 * self._minutes or (milestone and since >= _SPARING * self._save_seconds)
        is_saved, number = largest(int(is_due and is_first()), self.stop.number or 0)
        self.stop.number = number or None
        if self.path is not None and (is_saved or number):
            self.save(part, state())
        self.stop.obey()

    def about_to_write(self, files: Sequence[File]) -> None:
        """The run is done, and its results are written now: from now on they are known (see :meth:`wrote`)."""
        if self.path is None or not is_first() or not self.path.exists():
            return
        identity, parts = _read(self.path)
        digests = {file.path.name: hashlib.sha256(file.data).hexdigest() for file in files}
        with contextlib.suppress(WriteError):
            _write(self.path, identity, {**parts, _WRITTEN: digests})

    def wrote(self, paths: Iterable[Path]) -> bool:
        """Whether there are files of these names, and all that there are were written by the run that was read."""
        written, there = self._parts.get(_WRITTEN) or {}, [path for path in paths if path.is_file()]
        return bool(there) and all(
            hashlib.sha256(path.read_bytes()).hexdigest() == written.get(path.name) for path in there
        )

    def remove(self) -> None:
        """Remove the file, of which there is no more need."""
        if self.path is not None and is_first():
            self.path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """How each of several runs is saved; see :class:`Checkpoint`.

    Args:
        resume: go on with a run that was interrupted.
    """

    resume: bool = True
    minutes: float = CHECKPOINT_MINUTES
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    say: Callable[[str], None] = lambda text: None

    @contextlib.contextmanager
    def at(self, path: Path, restart: bool = False) -> Iterator[Checkpoint]:
        """A run whose checkpoint is at ``path`` until its end, or until it fails in a way that it would fail again.

        Where another process has it, nothing is saved.

        Args:
            restart: whatever is there is of no use.
        """
        with contextlib.ExitStack() as stack:
            is_held = True
            try:
                stack.enter_context(locked(path) if is_first() else contextlib.nullcontext())
            except OSError:
                is_held = False
            if not of_first(is_held):
                yield Checkpoint(stop=self.stop)
                return
            if restart or not self.resume:
                Checkpoint(path).remove()
            checkpoint = Checkpoint(path, True, self.minutes, self.stop, self.say)
            try:
                yield checkpoint
            except (ConfigError, DivergedError):
                checkpoint.remove()
                raise
            checkpoint.remove()


def _write(path: Path, identity: str | None, parts: dict[str, Any]) -> None:
    file = io.BytesIO()
    torch.save({"dfs_checkpoint": _FORMAT, "identity": identity, "parts": parts}, file)
    write_files([File(path, file.getvalue())], replace=True)


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["dfs_checkpoint"] != _FORMAT:
            raise ValueError("it is of another version of dfs")
        return content["identity"], dict(content["parts"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise OutputError(
            f"{path} is not an intact checkpoint of dfs ({reason}): pass --force without --resume to start again"
        ) from None


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _brief(value: Any) -> str:
    text = json.dumps(value).strip('"')
    return f"{text[:20]}..." if len(text) > 24 else text
