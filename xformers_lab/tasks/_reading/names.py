"""Which split the name of a file, a folder or an array speaks of."""

import re
from collections.abc import Mapping

from xformers_lab.tasks import Split

_SPLITS: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "newsdev": "validation",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "devtest": "test",
    "newstest": "test",
}
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_of(name: str) -> Split | None:
    """The split that a word of the name means: of "train-00000-of-00001", "in_domain_dev.tsv", "newstest2014.de".

    Where several words mean different ones, the first word of the name is right, else the last of them.
    """
    words = _words(name)
    splits: list[Split] = [_SPLITS[word] for word in words if word in _SPLITS]
    if not splits:
        return None
    return _SPLITS.get(words[0], splits[-1])


def form_of(name: str) -> str:
    """What follows the part of a file's name that speaks of a split: "txt" of "train.txt", "de" of "test_2016.de"."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if split_of(part)), 0)
    return ".".join(parts[at + 1 :])


def pattern_of(name: str) -> str:
    """A file's name without numbers and the word that means a split: the same for those that belong together."""
    bare = re.sub(_WORD, lambda match: "*" if match[0].lower() in _SPLITS else match[0], name)
    return re.sub("[0-9_-]+", "", bare)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]
