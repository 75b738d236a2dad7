import pytest
from rich.console import Console
from rich.table import Table

from dfs_cli.cli.output import Output
from dfs_cli.errors import printable


def test_what_a_terminal_would_obey_is_shown_escaped() -> None:
    assert printable("a\x1b[2J\x07\u202e\ud800é\nb") == r"a\x1b[2J\x07\u202e\ud800é\nb"


def test_text_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_column("[bold]head[/bold]")
    table.add_row("[red]cell[/nope] :smiley: \x1b[2J")

    def render(console: Console) -> None:
        console.print("[/] [link=x]y", soft_wrap=True)
        console.print(table)

    Output().result({}, render)
    Output().say("[red]said[/nope]")
    shown = capsys.readouterr()
    assert "[/] [link=x]y\n" in shown.out and "[bold]head[/bold]" in shown.out
    assert r"[red]cell[/nope] :smiley: \x1b[2J" in shown.out and "\x1b" not in shown.out
    assert shown.err == "[red]said[/nope]\n"
