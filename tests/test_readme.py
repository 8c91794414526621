"""README tells the truth: its commands run as written, its Python runs, its tables are the files' own."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

from conftest import ROOT

from xformers_lab import catalogue
from xformers_lab.cli.parser import COMMANDS

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_every_command_runs_as_written(tmp_path):
    environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for words in commands():
        if words[0] == "make":  # the demo and the tests themselves: make must at least know how
            done = subprocess.run(["make", "-n", "-C", ROOT, *words[1:]], capture_output=True, text=True)
        else:
            assert words[0] == "xlab"
            done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_every_subcommand_is_shown():
    known = {command.name for command in COMMANDS}
    shown = {words[1] for words in commands() if words[0] == "xlab"}
    assert known - shown == {"resume"}  # in the text: it needs a run to be interrupted
    assert "`xlab resume RUN_DIR`" in TEXT


def test_python_block_runs():
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT)


def test_catalogue_is_the_shelves_own():
    written = TEXT.partition("<!-- catalogue -->\n")[2].partition("\n\nTasks read data")[0].strip()
    assert written == catalogue.markdown().strip(), (
        "run: python -c 'from xformers_lab import catalogue; print(catalogue.markdown())'"
    )


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
