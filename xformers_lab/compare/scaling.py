"""What of a scaling study varies its sizes and what its variants, and which words are no such study."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.config import Config
from xformers_lab.errors import UsageError, nearest
from xformers_lab.record import PLACES

# What losses are set against -> the words for it.
AXES = {"params": "parameters", "flops": "training FLOPs", "seconds": "seconds of training"}
# What is set against it.
SCORES = {"loss": "the loss on the test split", "metric": "the task's metric; 1 - metric where more is better"}
# Keys that make a model larger; any other key with several values names a variant.
SIZES = ("dim", "layers", "heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How losses are fitted: x is one of AXES, y one of SCORES; by: the keys that name variants, so that all others
    vary the size, None for every key but SIZES and those whose numbers follow the size."""

    x: str = "params"
    y: str = "loss"
    by: tuple[str, ...] | None = None

    @classmethod
    def read(cls, x: str = "params", y: str = "loss", by: str | Sequence[str] | None = None) -> "Scale":
        """Raises UsageError at a word that is none of them."""
        for key, value, known in (("x", x, AXES), ("y", y, SCORES)):
            if value not in known:
                raise UsageError(f"{key}={value}: {nearest(str(value), known, 'there are')}")
        names = spec.split(by, ",") if isinstance(by, str) else by
        for name in names or ():
            if name not in configs.KEYS:
                raise UsageError(f"by={name}: {nearest(name, configs.KEYS, 'keys')}")
        return cls(x, y, None if names is None else tuple(names))

    @property
    def words(self) -> list[str]:
        """What a command says of it, without what is so by default."""
        said = {"x": self.x, "y": self.y, "by": None if self.by is None else ",".join(self.by)}
        return [f"{key}={value}" for key, value in said.items() if value != getattr(Scale(), key)]


def parted(words: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """The words of a comparison, and those of the fit: x=, y= and by=."""
    own = {key: word.partition("=")[2] for word in words if isinstance(word, str) and (key := word.partition("=")[0])}
    of_fit = {key: own[key] for key in ("x", "y", "by") if key in own}
    return [word for word in words if not (isinstance(word, str) and word.partition("=")[0] in of_fit)], of_fit


def keys(cells: Sequence[Any], varied: Sequence[str], scale: Scale, value: Callable) -> tuple[list[str], list[str]]:
    """(keys that name variants, keys that vary the size) of cells; value(cell, key) is what one has of a key."""
    apart = [key for key in varied if key not in PLACES]
    if scale.by is not None:
        return [key for key in apart if key in scale.by], [key for key in apart if key not in scale.by]
    sizes = [key for key in apart if key in SIZES]
    follows = [key for key in apart if key not in sizes and _follows(cells, key, sizes, value)]
    return [key for key in apart if key not in (*sizes, *follows)], [*sizes, *follows]


def check(origins: Sequence[Config], varied: Sequence[str], study: configs.Study, scale: Scale) -> None:
    """Raises UsageError where no variant has LEAST sizes, or where sizes would be made equal."""
    from xformers_lab.measure.power_law import LEAST  # here, for it imports numpy

    if study.match != "none":
        raise UsageError(
            f"match={study.match}: it gives all sizes the budget of the first; leave it out: curves are compared at "
            "equal x, which is x=params, x=flops or x=seconds"
        )
    of_variant, of_size = keys(origins, varied, scale, configs.get)
    known: dict[tuple, dict[tuple, None]] = {}
    for origin in origins:
        name = (origin.task, origin.seq_len, *(configs.get(origin, key) for key in of_variant))
        known.setdefault(name, {})[tuple(configs.get(origin, key) for key in of_size)] = None
    if (most := max(map(len, known.values()), default=0)) < LEAST:
        what = f"{', '.join(of_size)} with {most} values" if of_size else "no key varies it"
        raise UsageError(
            f"a fit takes at least {LEAST} sizes, and there {'is 1' if most == 1 else f'are {most}'} ({what}): say "
            "dim=32,64,96, layers=1,2,4, both, or by=attention where other keys vary the size"
        )


def unmoved(of_size: Sequence[str], x: str) -> bool:
    """Whether sizes by these keys may be the same in x, so that it is to be looked at before anything trains."""
    return x == "params" and not {"dim", "layers"} & set(of_size)


def size(values: Mapping[str, Any]) -> str:
    """A size in words: dim=64 layers=2."""
    return " ".join(f"{key}={spec.show(value)}" for key, value in values.items())


def _follows(cells: Sequence[Any], key: str, sizes: Sequence[str], value: Callable) -> bool:
    """Whether a key is a number that each size has one value of, and so is no variant's own."""
    known: dict[tuple, Any] = {}
    for cell in cells:
        at, number = tuple(value(cell, name) for name in sizes), value(cell, key)
        if not isinstance(number, int | float) or known.setdefault(at, number) != number:
            return False
    return bool(sizes)
