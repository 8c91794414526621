"""Feed-forward sub-layers, inside models alone."""

from xformers_lab.check import inside

PROPERTIES = inside.PROPERTIES
