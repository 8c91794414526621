"""Checkpoints that are verified before they are used; the only module that knows Orbax.

`checkpoints/<step>/` holds an Orbax directory `state` and MANIFEST.json: the step, the size and sha256 of every file,
the path, shape and type of every array, and what the run was. All is written beside its place, read back, synced, and
renamed in one go, so a folder with a number for a name was once complete: whatever it lacks or holds otherwise is
damage. Orbax itself has no checksum, and restores a flipped bit without a word. Whatever else lies in `checkpoints/` is
somebody's own: neither read nor deleted, and no link is followed.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xformers_lab.errors import IntegrityError, RunFailed, UsageError, ran_out_of_memory
from xformers_lab.files import sync
from xformers_lab.train import hosts, records

SCHEMA = 1
KEPT = 2
STEP = re.compile(r"0|[1-9][0-9]*")  # as `save` writes one: `019` and digits of other scripts are not ours
LEFT = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?\.(new|old)")  # what a process that was killed leaves
PLAIN = re.compile(r"[\w/ .,=+@%:-]*")  # Orbax takes [ and ] in a path for a pattern, and a backslash for an escape
log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that does not verify; the message names the file."""


def check_place(run_dir: pathlib.Path, last: int, every: int) -> None:
    """Raises UsageError where the checkpoint of step `last`, or of one of `every` so many (0: none), could not be
    saved, before anything trains."""
    parent = run_dir / "checkpoints"
    if os.path.lexists(parent) and not parent.is_dir():
        raise UsageError(f"{parent}: checkpoints go there, and it is no folder; move it away")
    for path in parent.glob("*"):
        step = int(path.name) if STEP.fullmatch(path.name) else -1
        due = step == last or (every > 0 and 0 < step < last and step % every == 0)
        if due and not _written(path):
            raise UsageError(f"{path}: a checkpoint goes there, and it is none of this run's; move it away")
    try:
        with _plain(parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{parent}: Orbax cannot write to a path with such characters, and no link to it can be made "
            f"({error}); choose another folder with runs="
        ) from None


def save(run_dir: pathlib.Path, step: int, state: Any, about: dict) -> pathlib.Path:
    """Write a pytree of arrays as the newest checkpoint, keep the last two. -> its folder.

    about: what must be the same where it is restored, {"config": id, ...}; "details" among it says in words what the
    others stand for, {"config": {"lr": 0.001, ...}}. Raises RunFailed, with nothing written and the earlier ones as
    they were, where a value is not finite, the disk is full, or what was written does not read back.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise RunFailed(f"non-finite values in {name} at step {step}: not saved")
    folder = run_dir / "checkpoints" / str(step)
    writer = hosts.of_first(os.getpid)
    fresh, old = (folder.with_name(f"{step}.{writer}.{end}") for end in ("new", "old"))
    records.still_there(run_dir)

    def begin() -> None:
        folder.parent.mkdir(parents=not records.works_in(run_dir), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            sync(run_dir / "metrics.jsonl")  # no checkpoint of a step whose line the disk does not hold
        for path in folder.parent.iterdir():
            if LEFT.fullmatch(path.name):
                _remove(path)
        fresh.mkdir()

    def finish() -> None:
        if os.path.lexists(folder):
            if not _written(folder):
                raise RunFailed(f"{folder}: something else is in the way of the checkpoint; move it away")
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)

    try:
        hosts.of_first(begin)
        _write(fresh, step, leaves, about)
        hosts.of_first(finish)
    except Exception as error:
        if hosts.first():
            shutil.rmtree(fresh, ignore_errors=True)
            if old.is_dir() and not os.path.lexists(folder):
                old.rename(folder)
        records.still_there(run_dir)
        reason = _unwritten(error)
        if reason is None:
            raise
        raise RunFailed(f"{folder}: cannot save step {step} ({reason}); earlier checkpoints are intact") from error
    records.still_there(run_dir)
    if not hosts.first():
        return folder
    _remove(old)
    # Steps only grow: anything beyond this one is what a resume fell back from.
    newest = [other for other in steps(run_dir) if other <= step][-KEPT:]
    for other in steps(run_dir):
        if other not in newest:
            _remove(folder.with_name(str(other)))
    return folder


def steps(run_dir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that a run holds, oldest first, whether or not they verify."""
    numbered = (path for path in (run_dir / "checkpoints").glob("*") if STEP.fullmatch(path.name))
    return sorted(int(path.name) for path in numbered if _written(path))


