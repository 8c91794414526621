"""What is compiled is kept from command to command, computes the same, and leaves the user's own cache alone."""

import json
import os
import subprocess
import sys

import pytest

from xformers_lab import program_cache
from xformers_lab.doctor import kept_programs

VARIABLES = (program_cache.VARIABLE, *program_cache.ALL)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.full
def test_a_second_command_compiles_nothing_and_ends_in_the_same_bits(home):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    records, kept = [], []
    for runs in ("a", "b"):
        words = ["train", "task=copy", "seq_len=8", "steps=4", "batch=2", "dim=8", "layers=1", "heads=1"]
        command = [sys.executable, "-m", "xformers_lab", *words, f"runs={home / runs}", "--json"]
        records.append(json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout))
        kept.append({path.name for path in program_cache.folder().iterdir()})
    assert kept[0] == kept[1] and len(kept[0]) > 10
    first, second = records
    assert all(first[key] == second[key] for key in ("id", "loss", "metric", "temp_bytes"))
    # As long as it took when it was compiled, and not as long as it took to find it.
    assert second["compile_seconds"] > first["compile_seconds"] / 4


def test_the_users_own_folder_is_left_alone(home):
    for own in ({program_cache.VARIABLE: "/elsewhere"}, {program_cache.VARIABLE: ""}):
        environment = dict(own)
        program_cache.use(environment)
        assert environment == own


def test_without_a_folder_there_is_no_cache(home, monkeypatch):
    (home / "xformers_lab").write_text("a file where the folder would be")
    environment = {}
    program_cache.use(environment)
    assert environment == {}


def test_the_oldest_programs_go_when_there_are_too_many_bytes(tmp_path):
    for age in range(10):
        path = tmp_path / f"program{age}"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    program_cache.keep_small(tmp_path, largest=1000)
    assert len(list(tmp_path.glob("program*"))) == 10
    (tmp_path / "program10").write_bytes(bytes(100))
    program_cache.keep_small(tmp_path, largest=1000)
    assert len(list(tmp_path.glob("program*"))) == 11, "it looks once a day"
    (tmp_path / ".looked").unlink()
    program_cache.keep_small(tmp_path, largest=1000)
    newest = {f"program{age}" for age in range(4)} | {"program10"}
    assert {path.name for path in tmp_path.glob("program*")} == newest


def test_doctor_says_where_they_are(home, tmp_path):
    environment = {}
    program_cache.use(environment)
    place = program_cache.folder()
    (place / "program").write_bytes(bytes(5 << 20))
    assert kept_programs.examine(environment)["found"] == f"kept in {place}, 5 MiB"
    for without in ({}, {program_cache.VARIABLE: ""}, {**environment, "JAX_ENABLE_COMPILATION_CACHE": "false"}):
        finding = kept_programs.examine(without)
        assert finding["ok"] is None and finding["found"].startswith("not kept, ")
