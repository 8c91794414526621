"""The folder of a run: what was lost, moved, edited or put there by somebody else is said, never passed over."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab import sources
from xformers_lab.cli import main
from xformers_lab.compare import run as grid
from xformers_lab.compare import sweep
from xformers_lab.config import Config
from xformers_lab.errors import IntegrityError, RunFailed, UsageError
from xformers_lab.record import broken, sealed
from xformers_lab.report import patterns
from xformers_lab.train import checkpoint, loop, records, settled, trained

SAME = ("loss", "metric", "validation", "steps")


def copying(runs: pathlib.Path, **changes) -> Config:
    return tiny("copy", runs, **{"dim": 8, "steps": 6, "save_every": 2, "eval_batches": 1, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """The folder of a run that came to its end, and its record."""
    config = copying(tmp_path_factory.mktemp("finished"))
    return configs.folder(config), loop.run(config)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> pathlib.Path:
    """The folder of the same run, stopped on its way."""
    config, seen = copying(tmp_path_factory.mktemp("stopped")), []
    with pytest.raises(loop.Interrupted):
        loop.run(config, progress=lambda step, *_: seen.append(step), stop=lambda: len(seen) >= 3)
    assert checkpoint.steps(configs.folder(config))[-1] in (4, 5)
    return configs.folder(config)


@pytest.fixture
def half(stopped, tmp_path) -> pathlib.Path:
    """A copy of `stopped`, under the same name."""
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "runs" / "copy" / stopped.name))


@pytest.fixture
def done(finished, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "runs" / "copy" / finished[0].name))


def config_of(folder: pathlib.Path) -> Config:
    return configs.edit(configs.stored(folder / "config.json"), runs=str(folder.parents[1]))


# ---- what was lost ---------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_without_its_checkpoints_a_run_starts_again_only_if_told_to(half, finished, caplog):
    shutil.rmtree(half / "checkpoints")
    with pytest.raises(IntegrityError, match=r"trained to step \d and holds no checkpoint.*--from-scratch") as caught:
        loop.resume(half)
    assert caught.value.exit_code == 4
    record = loop.resume(half, from_scratch=True)
    assert "holds no checkpoint" in caplog.text and "it starts again at step 1" in caplog.text
    assert {key: record[key] for key in SAME} == {key: finished[1][key] for key in SAME}


@pytest.mark.full
def test_a_run_that_ended_and_lost_its_checkpoints_says_so(done):
    shutil.rmtree(done / "checkpoints")
    assert loop.resume(done)["status"] == "ok"  # its record
    with pytest.raises(UsageError, match=r"holds no checkpoint; xlab resume .* --from-scratch makes one"):
        trained.evaluate(done)
    loop.resume(done, from_scratch=True)
    assert trained.evaluate(done)["step"] == 6


def test_train_says_that_it_starts_again(half, caplog):
    shutil.rmtree(half / "checkpoints")
    loop.run(config_of(half))
    assert "holds no checkpoint" in caplog.text and "it starts again at step 1" in caplog.text


def edit_lines(folder: pathlib.Path, how: str) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    match how:
        case "deleted":
            del lines[1]
        case "torn":
            lines[1] = lines[1][:15]
        case "no loss":
            lines[1] = '{"step": 2}'
        case "nested":
            lines[1] = "[" * 100_000
        case "words":
            lines[1] = '{"step": 2, "loss": "low"}'
        case "another step":
            lines[1] = lines[1].replace('"step": 2', '"step": true')
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("how", ["deleted", "torn", "no loss", "nested", "words", "another step"])
def test_lost_lines_of_metrics_are_named(half, how):
    edit_lines(half, how)
    with pytest.raises(IntegrityError, match=r"metrics.jsonl: the lines of steps 2 are missing or damaged"):
        loop.resume(half)


def test_lost_metrics_start_again_if_told_to(half, finished):
    (half / "metrics.jsonl").unlink()
    with pytest.raises(IntegrityError, match=r"steps 1 to \d are missing"):
        loop.resume(half)
    record = loop.resume(half, from_scratch=True)
    assert {key: record[key] for key in SAME} == {key: finished[1][key] for key in SAME}
    assert len(records.read(half)) == 6


def test_nothing_lost_goes_on_from_scratch_or_not(half, finished):
    seen = []
    record = loop.resume(half, from_scratch=True, progress=lambda step, *_: seen.append(step))
    assert seen[0] > 3 and record["loss"] == finished[1]["loss"]


@pytest.mark.full
@pytest.mark.parametrize("how", ["moved", "deleted", "replaced", "metrics deleted"])
def test_a_folder_that_is_gone_is_not_made_again(tmp_path, how):
    config = copying(tmp_path / "runs")
    folder = configs.folder(config)

    def progress(step, *_):
        if step == 3 and how == "moved":
            folder.rename(tmp_path / "moved")
        if step == 3 and how == "deleted":
            shutil.rmtree(folder)
        if step == 3 and how == "replaced":
            shutil.rmtree(folder)
            folder.mkdir()
        if step == 3 and how == "metrics deleted":
            (folder / "metrics.jsonl").unlink()

    with pytest.raises(RunFailed, match="metrics.jsonl" if "metrics" in how else "was moved, replaced or deleted"):
        loop.run(config, progress=progress)
    if how == "replaced":
        assert not list(folder.iterdir())
    elif "metrics" not in how:
        assert not folder.exists()
    if how == "moved":  # what went with it is good
        assert loop.resume(tmp_path / "moved")["status"] == "ok"


def test_a_folder_that_goes_in_a_save_is_not_made_again(tmp_path, monkeypatch):
    config, write = copying(tmp_path / "runs"), checkpoint._write
    folder = configs.folder(config)

    def moving(*arguments):
        write(*arguments)
        folder.rename(tmp_path / "moved")

    monkeypatch.setattr(checkpoint, "_write", moving)
    with pytest.raises(RunFailed, match="was moved, replaced or deleted"):
        loop.run(config)
    assert not folder.exists()


# ---- whose result it is -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_result_cannot_stand_for_anothers(done, tmp_path):
    other = copying(done.parents[1], lr=0.5)
    folder = configs.folder(other)
    folder.mkdir()
    shutil.copy(done / "result.json", folder)
    assert sweep.stored(config_of(done)) is not None and sweep.stored(other) is None
    with pytest.raises(IntegrityError, match=f"it is of run {done.name}, not of {folder.name}") as caught:
        loop.run(other)
    assert caught.value.exit_code == 4
    record = json.loads((done / "result.json").read_text()) | {"id": folder.name}
    (folder / "result.json").write_text(json.dumps(record))
    assert sweep.stored(other) is None
    with pytest.raises(IntegrityError, match="seal does not match"):
        settled.record(folder, lambda: pytest.fail("it is refused before"))


@pytest.mark.full
@pytest.mark.parametrize("change", [{"metric": 1.0}, {"loss": 0.0}, {"curve": []}, {"tokens_per_second": 1e9}])
def test_an_edited_result_is_refused(done, change):
    path = done / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert sweep.stored(config_of(done)) is None
    with pytest.raises(IntegrityError, match="its seal does not match"):
        loop.run(config_of(done))
    path.unlink()
    assert loop.resume(done)["metric"] != 1.0  # made again, from the last checkpoint


def test_a_result_that_cannot_be_read_is_made_again_and_said(done, finished, caplog):
    (done / "result.json").write_text('{"id": ')
    assert loop.resume(done)["metric"] == finished[1]["metric"]
    assert "result.json: cannot be read, so it is made again" in caplog.text


def test_a_seal_is_of_the_content_and_not_of_its_form(finished):
    record = json.loads((finished[0] / "result.json").read_text())
    assert broken(dict(reversed(record.items())), record["id"]) is None
    assert "no seal" in str(broken({key: record[key] for key in record if key != "seal"}, record["id"]))
    assert finished[1] == record == sealed(record) and "seal" not in grid.row(config_of(finished[0]), record, [])


def test_a_folder_under_another_runs_name_is_refused(half):
    renamed = half.rename(half.with_name("0123456789ab"))
    for use in (loop.resume, trained.evaluate, trained.load):
        with pytest.raises(IntegrityError, match="has the id of another run for its name"):
            use(renamed)
    assert loop.resume(renamed.rename(half.with_name("the best one")))["status"] == "ok"


# ---- whose code runs ----------------------------------------------------------------------------------------------

MINE = """
from xformers_lab.attention.full import Full


