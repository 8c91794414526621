"""Which Transformer variant should I use, and what does it cost?

    import xformers_lab as xl

    table = xl.compare(task="copy", attention=["full", "local:window=8"], seq_len=[16, 32], steps=100)
    table                              # in a notebook or a terminal: the table, with the verdict in words below it
    table.to_pandas(), table.verdict(), table.report("report.html")
    run = xl.train(task="copy", attention="linear", seq_len=16, steps=100)
    run.metrics, run.model, run.evaluate(seq_len=32)

`help(xl.compare)` lists every key. What is wrong raises an exception of `xformers_lab.errors`.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from xformers_lab import cpu_speed, cpu_threads

if TYPE_CHECKING:
    from xformers_lab.api import Run as Run
    from xformers_lab.api import Table as Table
    from xformers_lab.api import ablate as ablate
    from xformers_lab.api import bench as bench
    from xformers_lab.api import build as build
    from xformers_lab.api import catalogue as catalogue
    from xformers_lab.api import check as check
    from xformers_lab.api import compare as compare
    from xformers_lab.api import error as error
    from xformers_lab.api import load as load
    from xformers_lab.api import plan as plan
    from xformers_lab.api import runs as runs
    from xformers_lab.api import scale as scale
    from xformers_lab.api import signals as signals
    from xformers_lab.api import train as train

__version__ = "0.2.0"
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


class _Package(types.ModuleType):
    """The package, which imports what it offers when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from xformers_lab import api

        self.__dict__[name] = value = getattr(api, name)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Some functions are called like a folder of the package. Importing xformers_lab.train, say, sets `train` here.
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


# XLA reads both when JAX starts, which may be long before anything of the package asks for its devices.
cpu_threads.enough(cpu_threads.simulated())
cpu_speed.wide_vectors()
sys.modules[__name__].__class__ = _Package