def restore(run_dir: pathlib.Path, target: Any, about: dict) -> tuple[Any, int]:
    """The newest checkpoint that verifies, as a pytree like `target` (ShapeDtypeStructs with shardings) -> state, step.

    Warns where an older one had to do. Raises IntegrityError where none verifies, UsageError where a good one does not
    belong to what `about` and `target` say.
    """
    damage = []
    for step in reversed(hosts.of_first(lambda: steps(run_dir))):
        folder = run_dir / "checkpoints" / str(step)
        try:
            manifest = hosts.of_first(lambda folder=folder: verify(folder), Damaged)
            _same(folder, manifest, target, about)
            state = hosts.agreed(lambda folder=folder: _arrays(folder, target), Damaged)
        except Damaged as error:
            damage.append((step, str(error)))
            continue
        for bad, reason in damage:
            log.warning("checkpoint of step %d is damaged (%s): going on from step %d", bad, reason, step)
        return state, step
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damage)
    raise IntegrityError(
        f"{run_dir}: no checkpoint verifies ({reasons or 'there is none'}); delete that folder and "
        f"start again with xlab train, or leave it and start again with xlab resume {run_dir} --from-scratch"
    )


def arrays(folder: pathlib.Path) -> dict[str, jax.Array]:
    """Every array of a checkpoint by its path, on the host; raises IntegrityError where it does not verify."""
    try:
        shapes = {
            name: _on_host(jax.ShapeDtypeStruct(tuple(each["shape"]), each["dtype"]))
            for name, each in verify(folder)["arrays"].items()
        }
        return _arrays(folder, shapes)
    except Damaged as error:
        raise IntegrityError(f"{error}; train that run again") from None


def verify(folder: pathlib.Path) -> dict:
    """The manifest of a checkpoint, every file checked against it; raises Damaged."""
    body = _manifest(folder)
    if body["schema"] > SCHEMA:
        path = folder / "MANIFEST.json"
        raise UsageError(f"{path}: schema {body['schema']} is newer than this version's {SCHEMA}; update xformers_lab")
    if str(body["step"]) != folder.name:
        raise Damaged(f"{folder}: it is the checkpoint of step {body['step']}, under another number")
    present = _files(folder)
    for name, entry in body["files"].items():
        if name not in present:
            raise Damaged(f"{folder / name}: missing")
        if present[name].stat().st_size != entry["bytes"]:
            raise Damaged(f"{folder / name}: {present[name].stat().st_size} bytes, not {entry['bytes']}")
        if _sha256(present[name]) != entry["sha256"]:
            raise Damaged(f"{folder / name}: its content changed (sha256)")
    for name in present.keys() - body["files"].keys():
        raise Damaged(f"{folder / name}: not in the manifest")
    return body


def _manifest(folder: pathlib.Path) -> dict:
    """What a manifest says, without its own sha256; raises Damaged."""
    path = folder / "MANIFEST.json"
    if path.is_symlink():
        raise Damaged(f"{path}: a link, not a file")
    try:
        text = path.read_text()
        manifest = json.loads(text)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = text == _sealed(body)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {type(error).__name__}") from None
    if not whole:
        raise Damaged(f"{path}: its text does not match its own sha256")
    kinds = {"schema": int, "step": int, "about": dict, "arrays": dict, "files": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(body.get(key), kind)]:
        raise Damaged(f"{path}: no manifest of a checkpoint ({', '.join(wrong)})")
    return body


def details(run_dir: pathlib.Path, key: str) -> Mapping | None:
    """What the newest checkpoint with a whole manifest tells of what it belongs to, under "config" or "data"."""
    for step in reversed(steps(run_dir)):
        with contextlib.suppress(Damaged):
            about = _manifest(run_dir / "checkpoints" / str(step))["about"]
            return about.get("details", {}).get(key)
    return None


def differences(was: Mapping | None, now: Mapping | None) -> str:
    """What two descriptions do not share, in words: "lr was 0.001, is 0.01"; empty where one of them is not there."""
    if not was or not now:
        return ""
    old, new = dict(was), json.loads(json.dumps(now, default=str))
    shown = lambda value: text if len(text := f"{value}") <= 60 else f"{text[:57]}..."
    words = []
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            change = f"{key} was {shown(old.get(key))}, is {shown(new.get(key))}"
            words.append(f"the {key} changed" if key.endswith(" source") else change)
    return ", ".join(words[:6]) + (f", and {len(words) - 6} more" if len(words) > 6 else "")


