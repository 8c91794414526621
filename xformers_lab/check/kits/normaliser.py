"""Normalisers, in a placement that has them before every sub-layer and at the end of the stack."""

from xformers_lab.check.kits import norm
from xformers_lab.check.tiny import Inside


def subject(choice: str) -> Inside:
    return Inside("normaliser", choice, {"norm": f"pre:normaliser=({choice})"})


PROPERTIES = norm.PROPERTIES
