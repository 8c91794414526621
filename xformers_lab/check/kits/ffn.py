"""Feed-forward sub-layers: they have nothing but what all have."""

from xformers_lab.check import inside
from xformers_lab.check.tiny import Inside


def subject(choice: str) -> Inside:
    return Inside("ffn", choice, {"ffn": choice})


PROPERTIES = inside.PROPERTIES
