"""Checkpoints: what is saved comes back, and what was changed on the disk is found before it is used."""

import json
import logging
import os
import pathlib
import random
import resource
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab.errors import IntegrityError, RunFailed, UsageError
from xformers_lab.train import checkpoint
from xformers_lab.train.checkpoint import Damaged

ABOUT = {"config": "abc", "data": "def"}


def state_of(step: int) -> dict:
    """Every kind of leaf that a training state may hold."""
    return {
        "params": {"stack": {0: {"kernel": jnp.arange(4096, dtype=jnp.float32).reshape(2, 32, 64) + step}}},
        "half": jnp.full((3,), step, jnp.bfloat16),
        "empty": jnp.zeros((0, 4)),
        "key": jax.random.key(step),
        "step": jnp.int32(step),
    }


def target() -> dict:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state_of(0))


def same(a, b) -> bool:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return all(
        x.dtype == y.dtype and np.array_equal(plain(x), plain(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("original")
    for step in (5, 10):
        checkpoint.save(folder, step, state_of(step), ABOUT)
    return folder


@pytest.fixture
def run_dir(original, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


def files(run_dir: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(path for path in (run_dir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_what_is_saved_comes_back(run_dir):
    state, step = checkpoint.restore(run_dir, target(), ABOUT)
    assert step == 10 and same(state, state_of(10)) and not same(state, state_of(5))


def test_the_last_two_are_kept(tmp_path):
    for step in (3, 5, 20, 100):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, ABOUT)
    assert checkpoint.steps(tmp_path) == [20, 100]
    checkpoint.save(tmp_path, 30, {"x": jnp.float32(30)}, ABOUT)  # after a fall-back to step 20
    assert checkpoint.steps(tmp_path) == [20, 30]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]


def test_the_same_step_is_replaced(run_dir):
    checkpoint.save(run_dir, 10, state_of(7), ABOUT)
    state, step = checkpoint.restore(run_dir, target(), ABOUT)
    assert step == 10 and same(state, state_of(7))


def damages(rng: random.Random):
    """(name, what it does to a file): flipped bits, cut ends, lost and emptied files."""

    def flip(path: pathlib.Path):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def truncate(path: pathlib.Path):
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    return (
        [("flip", flip)] * 24
        + [("truncate", truncate)] * 8
        + [("delete", pathlib.Path.unlink)] * 4
        + [("zero", lambda path: path.write_bytes(bytes(path.stat().st_size)))] * 4
    )


def test_every_damage_is_found_and_the_older_one_used(original, tmp_path, caplog):
    rng = random.Random(0)
    for number, (kind, damage) in enumerate(damages(rng)):
        run_dir = pathlib.Path(shutil.copytree(original, tmp_path / str(number)))
        # Larger files are hit more often, as on a real disk; every third time any file.
        among = files(run_dir, 10)
        path = rng.choices(among, [1 if number % 3 == 0 else file.stat().st_size + 1 for file in among])[0]
        if not path.stat().st_size:
            continue
        damage(path)
        with pytest.raises(Damaged, match=path.name):
            checkpoint.verify(run_dir / "checkpoints" / "10")
        caplog.clear()
        state, step = checkpoint.restore(run_dir, target(), ABOUT)
        assert step == 5 and same(state, state_of(5)), (kind, path)
        (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert path.name in message and "step 10" in message and "step 5" in message
        shutil.rmtree(run_dir)


def test_all_damaged_is_an_integrity_error_and_nothing_is_deleted(run_dir):
    for step in (5, 10):
        largest = max(files(run_dir, step), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    before = files(run_dir, 5) + files(run_dir, 10)
    with pytest.raises(IntegrityError, match=r"step 10: .*; step 5: ") as caught:
        checkpoint.restore(run_dir, target(), ABOUT)
    assert caught.value.exit_code == 4
    assert before == files(run_dir, 5) + files(run_dir, 10)


@pytest.mark.parametrize("edit", ["schema", "escape", "extra", "link"])
def test_hostile_or_edited_folders_are_refused(run_dir, edit, tmp_path):
    folder = run_dir / "checkpoints" / "10"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    if edit == "escape":
        manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    if edit == "schema":
        del manifest["sha256"]
        manifest["schema"] = 99
        (folder / "MANIFEST.json").write_text(checkpoint._sealed(manifest))
        with pytest.raises(UsageError, match="schema 99 is newer"):
            checkpoint.verify(folder)
        return
    if edit == "extra":
        (folder / "state" / "more").write_text("x")
    if edit == "link":
        path = max(files(run_dir, 10), key=lambda path: path.stat().st_size)
        moved = path.rename(tmp_path / "elsewhere")
        path.symlink_to(moved)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")
    with pytest.raises(Damaged):
        checkpoint.verify(folder)


def test_another_run_or_model_is_refused(run_dir):
    with pytest.raises(UsageError, match="belongs to another data"):
        checkpoint.restore(run_dir, target(), ABOUT | {"data": "other"})
    wider = target() | {"half": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=target()["half"].sharding)}
    with pytest.raises(UsageError, match="half is stored as"):
        checkpoint.restore(run_dir, wider, ABOUT)
    full = target() | {"half": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=target()["half"].sharding)}
    with pytest.raises(UsageError, match=r"half is stored as .*bfloat16.*float32"):
        checkpoint.restore(run_dir, full, ABOUT)


def test_what_changed_is_named(tmp_path):
    details = {"config": {"lr": 0.001, "batch": 8, "attention source": ["a"]}, "data": {"files": ["a.txt"], "size": 3}}
    checkpoint.save(tmp_path, 5, {"x": jnp.float32(1)}, ABOUT | {"details": details})
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=target()["half"].sharding)}
    changed = {
        "config": {"lr": 0.01, "batch": 8, "attention source": ["b"], "clip": 1.0},
        "data": {"files": ("b.txt",)},
    }
    words = r"another config \(the attention source changed, lr was 0.001, is 0.01, clip was None, is 1.0\)"
    with pytest.raises(UsageError, match=words):
        checkpoint.restore(tmp_path, like, ABOUT | {"config": "other", "details": changed})
    with pytest.raises(
        UsageError, match=r"another data \(files was \['a.txt'\], is \['b.txt'\], size was 3, is None\)"
    ):
        checkpoint.restore(tmp_path, like, ABOUT | {"data": "other", "details": changed})
    assert checkpoint.restore(tmp_path, like, ABOUT | {"details": changed})[1] == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_never_saved(run_dir, value):
    state = state_of(15)
    state["params"]["stack"][0]["kernel"] = state["params"]["stack"][0]["kernel"].at[1, 3, 7].set(value)
    with pytest.raises(RunFailed, match=r"params.stack.0.kernel at step 15"):
        checkpoint.save(run_dir, 15, state, ABOUT)
    assert checkpoint.steps(run_dir) == [5, 10]


def test_a_save_that_fails_half_way_leaves_the_others(run_dir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sealed", full)
    with pytest.raises(RunFailed, match="No space left") as caught:
        checkpoint.save(run_dir, 15, state_of(15), ABOUT)
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["10", "5"]
    (run_dir / "checkpoints" / "15.new").mkdir()  # what a killed process leaves
    assert checkpoint.restore(run_dir, target(), ABOUT)[1] == 10
    checkpoint.save(run_dir, 15, state_of(15), ABOUT)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["10", "15"]


# ---- names ---------------------------------------------------------------------------------------------------------

ODD = ["p [v2]", "a[0]", "[", "a\\b", "a*b", "a?b", "{a,b}", "é ü 中", "a%20b", "~x", "x.", "#;$'\"", "new\nline"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(tmp_path, name):
    run_dir = tmp_path / name
    run_dir.mkdir()
    (tmp_path / "aXb").mkdir()  # what a pattern would match too
    checkpoint.check_place(run_dir, 10, 0)
    for step in (5, 10):
        checkpoint.save(run_dir, step, state_of(step), ABOUT)
    state, step = checkpoint.restore(run_dir, target(), ABOUT)
    assert step == 10 and same(state, state_of(10))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["10", "5"]
    assert not list((tmp_path / "aXb").iterdir())


def test_a_folder_that_orbax_cannot_write_to_is_refused_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "t[]"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    checkpoint.check_place(tmp_path / "plain", 10, 0)
    with pytest.raises(UsageError, match="choose another folder"):
        checkpoint.check_place(tmp_path / "p [v2]", 10, 0)


def test_a_checkpoint_under_another_number_is_damaged(run_dir, caplog):
    shutil.copytree(run_dir / "checkpoints" / "10", run_dir / "checkpoints" / "25")
    state, step = checkpoint.restore(run_dir, target(), ABOUT)
    assert step == 10 and same(state, state_of(10))
    assert "it is the checkpoint of step 10, under another number" in caplog.text


def test_what_is_not_ours_is_neither_read_nor_deleted(run_dir, tmp_path):
    parent = run_dir / "checkpoints"
    elsewhere = pathlib.Path(shutil.copytree(parent / "10", tmp_path / "elsewhere"))
    (parent / "77").write_text("mine")
    (parent / "12").symlink_to(elsewhere)
    (parent / "4.old").symlink_to(elsewhere)
    for name in ("\u0665", "019", "-3", "1e3", "notes.new", "notes.old", "13", "8.new"):
        (parent / name).mkdir()
        (parent / name / "notes").write_text("mine")
    before = {path: path.lstat().st_mtime_ns for path in parent.rglob("*") if path.relative_to(parent).parts[0] != "5"}
    assert checkpoint.steps(run_dir) == [5, 10]
    assert checkpoint.restore(run_dir, target(), ABOUT)[1] == 10
    checkpoint.save(run_dir, 15, state_of(15), ABOUT)
    assert checkpoint.steps(run_dir) == [10, 15]
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    checkpoint.verify(parent / "10")
    for step, ok in ((11, True), (12, False), (13, False), (77, False)):
        if ok:
            checkpoint.check_place(run_dir, step, 0)
        else:
            with pytest.raises(UsageError, match="none of this run's; move it away"):
                checkpoint.check_place(run_dir, step, 0)
            with pytest.raises(UsageError, match="none of this run's; move it away"):
                checkpoint.check_place(run_dir, 80, step)
            with pytest.raises(RunFailed, match="move it away"):
                checkpoint.save(run_dir, step, state_of(step), ABOUT)
    assert {path: path.lstat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("place", ["notes", "state/notes"])
def test_a_checkpoint_with_a_users_file_in_it_stays(run_dir, caplog, place):
    (run_dir / "checkpoints" / "5" / place).write_text("mine")
    checkpoint.save(run_dir, 15, state_of(15), ABOUT)
    assert (run_dir / "checkpoints" / "5" / place).read_text() == "mine" and "not deleted" in caplog.text


# ---- what Orbax does ------------------------------------------------------------------------------------------------


def test_arrays_that_cannot_be_read_are_damage(run_dir, caplog):
    """Their files are as the manifest says: they were written so."""
    folder = run_dir / "checkpoints" / "10"
    manifest = checkpoint.verify(folder)
    for path in files(run_dir, 10):
        if path.name != "MANIFEST.json":
            path.unlink()
    manifest["files"] = {}
    (folder / "MANIFEST.json").write_text(checkpoint._sealed(manifest))
    state, step = checkpoint.restore(run_dir, target(), ABOUT)
    assert step == 5 and same(state, state_of(5)) and "its arrays cannot be read" in caplog.text


def test_what_does_not_read_back_deletes_nothing(run_dir, monkeypatch):
    read = checkpoint._arrays
    monkeypatch.setattr(checkpoint, "_arrays", lambda folder, like: read(folder, like) | {"half": jnp.zeros(3)})
    with pytest.raises(RunFailed, match="half reads back otherwise"):
        checkpoint.save(run_dir, 15, state_of(15), ABOUT)
    monkeypatch.undo()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["10", "5"]
    assert checkpoint.restore(run_dir, target(), ABOUT)[1] == 10


def test_a_full_disk_is_one_message(run_dir, capfd):
    """A limit on the size of a file stands in for it: Orbax meets both in the same place."""
    state = {f"x{n}": jax.random.normal(jax.random.key(n), (64, 64)) for n in range(20)}
    checkpoint.save(run_dir, 11, state, ABOUT)  # what compiles is compiled
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"cannot save step 15 \(.*\); earlier checkpoints are intact") as caught:
            checkpoint.save(run_dir, 15, state, ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")
    assert checkpoint.steps(run_dir) == [10, 11] and checkpoint.verify(run_dir / "checkpoints" / "11")["step"] == 11


@pytest.mark.parametrize("lacking", ["step", "files", "about", "schema"])
def test_a_sealed_text_that_is_no_manifest_is_damage(run_dir, lacking):
    folder = run_dir / "checkpoints" / "10"
    manifest = checkpoint.verify(folder)
    manifest[lacking] = None
    (folder / "MANIFEST.json").write_text(checkpoint._sealed(manifest))
    with pytest.raises(Damaged, match=lacking):
        checkpoint.verify(folder)
