"""How often a loop of unknown length runs on average, said where it is made, so that its products can be counted."""

import re

import jax

_SAID = re.compile(r"mean_trips_(\d+)\b")


def saying(count: int):
    """A scope of a `while_loop` that runs so many times on average."""
    return jax.named_scope(f"mean_trips_{count}")


def said(scopes: str) -> int | None:
    """The count in the names of the scopes that an equation stands in; None where none is said."""
    found = _SAID.search(scopes)
    return None if found is None else int(found[1])
