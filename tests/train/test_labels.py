"""What people call a run, when it began and from what revision: kept beside the result and no part of it."""

import datetime
import json
import subprocess

import pytest
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab.compare import run as grids
from xformers_lab.config import edit
from xformers_lab.supervise.process import Worker
from xformers_lab.train import loop, provenance, records


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished run with a name, and its record."""
    config = tiny("copy", tmp_path_factory.mktemp("runs"), eval_batches=1, steps=2, name="first", tags="a")
    return config, loop.run(config)


def labels(config) -> tuple:
    stored = records.read_json(configs.folder(config) / "config.json") or {}
    return stored["name"], stored["tags"]


class Nothing:
    """Nothing trains."""

    def started(self, index, cell):
        pytest.fail("it is trained already")

    def stepped(self, index, step, total, loss):
        pytest.fail("it is trained already")

    def finished(self, index, count, record):
        pass


def test_a_run_keeps_what_it_is_called_until_it_is_called_otherwise(ran):
    config, record = ran
    assert labels(config) == ("first", "a") and record["config"]["name"] == "first"
    path = configs.folder(config) / "config.json"
    began = path.stat().st_mtime_ns
    assert loop.run(edit(config, name=None, tags=None)) == record and labels(config) == ("first", "a")
    assert loop.run(edit(config, name="second", tags="b+a")) == record and labels(config) == ("second", "a+b")
    grids.train_cells(
        [edit(config, name=None, tags="study")],
        Worker(),
        ended={},
        progress=Nothing(),
    )
    assert labels(config) == ("second", "a+b+study") and path.stat().st_mtime_ns == began


def test_a_record_says_when_it_began_and_from_what_revision(ran):
    config, record = ran
    began, ended = (datetime.datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    assert began <= ended <= datetime.datetime.now(datetime.UTC) and began.utcoffset() == datetime.timedelta(0)
    env = records.read_json(configs.folder(config) / "env.json") or {}
    assert (env["started"], env["git"]) == (record["started"], record["git"]) and "resumed" not in env


def test_a_run_that_goes_on_began_when_it_began(tmp_path):
    records.write_json(tmp_path / "env.json", {"started": "2020-01-01T00:00:00+00:00", "git": None})
    again = provenance.beginning(tmp_path, 3)
    assert again["started"].startswith("2020") and again["git"] is None and again["resumed"]["started"] > "2026"
    assert provenance.beginning(tmp_path, 0)["started"] > "2026", "one that starts again is new"


def test_the_revision_is_that_of_the_users_repository(tmp_path):
    git = lambda *words: (
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    )
    assert provenance.revision.__wrapped__(tmp_path) is None
    git("init", "-q")
    assert provenance.revision.__wrapped__(tmp_path) is None, "nothing is committed"
    (tmp_path / "mine.py").write_text("a")
    git("add", "mine.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    (tmp_path / "notes").write_text("a")  # untracked
    clean = provenance.revision.__wrapped__(tmp_path) or {}
    assert clean == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "mine.py").write_text("b")
    assert provenance.revision.__wrapped__(tmp_path) == {"commit": clean["commit"], "dirty": True}
    assert json.loads(json.dumps(clean)) == clean
