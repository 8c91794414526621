"""Normalisers, in a placement that has them before every sub-layer and at the end of the stack."""

from xformers_lab.check.kits import norm


def words(choice: str) -> dict:
    return {"norm": f"pre:normaliser=({choice})"}


PROPERTIES = norm.PROPERTIES
