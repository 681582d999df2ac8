"""What commands print is text: no control characters, no markup, whatever is in names, paths and values."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from pvm.terminal import Terminal, printable


ROOT = Path(__file__).parent.parent
NAMES = (
    "[/x].png",
    "runs/a[/x]b",
    "runs/exp[bold]1",
    "[red]",
    ":smile:",
    "[link=https://example.org]x[/link]",
    "\\[x]",
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J\x1b[1;31mred\x1b[0m", r"\x1b[2Jred"),
        ("\x9b2J \x7f \r \x08", r"\x9b2J \x7f \r \x08"),
        ("a\u202ebc\u2066", r"a\u202ebc\u2066"),
        ("\udcff.png", r"\udcff.png"),
        ("x\ny\tz é 答案是 👩\u200d🚀 \u3000", "x\ny\tz é 答案是 👩\u200d🚀 \u3000"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(capsys, name):
    table = Table(name, title=name)
    table.add_column(name, overflow="fold")
    table.add_row(name, f"{name}\x1b]0;owned\x07")
    Terminal(width=200).print(f"Written: {name}")
    Terminal(width=200).print(table)
    printed = capsys.readouterr().out
    assert printed.count(name) == 6 and r"\x1b]0;owned\x07" in printed and "\x1b" not in printed


def test_logs_and_errors_are_printable():
    """In a process of its own, whose standard output takes ASCII only."""
    script = r"""
import logging, sys, warnings
from pvm.errors import UserError, ends_in_a_sentence
from pvm.terminal import Terminal
with ends_in_a_sentence("test"):
    logging.getLogger("x").warning("log %s", "\x1b]0;a\x07")
    warnings.warn("warned \x1b]0;b\x07")
    Terminal().print("é \udcff")
    raise UserError("error \x1b]0;c\x07")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
        capture_output=True,
    )
    assert result.returncode == 2 and result.stdout == b"\\xe9 \\udcff\n" and b"\x1b" not in result.stderr
    for sentence in (rb"log \x1b]0;a\x07", rb"warned \x1b]0;b\x07", rb"test: error: error \x1b]0;c\x07"):
        assert sentence in result.stderr


def test_nothing_is_printed_in_another_way():
    """But help texts, what goes to another process, and the demo's makers, which print their own words only."""
    allowed = {"pvm/terminal.py", "pvm/errors.py", "pvm/__main__.py", "pvm/evaluation/mathematics.py"}
    for file in (ROOT / "pvm").rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        if name in allowed or name.startswith("pvm/worlds"):
            continue
        tree = ast.parse(file.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"print", "Console", "rich.print", "Text", "sys.stdout.write", "sys.stderr.write"}, name
