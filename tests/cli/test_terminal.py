"""Other people's text in a terminal: nothing in it steers the terminal, and no value floods it."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from rich.console import Console

from xformers_lab import progress, terminal
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.report import pages, table
from xformers_lab.report.listing import print_listing

STEERING = "\x1b[31mred\x07\x9b2J\u202e\u2066\r\ud800"


def steers(text: str) -> list[str]:
    return [char for char in text if char in "\x1b\x07\x9b\u202e\u2066\r\ud800"]


def test_what_steers_is_escaped_and_all_else_stays():
    assert terminal.visible("a\x1b[31m\n\u202eb") == r"a\x1b[31m\n\u202eb"
    assert terminal.visible("a\n\tb\x00", terminal.LINES) == "a\n\tb" + r"\x00"
    for plain in (
        "héllo",
        "日本\u3000語",
        "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}",
        "\u0645\u06cc\u200c\u062e",
        "a\u00a0b",
    ):
        assert terminal.visible(plain) == plain
    assert not steers(terminal.visible(STEERING))


def test_endless_values_lose_their_middle():
    assert terminal.shortened("a short one, " * 5) == "a short one, " * 5
    for text in ("x" * 10_000_000, "word " * 100_000, "x" * 100 + " " + "y" * 5_000):
        once = terminal.shortened(text)
        assert len(once) <= terminal.LONGEST and "characters)" in once
        assert terminal.shortened(once) == once
    assert len(str(UsageError("key=" + "x" * 100_000))) < 200


@pytest.mark.parametrize("words", [
    ["show", f"attention={STEERING}"],
    ["show", f"{STEERING}=1"],
    ["show", f"./{STEERING}.py"],
    ["list", STEERING],
    [STEERING],
    ["bench", f"--{STEERING}"],
    ["check", STEERING],
    ["eval", STEERING],
    ["report", "--runs", STEERING],
    ["new", "attention", STEERING],
    ["compare", f"@{STEERING}.toml"],
    ["generate", "last", "--prompt", "a", "--seed", STEERING],
])  # fmt: skip
@pytest.mark.usefixtures("inline")
def test_no_message_steers(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(words) == 2
    except SystemExit as refusal:
        assert refusal.code == 2
    output = capsys.readouterr()
    assert not steers(output.err + output.out) and "red" in output.err
    # The usage in front of argparse's own refusals has lines of its own.
    assert "\n" not in output.err.rstrip("\n").partition("error:")[2]


def test_a_file_that_exits_with_colours(capsys, tmp_path):
    (tmp_path / "recipe.py").write_text(f"import sys\nsys.exit({STEERING!r} + 'x' * 100000)\n")
    assert main(["compare", f"@{tmp_path}/recipe.py"]) == 2
    err = capsys.readouterr().err
    assert not steers(err) and len(err) < 1000 and err.count("\n") == 1


@pytest.mark.parametrize("terminal_width", [None, 80, 40])
def test_tables_and_pages_show_it(terminal_width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal_width is not None, color_system=None, width=terminal_width)
    name = STEERING.replace("\ud800", "")
    print_listing([{"name": name, "title": f"{name} [bold] :car: {'long ' * 20}"}], console)
    pages.print_checks(
        [{"name": name, "passed": False, "seconds": 1, "failed": [{"property": "p", "message": name}]}], console
    )
    pages.print_record({"run_dir": name, "status": "ok"}, console)
    row = {"task": name, "attention": name, "seq_len": 8, "status": "failed", "reason": name, "config": {}}
    table.print_rows([row | {"attention": "x"}, row], ["attention"], console)
    text = file.getvalue()
    assert not steers(text) and ":car:" in text and "[bold]" in text


def test_progress_and_what_grows(capsys):
    with progress.words() as tell:
        tell(STEERING)
    with progress.items("check", 2) as tell:
        tell(STEERING)
    add = progress.growing("a\n" + STEERING, lambda tokens: "".join(map(chr, tokens)))
    for token in [0x1B, ord("b"), 0x0A, 0x9B]:
        add(0, token)
    output = capsys.readouterr()
    assert not steers(output.err + output.out)
    assert output.out.startswith("a\n") and output.out.endswith(r"\x1bb" + "\n" + r"\x9b")


def test_a_terminal_without_the_signs_gets_them_escaped(tmp_path):
    command = [sys.executable, "-m", "xformers_lab", "show", "attention=日本"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=tmp_path)
    assert done.returncode == 2 and b"\\u65e5" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("width", [80, 60, 40])
def test_listings_fit_a_terminal(width):
    """No line is longer than the terminal, no name is cut in two, and no choice's text vanishes."""
    rows = [
        {"name": "adaptive_span", "kind": "sparse by position", "time": "O(T (rows + columns) H)", "decode": True,
         "nature": "approximate", "error": 1e-7, "title": "Adaptive attention span (Sukhbaatar et al., 2019)."},
        {"name": "full", "kind": "full", "time": "O(T S H)", "decode": True, "nature": "exact", "error": None,
         "title": "Softmax attention (Vaswani et al., 2017) with many words more, so that it needs several lines."},
    ]  # fmt: skip
    file = io.StringIO()
    print_listing(rows, Console(file=file, force_terminal=True, color_system=None, width=width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("adaptive_span" in line for line in lines) == 1
    for row in rows:
        for word in f"{row['time']} {row['nature']} {row['title']}".split():
            assert any(word in line for line in lines), word


@pytest.mark.parametrize("columns", ["80", "60"])
def test_help_fits_a_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for words in ([], ["compare"], ["generate"], ["check"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= int(columns)
        assert not words or words[0] != "compare" or "\n  seq_len=64" in text


@pytest.mark.full
@pytest.mark.parametrize("words", ["list ffn", "list ffn --json", "show ffn/mlp"])
def test_a_pipe_that_nobody_reads(words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "xformers_lab", *words.split()], stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert done.returncode in (0, 141) and done.stderr == b""


def test_what_is_logged_is_a_plain_line_whoever_else_sets_up_logging():
    program = (
        "import logging; from xformers_lab.terminal import log_in_lines; log_in_lines(); "
        "logging.basicConfig(); logging.getLogger('xformers_lab.train').warning('starts again in \\x1b[2J')"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr == "starts again in \\x1b[2J\n"
