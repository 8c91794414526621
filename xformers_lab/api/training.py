"""`xl.train`: one config, in a worker."""

from collections.abc import Sequence
from typing import Any

from xformers_lab.api import arguments, supervised
from xformers_lab.api.run import Run


@arguments.documented(place=True)
def train(
    *what: arguments.What, track: Sequence[str] = (), trust: bool = False, quiet: bool = False, **keys: Any
) -> Run:
    """Train one config, as `xlab train` does, in a process of its own.

        run = xl.train(task="copy", attention="linear", seq_len=16, steps=100)
        run = xl.train("task=copy", "attention=local:window=8", steps=100)

    The same config is the same run: one that is finished is read, not trained again.

    Args:
        what: Words as on the command line ("attention=linear", "@base.toml"), mappings of keys to values, flat or in
            sections, or a `xformers_lab.config.Config`. Later ones win.
        track: Where else every step is shown: "tensorboard", "wandb".
        trust: Run code outside the package that an @file names.
        quiet: No progress on stderr.
        keys: Keys with their values, which win over `what`: attention="local:window=8". A choice may be a class of
            your own, attention=MyAttention, or one with options, functools.partial(MyAttention, reach=8); its source
            is kept with the runs.

    Returns:
        The finished run.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, which is found before anything compiles; or the folder
            holds an unfinished run of this config, which `xl.load(folder).resume()` continues.
        xformers_lab.errors.RunFailed: The loss is no number, memory ran out, or the process hung or crashed.
        KeyboardInterrupt: Ctrl-C, or the interrupt of a notebook, once the run has saved itself; it says where.
    """
    with supervised.interruptible():
        folder, _ = supervised.train(arguments.items(what, keys), track=track, trust=trust, quiet=quiet)
    return Run(folder)
