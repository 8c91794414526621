"""Where compiled programs are kept from command to command, and how much they take."""

import os
import pathlib
from collections.abc import Mapping

from xformers_lab import program_cache

MiB = 2**20


def examine(environment: Mapping[str, str] = os.environ) -> dict:
    """The finding on JAX's cache of compiled programs; ok is None where there is none, which makes commands slower."""
    place = environment.get(program_cache.VARIABLE)
    if place == "" or environment.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false"):
        why = "as a variable of the environment says"
    elif place is None:
        why = f"since {program_cache.folder()} cannot be written to"
    else:
        size = sum(path.stat().st_size for path in pathlib.Path(place).glob("*") if path.is_file())
        return {"what": "compiled programs", "found": f"kept in {place}, {size / MiB:.0f} MiB", "ok": True}
    return {"what": "compiled programs", "found": f"not kept, {why}: commands compile them again", "ok": None}
