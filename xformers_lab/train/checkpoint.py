"""Checkpoints that are verified before they are used; the only module that knows Orbax.

`checkpoints/<step>/` holds an Orbax directory `state` and MANIFEST.json: the size and sha256 of every file, the path,
shape and type of every array, and what the run was. All is written beside its place, synced, and renamed in one go, so
a folder with a number for a name was once complete: whatever it lacks or holds otherwise is damage. Orbax itself has no
checksum, and restores a flipped bit without a word.
"""

import hashlib
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from xformers_lab.errors import IntegrityError, RunFailed, UsageError
from xformers_lab.files import sync

SCHEMA = 1
KEPT = 2
log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that does not verify; the message names the file."""


def save(run_dir: pathlib.Path, step: int, state: Any, about: dict) -> pathlib.Path:
    """Write a pytree of arrays as the newest checkpoint, keep the last two. -> its folder.

    about: what must be the same where it is restored, {"config": id, ...}. Raises RunFailed, with nothing written,
    where a value is not finite or the disk is full.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise RunFailed(f"non-finite values in {name} at step {step}: not saved")
    folder = run_dir / "checkpoints" / str(step)
    fresh, old = folder.with_name(f"{step}.new"), folder.with_name(f"{step}.old")
    for leftover in folder.parent.glob("*.new"), folder.parent.glob("*.old"):
        for path in leftover:
            shutil.rmtree(path)
    try:
        _write(fresh, step, leaves, about)
    except (OSError, ValueError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError) or "RESOURCE_EXHAUSTED" in str(error) or "No space" in str(error):
            raise RunFailed(f"{folder}: cannot save step {step} ({error}); earlier checkpoints are intact") from error
        raise
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    # Steps only grow: anything beyond this one is what a resume fell back from.
    newest = [other for other in steps(run_dir) if other <= step][-KEPT:]
    for other in steps(run_dir):
        if other not in newest:
            shutil.rmtree(folder.with_name(str(other)))
    return folder


def steps(run_dir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that a run holds, oldest first, whether or not they verify."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdecimal())


def restore(run_dir: pathlib.Path, target: Any, about: dict) -> tuple[Any, int]:
    """The newest checkpoint that verifies, as a pytree like `target` (ShapeDtypeStructs with shardings) -> state, step.

    Warns where an older one had to do. Raises IntegrityError where none verifies, UsageError where a good one does not
    belong to what `about` and `target` say.
    """
    damage = []
    for step in reversed(steps(run_dir)):
        folder = run_dir / "checkpoints" / str(step)
        try:
            manifest = verify(folder)
            _same(folder, manifest, target, about)
            state = _read(folder, target)
        except Damaged as error:
            damage.append((step, str(error)))
            continue
        for bad, reason in damage:
            log.warning("checkpoint of step %d is damaged (%s): going on from step %d", bad, reason, step)
        return state, step
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damage)
    raise IntegrityError(
        f"{run_dir}: no checkpoint verifies ({reasons or 'there is none'}); delete that folder and "
        "start again with xlab train"
    )


def verify(folder: pathlib.Path) -> dict:
    """The manifest of a checkpoint, every file checked against it; raises Damaged."""
    path = folder / "MANIFEST.json"
    try:
        text = path.read_text()
        manifest = json.loads(text)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = text == _sealed(body)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {type(error).__name__}") from None
    if not whole:
        raise Damaged(f"{path}: its text does not match its own sha256")
    if body["schema"] > SCHEMA:
        raise UsageError(f"{path}: schema {body['schema']} is newer than this version's {SCHEMA}; update xformers_lab")
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


def named_leaves(state: Any) -> dict[str, jax.Array]:
    """Every array of a pytree by its path, `params.stack.periods.0.ffn.up.kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two arrays share a path"
    return named


def _write(folder: pathlib.Path, step: int, leaves: dict, about: dict) -> None:
    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "state").absolute(), _full(leaves))
        checkpointer.wait_until_finished()
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


def _read(folder: pathlib.Path, target: Any) -> Any:
    leaves = named_leaves(target)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore((folder / "state").absolute(), _full(leaves))
    empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    values = [stored[name] if name in stored else empty(leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _full(leaves: dict) -> dict:
    """Orbax refuses arrays without elements; their shape says all there is to know."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _described(leaves: dict) -> dict:
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}


def _same(folder: pathlib.Path, manifest: dict, target: Any, about: dict) -> None:
    for key, value in about.items():
        if manifest["about"].get(key) != value:
            raise UsageError(
                f"{folder}: belongs to another {key} ({manifest['about'].get(key)}, now {value}): the config, the data "
                "or the source of a choice outside the package changed; give the old one back, or delete "
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
