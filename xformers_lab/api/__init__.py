"""What `import xformers_lab as xl` offers: the commands as functions, imported when one of them is used.

A function does what its command does, by the same code: `arguments` reads what it is given, `training` and `studies`
have a worker do the work, and `cli` prints what they give. Nothing here prints a result or ends the process.
"""

from xformers_lab.api.checking import check
from xformers_lab.api.looking import build, catalogue
from xformers_lab.api.planning import plan
from xformers_lab.api.run import Run
from xformers_lab.api.scaling import scale
from xformers_lab.api.stored import load, runs
from xformers_lab.api.studies import ablate, bench, compare
from xformers_lab.api.table import Table
from xformers_lab.api.training import train
from xformers_lab.api.untrained import error, signals

__all__ = [
    "Run",
    "Table",
    "ablate",
    "bench",
    "build",
    "catalogue",
    "check",
    "compare",
    "error",
    "load",
    "plan",
    "runs",
    "scale",
    "signals",
    "train",
]
