"""What is asked of every compiled program and of what it gives."""

import jax
import numpy as np

from xformers_lab.check.subject import Broken

from . import programs


def sound(program: jax.stages.Compiled, what: str) -> None:
    """Raises Broken where a program holds what XLA:CPU is known to get wrong on some processors, if not on this one."""
    if faults := programs.faults(program.as_text() or ""):
        raise Broken(f"{what}: the program holds what XLA:CPU gets wrong (see programs.py): {faults[0][:300]}")


def repeats(first, second, what: str) -> None:
    """Raises Broken where two results of one program on the same arrays differ in a bit."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            name = jax.tree_util.keystr(path)
            raise Broken(f"{what}: run twice on the same arrays, the program gives two results (at {name})")