def named_leaves(state: Any) -> dict[str, jax.Array]:
    """Every array of a pytree by its path, `params.stack.periods.0.ffn.up.kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two arrays share a path"
    return named


def _written(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint, a damaged one too."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return any(os.path.lexists(folder / name) for name in ("state", "MANIFEST.json"))


def _remove(folder: pathlib.Path) -> None:
    """Delete a checkpoint, or what a save left of one; a folder in which somebody put something else stays."""
    if folder.is_symlink() or not folder.is_dir():
        return
    known = lambda path: path.name in ("state", "MANIFEST.json") or path.name.startswith("state.orbax-checkpoint-tmp")
    strangers = [path.name for path in folder.iterdir() if not known(path)]
    with contextlib.suppress(Damaged):  # then the names at the top are all there is to know it by
        strangers += _files(folder).keys() - _manifest(folder)["files"].keys()
    if strangers:
        log.warning("%s: not deleted, since %s in it is none of the laboratory's", folder, min(strangers))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritten(error: Exception) -> str | None:
    """Why something could not be written, in one line; None for what is no fault of the disk."""
    if isinstance(error, Damaged):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError):  # of a device, or of another process that is gone
        return None
    text = str(error)
    if "No space left" in text or "os error 28" in text.lower():
        return "No space left on device"
    if isinstance(error, OSError):
        return error.strerror or text
    # Tensorstore raises a ValueError that begins with a status and has the whole path in each of its parts.
    return text.splitlines()[0][:200] if re.match(r"[A-Z]+(_[A-Z]+)*: ", text) else None


@contextlib.contextmanager
def _plain(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder by a path that Orbax reads as it stands: its own, or through a link that goes again."""
    folder = folder.absolute()
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    places = [place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp") if PLAIN.fullmatch(place)]
    place = next((place for place in places if os.access(place, os.W_OK)), None)
    if place is None:
        raise OSError(f"no folder for temporary files with a plain name is writable: {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory(dir=place, prefix="xlab-") as above:
        link = pathlib.Path(above) / "run"
        link.symlink_to(folder, target_is_directory=True)
        try:
            yield link
        finally:
            link.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Meanwhile Orbax says nothing: the error that it raises says all, and its threads would print it once for each
    array, with tracebacks."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    was = logger.disabled

    def unheard(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.disabled, sys.unraisablehook = True, unheard
    try:
        yield
        sys.unraisablehook = hook  # where it failed, threads may still be at it
    finally:
        logger.disabled = was


def _write(folder: pathlib.Path, step: int, leaves: dict, about: dict) -> None:
    """Into an empty folder. Of several processes each writes, and looks again at, what its devices hold."""
    with _plain(folder) as plain, _quiet(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(plain / "state", _full(leaves))
        checkpointer.wait_until_finished()
    hosts.agreed(lambda: _read_back(folder, leaves), Damaged)
    hosts.of_first(lambda: _seal(folder, step, leaves, about), Damaged)


def _read_back(folder: pathlib.Path, leaves: dict) -> None:
    """Raises Damaged where arrays are otherwise than they were written."""
    again = named_leaves(_arrays(folder, {name: _on_host(leaf) for name, leaf in leaves.items()}))
    for name, leaf in leaves.items():
        if not all(np.array_equal(part, _numbers(again[name])[where]) for where, part in _parts(leaf)):
            raise Damaged(f"{folder / 'state'}: {name} reads back otherwise than it was written")


def _parts(leaf: jax.Array) -> Iterator[tuple[Any, np.ndarray]]:
    """(where, numbers) of what this process holds of an array."""
    if leaf.is_fully_addressable:
        yield ..., _numbers(leaf)
    else:
        yield from ((shard.index, _numbers(shard.data)) for shard in leaf.addressable_shards)


def _seal(folder: pathlib.Path, step: int, leaves: dict, about: dict) -> None:
    """Write the manifest, once the disk holds all files."""
    files = {}
    for name, path in sorted(_files(folder).items()):
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    body = {"schema": SCHEMA, "step": step, "about": about, "arrays": _described(leaves), "files": files}
    manifest = folder / "MANIFEST.json"
    manifest.write_text(_sealed(body))
    sync(manifest)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def _arrays(folder: pathlib.Path, target: Any) -> Any:
    """The arrays of a checkpoint as a pytree like `target`; raises Damaged where Orbax cannot read them."""
    leaves = named_leaves(target)
    try:
        with _plain(folder) as plain, _quiet(), ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore(plain / "state", _full(leaves))
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise Damaged(f"{folder / 'state'}: its arrays cannot be read ({_first_line(error)})") from None
    empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    values = [stored[name] if name in stored else empty(leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _on_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Where an array is read back to: the device may have no room for it twice."""
    try:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        sharding = leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _numbers(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def _full(leaves: dict) -> dict:
    """Orbax refuses arrays without elements; their shape says all there is to know."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _described(leaves: dict) -> dict:
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}


def _same(folder: pathlib.Path, manifest: dict, target: Any, about: dict) -> None:
    stored, now = manifest["about"], {key: value for key, value in about.items() if key != "details"}
    for key, value in now.items():
        if stored.get(key) != value:
            details = (each.get("details", {}).get(key) for each in (stored, about))
            what = differences(*details) or f"{stored.get(key)}, now {value}"
            raise UsageError(
                f"{folder}: belongs to another {key} ({what}); give the old one back, or delete "
                f"{folder.parent.parent} and start again with xlab train"
            )
    wanted, stored = _described(named_leaves(target)), manifest["arrays"]
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise UsageError(
                f"{folder}: {name} is stored as {stored.get(name)}, but the model has {wanted.get(name)}: it is of "
                f"another version; delete {folder.parent.parent} and start again with xlab train"
            )


def _sealed(body: dict) -> str:
    """The text of a manifest, with the sha256 of the rest in it: equal to the file's, or the file is damaged."""
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, sort_keys=True, indent=1) + "\n"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every plain file beneath a folder by its relative name; the manifest is none of them."""
    paths = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / "MANIFEST.json"}


def _sha256(path: pathlib.Path) -> str:
    if path.is_symlink():
        raise Damaged(f"{path}: a link, not a file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
