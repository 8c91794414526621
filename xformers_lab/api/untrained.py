"""`xl.signals` and `xl.error`: what is measured of models before they train, and what their commands print."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.api import arguments
from xformers_lab.config import Config
from xformers_lab.errors import UsageError


@arguments.documented()
def signals(*what: arguments.What, trust: bool = False, **keys: Any) -> list[dict[str, Any]]:
    """How large states and gradients are in each layer of models as they are drawn, on the first batch of training.

        xl.signals(task="lm", norm=["pre", "post"], layers=[2, 8, 32])

    Args:
        what: As `xl.compare` takes it; every combination of the keys' values is a model.
        trust: Run code outside the package that an @file names.
        keys: Keys with their values.

    Returns:
        A row for each model and layer: the keys that vary, layer (from 1), state (mean |x|^2 / D of what the layer
        gives), state_gradient (norm of the loss's gradient by that), gradient (norm by all parameters of the layer),
        ffn_gradient (by those of its feed-forward part), and the config.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or the layers of a model run in no stack.
    """
    from xformers_lab.train import signals as measured

    measure = lambda cells: (map(dataclasses.asdict, layers) for layers in measured.of_configs(cells))
    return _rows("signals", arguments.items(what, keys), trust, measure)


@arguments.documented()
def error(
    *what: arguments.What, scale: float | Sequence[float] = 1.0, trust: bool = False, **keys: Any
) -> list[dict[str, Any]]:
    """How far mechanisms are from softmax attention on the same random queries, keys and values.

        xl.error(attention=["performer:features=16", "performer:features=256"], scale=[0.5, 1.0], seed=[0, 1, 2])

    Args:
        what: As `xl.compare` takes it.
        scale: What queries and keys, normal with unit variance, are multiplied by; several give a row each.
        trust: Run code outside the package that an @file names.
        keys: Keys with their values.

    Returns:
        A row for each mechanism and scale: the keys that vary, scale, error (|out - full| / |full| over a batch of
        heads), and the config.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or a mechanism has no queries, keys and values that
            full attention could use as well.
    """
    scales = [float(each) for each in (scale if isinstance(scale, Sequence) else [scale])]
    if not all(each > 0 for each in scales):
        raise UsageError(f"scale={scale}: above 0")
    from xformers_lab.measure import approximation

    measure = lambda cells: (
        [{"scale": each, "error": approximation.error(cell, each)} for each in scales] for cell in cells
    )
    return _rows("error", arguments.items(what, keys), trust, measure)


def _rows(
    kind: str,
    items: Sequence[configs.Item],
    trust: bool,
    measure: Callable[[Sequence[Config]], Iterable[Iterable[dict]]],
) -> list[dict[str, Any]]:
    """A row for everything that is measured of each config of a sweep."""
    cells, varied = configs.sweep(items, trust=trust)
    keys = varied or ["attention"]
    return [
        {"kind": kind, **{key: configs.get(cell, key) for key in keys}, **measured, "config": configs.to_dict(cell)}
        for cell, of_cell in zip(cells, measure(cells), strict=True)
        for measured in of_cell
    ]
