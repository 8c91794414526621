"""How many blocks of a grid a Pallas kernel computes, said where it is called, so that its products can be counted."""

import re

import jax

_SAID = re.compile(r"live_blocks_(\d+)\b")


def saying(count: int):
    """A scope of calls of Pallas kernels, and of their backward passes, each of which computes so many steps of its
    grid, of all samples and heads, and skips the others."""
    return jax.named_scope(f"live_blocks_{count}")


def said(scopes: str) -> int | None:
    """The count in the names of the scopes that an equation stands in; None where none is said."""
    found = _SAID.search(scopes)
    return None if found is None else int(found[1])
