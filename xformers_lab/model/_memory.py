"""What no memory here can hold is refused before it is built, by what a training step needs at the least."""

import jax

from xformers_lab import hardware
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.nn.platform import elsewhere

# Copies of the parameters while a step runs, float32: they, their gradients, and what the optimizer keeps.
COPIES = {"adamw": 4, "sgd": 2}


def refuse_activations(config: Config, outputs: int = 0) -> None:
    """Raises UsageError where the residual stream of a batch and its gradient, (B, T, D), fit into no memory here, nor
    the logits and theirs, of which a sequence has so many `outputs`."""
    rows = config.train.batch // config.train.accumulate
    tokens = rows * config.seq_len
    bytes_each = 2 if config.model.dtype == "bfloat16" else 4
    needed = 2 * (tokens * config.model.dim * bytes_each + rows * outputs * 4)
    mend = "use a smaller batch or seq_len" if config.train.batch > 1 else "use a smaller seq_len or dim"
    words = f"batch={config.train.batch} seq_len={config.seq_len} dim={config.model.dim}"
    _refuse(f"{words}: the activations of a step", needed, len(jax.devices()), mend)


def refuse_parameters(config: Config, count: int) -> None:
    """Raises UsageError where so many parameters, with all that training keeps of them, fit into no memory here."""
    words = f"dim={config.model.dim} layers={config.model.layers}: {count:,} parameters in training"
    copies = COPIES[config.train.optimizer] + (config.train.ema is not None)
    _refuse(words, 4 * count * copies, 1, "use a smaller model")


def _refuse(what: str, needed: int, devices: int, mend: str) -> None:
    if elsewhere():
        return
    one = (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if jax.default_backend() != "cpu" else None
    memory = hardware.memory() if one is None else one * devices
    if memory is not None and needed > memory:
        GiB = 2**30
        raise UsageError(f"{what} take {needed / GiB:,.0f} GiB or more, and there are {memory / GiB:,.0f} here; {mend}")
