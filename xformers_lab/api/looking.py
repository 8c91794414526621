"""`xl.build` and `xl.catalogue`: what a config stands for, and what there is to choose from."""

from typing import TYPE_CHECKING, Any, NamedTuple

from xformers_lab import config as configs
from xformers_lab.api import arguments

if TYPE_CHECKING:
    import pandas

    from xformers_lab.model import Model
    from xformers_lab.tasks import Task


class Built(NamedTuple):
    """An untrained model, and the task that it is for."""

    model: "Model"
    task: "Task"


@arguments.documented()
def build(*what: arguments.What, trust: bool = False, **keys: Any) -> Built:
    """The untrained model of a config, in this process, and its task.

        model, task = xl.build(task="copy", attention="local:window=8", seq_len=32)
        logits, aux = model(task.batch("train", 0).inputs)  # (B, T) tokens, numpy's or jax's -> (B, T, outputs)

    One mechanism alone is built by `xformers_lab.spec.build`.

    Args:
        what: As `xl.train` takes it.
        trust: Run code outside the package that an @file names.
        keys: Keys with their values; see `xl.train`.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or things do not fit one another.
    """
    config = configs.single(arguments.items(what, keys), trust=trust)
    from xformers_lab.model import build_model, check_config

    task = check_config(config)
    return Built(build_model(config, task), task)


def catalogue(shelf: str | None = None) -> "pandas.DataFrame":
    """What there is to choose from, as `xlab list` has it.

        xl.catalogue()             # the shelves
        xl.catalogue("attention")  # a row for each mechanism: options, cost, what it can do, what it is

    Args:
        shelf: "attention", "position", "norm", "normaliser", "ffn", "depth", "memory", "model", "task" or
            "optimizer".

    Raises:
        xformers_lab.errors.UsageError: There is no such shelf.
    """
    import pandas

    from xformers_lab import shelves

    return pandas.DataFrame(shelves.shelves() if shelf is None else shelves.shelf(shelf))