class Mine(Full):
    pass
"""
EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\n" + MINE


@pytest.fixture
def evil(tmp_path):
    """A Python file that leaves a mark where it is imported, and the mark."""
    marker = tmp_path / "it ran"
    (tmp_path / "mine.py").write_text(EVIL.format(marker=str(marker)))
    return tmp_path / "mine.py", marker


@pytest.mark.full
def test_code_that_changed_since_it_was_trained_is_not_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    config = copying(tmp_path / "runs", attention=str(path))
    loop.run(config)
    folder = configs.folder(config)
    assert trained.evaluate(folder)["step"] == 6  # what was trained is trusted
    assert json.loads((folder / "sources.json").read_text()).keys() == {str(path)}
    marker = tmp_path / "it ran"
    path.write_text(EVIL.format(marker=str(marker)))
    script = "import sys; from xformers_lab.cli import main; sys.exit(main(sys.argv[1:]))"
    for use in (loop.resume, trained.evaluate, trained.load):
        with pytest.raises(UsageError, match=r"mine.py, which changed since: look at what it is, then --trust"):
            use(folder)
    command = [sys.executable, "-c", script, "eval", str(folder)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2 and not marker.exists()
    # Trusted, it runs; that it is another mechanism than the trained one is found then.
    ran = subprocess.run([*command, "--trust"], check=False, capture_output=True, text=True)
    assert ran.returncode == 2 and marker.exists() and "the attention source changed" in ran.stderr


@pytest.mark.parametrize(
    "choice",
    [
        {"attention": "{path}"},
        {"attention": "{path}/."},
        {"attention": "full+{path}:window=3"},
        {"attention": "full,({path})"},
        {"attention": ["full", "{path}"]},
        {"model": {"norm": "pre:normaliser=({path})"}},
        {"train.model": "encoder_decoder:cross=({path}:a=1)"},
        {"task": "{path}"},
    ],
)
def test_a_file_that_names_code_runs_none(half, evil, monkeypatch, choice):
    path, marker = evil
    fill = lambda value: (
        {key: fill(item) for key, item in value.items()}
        if isinstance(value, dict)
        else [fill(item) for item in value]
        if isinstance(value, list)
        else value.format(path=path)
    )
    tree = fill(choice)
    (half / "config.json").write_text(json.dumps(tree))
    for use in (loop.resume, trained.evaluate, trained.load):
        with pytest.raises(UsageError, match=r"mine.py(/.)?, of which no source is stored"):
            use(half)
    with pytest.raises(UsageError, match=r"names code outside the package .*mine.py.*--trust"):
        configs.sweep([f"@{half / 'config.json'}"])
    assert patterns.figures([{"config": tree}]) == []
    assert not marker.exists()


@pytest.mark.parametrize("command", ["train", "compare", "bench", "show"])
def test_commands_ask_for_trust(evil, capsys, command):
    path, marker = evil
    (path.parent / "c.toml").write_text(f"attention = {str(path)!r}\n")
    assert main([command, f"@{path.parent}/c.toml", "task=copy"]) == 2
    assert "names code outside the package" in capsys.readouterr().err and not marker.exists()


def test_a_file_is_run_if_trusted(evil, capsys):
    path, marker = evil
    (path.parent / "c.toml").write_text(f"attention = {str(path)!r}\n")
    assert main(["show", f"@{path.parent}/c.toml", "task=copy", "--trust"]) == 0
    assert marker.exists() and str(path) in capsys.readouterr().out.replace("\n", "")


def test_modules_are_code_too(tmp_path, monkeypatch, half):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "it ran"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    (half / "config.json").write_text(json.dumps({"attention": "theirs.mine"}))
    with pytest.raises(UsageError, match=r"theirs.mine, of which no source is stored"):
        loop.resume(half)
    assert not marker.exists()


def test_what_is_typed_runs_and_a_file_too_if_trusted(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "c.toml").write_text(f'attention = "{tmp_path}/mine.py"\n')
    typed = configs.single([f"attention={tmp_path}/mine.py"])
    assert configs.single([f"@{tmp_path}/c.toml"], trust=True) == typed
    (tmp_path / "recipe.py").write_text(f"configs = [{{'attention': {str(tmp_path / 'mine.py')!r}}}]\n")
    assert configs.single([f"@{tmp_path}/recipe.py"]) == typed  # Python that was typed may name Python


def test_the_source_of_a_choice_within_a_choice_is_a_part_of_what_a_run_is(tmp_path):
    path = tmp_path / "mine.py"
    ids = []
    for text in ("# one", "# two"):
        path.write_text(text)
        ids.append(configs.identity(configs.single([f"norm=pre:normaliser=({path})"])))
    assert ids[0] != ids[1]


def test_data_are_no_code(tmp_path):
    (tmp_path / "text.py").write_text("raise SystemExit")
    assert sources.of({"task": f"lm:path={tmp_path}/text.py", "runs": f"{tmp_path}/text.py", "attention": "full"}) == {}
    assert sources.of({"attention": [None, 3, "local:window=4+full"], "x": "no.such.module", "y": "1.5"}) == {}


# ---- files and locks -----------------------------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("mine")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.json.tmp", f"config.json.{os.getpid()}.tmp", "config.json", "metrics.jsonl"):
        (run_dir / name).symlink_to(theirs)
    with pytest.raises(RunFailed, match="cannot be written"):
        records.append(run_dir, {"step": 1, "loss": 1.0})
    records.write_json(run_dir / "config.json", {"a": 1})
    records.cut(run_dir, 0)
    records.append(run_dir, {"step": 1, "loss": 1.0})
    assert theirs.read_text() == "mine" and not (run_dir / "config.json").is_symlink()
    (run_dir / ".lock").symlink_to(theirs)
    with pytest.raises(UsageError, match="cannot be written"), records.locked(run_dir):
        pass
    assert theirs.read_text() == "mine"


def test_a_folder_in_use_is_refused_before_jax_is_imported(half):
    script = "import sys; from xformers_lab.cli import main; code = main(sys.argv[1:]); "
    script += "sys.exit(9 if 'jax' in sys.modules else code)"
    words = ["task=copy", "dim=8", f"runs={half.parents[1]}"]
    records.typed(words)
    with records.locked(half):
        for command in (["resume", str(half)], ["train", *words]):
            ran = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
            assert ran.returncode == 2 and f"process {os.getpid()}" in ran.stderr and "is running this" in ran.stderr
    records.typed([])
    records.refuse_if_typed(words, half.parents[1])
