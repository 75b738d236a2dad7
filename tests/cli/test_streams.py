"""The program's manners: one line where something is wrong, whatever its streams lead to, and on signals."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dfs_cli
from dfs_cli.cli.app import app

pytestmark = pytest.mark.medium

DFS = [sys.executable, "-m", "dfs_cli"]
CONVERT = ["convert", "resnet20_digits", "--budget", "0.3", "--workers", "0", "--device", "cpu", "--steps"]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash, in which ``dfs`` is the program."""
    script = f'set -o pipefail; dfs() {{ "{sys.executable}" -m dfs_cli "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)


def one_line(text: str, reason: str) -> None:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dfs: ") and reason in lines[0], text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("list --nonsense", "--nonsense"),
        ("nonsense", "nonsense"),
        ("convert", "MODEL"),
        ("convert resnet18", "--budget"),
        ("convert resnet18 --budget much", "--budget"),
        ("convert resnet18 more --budget 0.1", "more"),
        ("eval x.safetensors --device tpu", "--device"),
        ("profile --plot", "--plot"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(
    arguments: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        app(arguments.split())
    printed = capfd.readouterr()
    assert end.value.code == 2 and printed.out == ""
    one_line(printed.err, reason)
    assert "--help" in printed.err and not set("╭│╰") & set(printed.err)


def test_without_a_command_there_is_help(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app([])
    printed = capfd.readouterr()
    assert end.value.code == 2 and "bench-tuning" in printed.out and printed.err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["dfs list", "dfs list --json", "dfs --help", "dfs --version"])
def test_a_full_disk_under_standard_output_is_one_line_and_exit_code_1(command: str) -> None:
    done = shell(f"{command} > /dev/full")
    assert done.returncode == 1
    one_line(done.stderr, "standard output cannot be written: No space left on device")


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("dfs list >&-", 1, "standard output cannot be written: it is closed"),
        ("dfs list >&- 2>&-", 1, ""),
        pytest.param("dfs list nonsense 2>&-", 2, "", marks=pytest.mark.slow),
        ("dfs list | head -n 1 | grep '^model '", 0, ""),
        ("{ sleep 1; dfs list --json; } | true", 0, ""),
        ("PYTHONIOENCODING=ascii dfs --help", 0, ""),
    ],
)
def test_closed_streams_and_readers_who_leave(command: str, code: int, reason: str) -> None:
    done = shell(command)
    assert done.returncode == code, done.stderr
    if reason:
        one_line(done.stderr, reason)
    else:
        assert done.stderr == "" and "error" not in done.stdout


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")],
)
def test_too_little_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr("dfs_cli.catalogue.list_convertible", fail)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 1 and result.stdout == ""
    one_line(result.stderr, "not enough memory")


def test_a_name_cannot_control_the_terminal(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "\x1b[31m\n.safetensors")])
    assert result.exit_code == 2
    one_line(result.stderr.removesuffix("\n"), "\\x1b[31m")


def test_one_name_is_for_one_run_and_a_signal_ends_it_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen([*DFS, *CONVERT, "100000"], stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if line.startswith("tuning:"):
                break
        for more in ([], ["--force"], ["--output", "model.bin"]):  # this has the same reports
            second = CliRunner().invoke(app, [*CONVERT, "1", *more])
            assert second.exit_code == 2
            one_line(second.stderr, "another run of dfs")
        first.send_signal(signal.SIGTERM)
        *_, hint, last = first.stderr
        assert "--resume" in hint and last == "dfs: stopped by SIGTERM\n"
    assert first.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.checkpoint"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.slow
def test_a_disk_that_fills_up_changes_no_file(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(artifact, "in.safetensors")
    written = {"model.safetensors", "model.report.json", "model.report.md", "p.png", "r.json", "g.onnx"}
    for name in written:
        Path(name).write_text("old")
    for command, size in (
        ([*CONVERT, "3", "--force"], 10_000),  # the network does not fit, each of its reports does
        (["eval", "in.safetensors", "--workers", "0", "--results-file", "r.json", "--force"], 10),
        (["profile", "in.safetensors", "--plot", "p.png", "--force"], 5000),
        (["export", "in.safetensors", "--onnx", "g.onnx", "--num-samples", "16", "--workers", "0", "--force"], 5000),
    ):
        with largest_file(size):
            result = CliRunner().invoke(app, command)
        assert result.exit_code == 1, (command, result.output)
        assert result.stderr.splitlines()[-1].startswith("dfs: error: output "), result.stderr
        assert "File too large" in result.stderr.splitlines()[-1]
        assert all(Path(name).read_text() == "old" for name in written)
        assert {path.name for path in tmp_path.iterdir()} == written | {"in.safetensors"}


def test_an_output_is_never_an_input(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(artifact, "m.safetensors")
    os.link("m.safetensors", "p.png")
    Path("r.json").symlink_to("m.safetensors")
    before = Path("m.safetensors").read_bytes()
    for command in (
        ["convert", "resnet20_digits", "--budget", "0.3", "--checkpoint", "m.safetensors", "--output", "m.safetensors"],
        ["sweep", "resnet20_digits", "--checkpoint", "m.safetensors", "--output", "r.json"],
        ["eval", "m.safetensors", "--results-file", "r.json"],
        ["eval", "m.safetensors", "--budget", "0.1", "--output", "m.safetensors"],
        ["export", "m.safetensors", "--onnx", "m.safetensors"],
        ["profile", "m.safetensors", "--plot", "p.png"],
    ):
        for more in ([], ["--force"]):
            result = CliRunner().invoke(app, [*command, *more])
            assert result.exit_code == 2
            one_line(result.stderr, "is an input, too")
            assert "--force" not in result.stderr
    assert Path("m.safetensors").read_bytes() == before


def test_a_network_whose_name_was_taken_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dfs_cli.conversion.stages as stages

    monkeypatch.chdir(tmp_path)
    finish = stages.finish

    def take(*args: object) -> dfs_cli.Converted:
        Path("model.safetensors").write_text("a stranger's")
        return finish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "finish", take)
    result = CliRunner().invoke(app, [*CONVERT, "3"])
    assert result.exit_code == 1 and "top-1" in result.stdout
    assert "wrote model-1.safetensors, model-1.report.json, model-1.report.md instead" in result.stderr
    assert Path("model.safetensors").read_text() == "a stranger's"
    assert dfs_cli.load("model-1.safetensors").manifest.budget == 0.3


@pytest.mark.slow
def test_plots_need_no_backend(artifact: Path, tmp_path: Path) -> None:
    """A notebook leaves the name of its own backend in the environment of the programs that it starts."""
    plot = tmp_path / "p.png"
    done = shell(f"MPLBACKEND=module://not_installed.backend dfs profile '{artifact}' --plot '{plot}'")
    assert done.returncode == 0 and done.stderr == ""
    assert plot.read_bytes().startswith(b"\x89PNG")
