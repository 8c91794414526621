"""An experiment is ordinary commands: their words, seeds and scale."""

import pytest
from conftest import ROOT

from xformers_lab.errors import UsageError
from xformers_lab.experiment import bench, compare, library

FILE = '''"""Does it?"""

from xformers_lab.experiment import Claim, at_least, compare

CLAIM = Claim(says="It does.", source="A paper", literature="1.0", doubt="Nothing.", minutes=1)
STUDIES = {"only": compare("task=copy attention=full,linear")}


def judge(tables):
    return [at_least("full", tables["only"].metric(attention="full"), 0.5)]
'''


def test_a_study_is_a_command():
    study = compare("task=copy attention=full,linear dim=16,32 steps=100", budget="5m")
    assert study.line == "xlab compare task=copy attention=full,linear dim=16,32 steps=100 --no-baselines --budget 5m"
    assert study.of(seeds=[0, 1]).words[-1] == "seed=0,1"
    assert (
        bench("attention=full", passes="decode", check=False).line
        == "xlab bench attention=full --pass decode --no-check"
    )


def test_a_study_may_begin_with_a_run_of_another():
    study = compare("task=text init=none,{pretraining}").of(seeds=[0], runs={"pretraining": "runs/mlm/1"})
    assert "init=none,runs/mlm/1" in study.words


def test_a_study_may_read_the_folder_of_data():
    study = compare("task=text:path=({data}/sst2)")
    assert study.needs_data and not compare("task=copy").needs_data
    assert study.of(seeds=[0], data="a:b").words[0] == "task=text:path=(a:b/sst2)"


def test_scale_doubles_width_and_steps():
    study = compare("task=copy dim=16..64:x2 steps=100").of(seeds=[0], scale=2)
    assert set(study.words) == {"task=copy", "dim=32,64,128", "steps=200", "seed=0"}
    defaults = compare("task=copy").of(seeds=[0], scale=2)
    assert set(defaults.words) == {"task=copy", "dim=128", "steps=800", "seed=0"}
    assert set(bench("attention=full").of(seeds=[0], scale=2).words) == {"attention=full", "dim=128"}


def test_the_defaults_that_are_scaled_are_the_laboratorys():
    from xformers_lab.config import Config

    assert (Config().model.dim, Config().train.steps) == (64, 400)


@pytest.mark.parametrize("word", ["seed=3", "seeds=5", "runs=here"])
def test_words_leave_seeds_and_folder_to_the_command(word):
    with pytest.raises(UsageError, match="xlab experiment run"):
        compare(f"task=copy {word}")


def test_a_file_is_loaded_by_its_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    mine = library.load(str(path))
    assert (mine.name, mine.question, list(mine.studies)) == ("mine", "Does it?", ["only"])
    assert "at_least" in mine.rule and len(mine.digest) == 12


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"""Does it?"""', "", "no docstring"),
        ("CLAIM = Claim(", "OTHER = Claim(", "CLAIM has to be"),
        ('{"only": compare("task=copy attention=full,linear")}', "{}", "STUDIES holds"),
        ("def judge", "def other", "judge has to be"),
        ("minutes=1)", "minutes=1, hours=1)", "hours"),
        ("minutes=1)", 'minutes=1, data={"sst2": "reviews"})', "go together"),
        ("task=copy", "task=text:path={data}/sst2", "go together"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, old, new, message):
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(UsageError, match=message):
        library.load(str(path))


def test_a_name_that_is_none():
    with pytest.raises(UsageError, match="extrapolation"):
        library.load("extrapolatoin")
    with pytest.raises(UsageError, match="no such file"):
        library.load("nowhere.py")


@pytest.mark.parametrize("name", library.names())
def test_every_experiment_can_be_read(name, monkeypatch):
    """What a file says is whole, its words are sweeps that can be, and it is as short as a reader wants it."""
    monkeypatch.chdir(ROOT)  # words name files from where the command runs
    from xformers_lab import config as configs

    known = library.load(name)
    most = 90 if name == "shelf" else 10  # that has every mechanism at five tasks
    assert known.question.endswith("?") and known.claim.minutes <= most
    assert len(known.path.read_text().splitlines()) <= 60
    for study in known.studies.values():
        for scale in (1, 2):
            words = study.of(seeds=[0], scale=scale, runs=dict.fromkeys(known.studies, "none"), data="data").words
            configs.study(words) if study.command == "compare" else configs.sweep(words)
