"""The splits that a source lacks, and what splits share: no example that is trained on is held out too."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Split, _splits

Overlap = Literal["keep", "drop", "refuse"]

_Example = TypeVar("_Example")
_Result = TypeVar("_Result")


def complete(
    task: str, examples: Mapping[Split | None, Sequence[_Example]], content: Callable[[_Example], bytes]
) -> dict[Split, list[_Example]]:
    """Train, validation and test: a split that the source has is kept, one that it lacks is taken from train by a hash.

    Examples that say the same thing fall in the same split. Where the source is in one piece, all three come from it.
    """
    if len(examples) > 1 and None in examples:
        raise UsageError(f"{task}: there are data of no split beside {' and '.join(filter(None, examples))} data")
    if len(examples) > 1 and "train" not in examples:
        raise UsageError(
            f"{task}: there are {' and '.join(map(str, examples))} data but no train data: add a train split"
        )
    (pool,) = [examples["train"]] if "train" in examples else examples.values()
    named: dict[Split, Sequence[_Example]] = {
        split: examples[split] for split in SPLITS[1:] if split in examples and len(examples) > 1
    }
    parts: dict[Split, list[_Example]] = {split: list(named.get(split, [])) for split in SPLITS}
    for example in pool:
        split = _splits.of_bytes(content(example))
        parts["train" if split in named else split].append(example)
    return parts


def shared(keys: Mapping[Split, Sequence[Hashable | None]]) -> dict[Split, list[int]]:
    """The examples of each split that are held out elsewhere, by their number: those of train and validation whose key
    stands in test, and those of train whose key stands in validation. The key None is of no example, and not compared.
    """
    held: set[Hashable] = set()
    copies: dict[Split, list[int]] = {}
    for split in reversed(SPLITS):
        copies[split] = [number for number, key in enumerate(keys[split]) if key in held]
        held.update(key for key in keys[split] if key is not None)
    return {split: copies[split] for split in SPLITS}


def each(parts: Mapping[Split, _Example], make: Callable[[_Example], _Result]) -> dict[Split, _Result]:
    """What `make` gives of each split."""
    return {split: make(part) for split, part in parts.items()}


def settle(task: str, source: str, copies: Mapping[Split, list[int]], overlap: str) -> dict[Split, list[int]]:
    """Which of the shared examples are to be dropped, as `overlap` says; raises UsageError where it is refuse."""
    if overlap not in get_args(Overlap):
        raise ValueError(f"overlap={overlap}: use one of {', '.join(get_args(Overlap))}")
    many = {split: len(numbers) for split, numbers in copies.items() if numbers}
    if overlap == "refuse" and many:
        counts = " and ".join(f"{count:,} of {split}" for split, count in many.items())
        raise UsageError(
            f"{task}: {source}: {counts} stand in a held-out split too, as the model sees them: "
            "take them away, or use overlap=drop"
        )
    return each(copies, lambda numbers: numbers if overlap == "drop" else [])


def empty(dropped: int) -> str:
    """What is to be added to the message that a split is empty."""
    return f", {dropped:,} were dropped for being held out too: overlap=keep keeps them" if dropped else ""


def without(examples: Sequence[_Example], numbers: Sequence[int]) -> list[_Example]:
    """The examples but for those of these numbers."""
    left_out = set(numbers)
    return [example for number, example in enumerate(examples) if number not in left_out]
