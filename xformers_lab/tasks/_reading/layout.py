"""Which files of a folder are which split, and which are ignored."""

import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Split
from xformers_lab.tasks._reading import compressed, files, names

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What speaks of data and is none.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|citation|classes|labels|class_?names|label_?names|checksums?)\b",
    re.IGNORECASE,
)
_SETTINGS = {".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml"}
_SCRIPTS = {".py", ".sh", ".pl", ".ipynb", ".bat", ".r", ".lua", ".js", ".rb", ".ps1"}
_SCRIPTS |= {".c", ".h", ".cc", ".cpp", ".java", ".go", ".rs", ".ts", ".cu"}
_FORMS = {"txt", "raw", "tokens", "tok", "bpe", "ids"}
_NAMED = 4  # names in a line
_LONGEST = 60  # letters of one
_MANY = 10  # files, of which a single one that is called test.txt is one like any other


class Layout(NamedTuple):
    """Files by split (None: of no split, or all in one) and what is to be said of the others."""

    files: dict[Split | None, list[pathlib.Path]]
    notes: list[str]


def bare(file: pathlib.Path) -> str:
    """The name of a file without the endings that say that it is compressed."""
    name = file.name
    while name.lower().endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    return name


def ending(file: pathlib.Path) -> str:
    """The ending of a file's name, lower case, ".csv" of "rows.csv.gz"."""
    return pathlib.PurePath(bare(file)).suffix.lower()


def is_about(file: pathlib.Path) -> bool:
    """Whether a file speaks of the data and is none of them: a read-me, a licence, a list of classes."""
    return ending(file) in (".md", ".rst") or bool(_ABOUT.match(file.name))


def ignored(root: pathlib.Path, left_out: Iterable[pathlib.Path]) -> list[str]:
    """A line that names the files that are not read, and one that names links that are not followed."""
    paths = [file.relative_to(root).as_posix() for file in left_out]
    links = files.unread_links(root)
    notes = [f"ignored: {listed(paths)}"] if paths else []
    return notes + ([f"links that are not followed: {listed(links)}"] if links else [])


def shown(name: str) -> str:
    """A name or a word of somebody's data for a message: not too long, and nothing in it that a terminal obeys."""
    name = name if len(name) <= _LONGEST else name[:_LONGEST] + "..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def listed(words: list[str], many: int | None = None) -> str:
    """Names in a line: the first few of them, and how many more, of `many` in all (those in `words`)."""
    more = (len(words) if many is None else many) - _NAMED
    return ", ".join(map(shown, words[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def of_texts(task: str, root: pathlib.Path, all_files: list[pathlib.Path]) -> Layout:
    """The splits of a folder of texts: by names that speak of them, train among these; else all files are of none.

    Raises UsageError where data are held out and nothing is to train on, or train data are there in two forms.
    """
    named = _named(root, all_files)
    if not named:
        # One text and what is said about it are that text; among several, a readme may be one of them.
        texts = [file for file in all_files if not is_about(file)]
        texts = texts if len(texts) == 1 else all_files
        return Layout({None: texts}, ignored(root, [file for file in all_files if file not in texts]))
    splits = sorted(set(named.values()), key=SPLITS.index)
    if "train" not in splits:
        raise UsageError(
            f"{task}: path={root}: there are {' and '.join(splits)} data but no train data: add them "
            f"(train{next(iter(named)).suffix})"
        )
    named = _one_form(task, root, named)
    by_split: dict[Split | None, list[pathlib.Path]] = {}
    for file, split in named.items():
        by_split.setdefault(split, []).append(file)
    return Layout(by_split, ignored(root, [file for file in all_files if file not in named]))


def _named(root: pathlib.Path, all_files: list[pathlib.Path]) -> dict[pathlib.Path, Split]:
    """The files that are of a split by the name of their folder in the root, or by their own; none where these names do
    not make up a data set."""
    data = [file for file in all_files if not is_about(file)]
    by_folder: dict[pathlib.Path, Split] = {file: split for file in data if (split := _of_folder(root, file))}
    splits: dict[pathlib.Path, Split] = {
        file: split for file in data if (split := by_folder.get(file) or names.split_of(file.name))
    }
    likely = {file for file in splits if not is_beside(file)}
    in_folders: dict[pathlib.Path, Split] = {file: split for file, split in by_folder.items() if file in likely}
    top: dict[pathlib.Path, Split] = {
        file: split for file, split in splits.items() if file in likely and file.parent == root
    }
    if _is_set(set(in_folders.values())):
        return _and_missing(in_folders, top)
    patterns: dict[str, dict[pathlib.Path, Split]] = {}
    for file, split in top.items():
        patterns.setdefault(names.pattern_of(bare(file)), {})[file] = split
    plain: dict[pathlib.Path, Split] = {}
    for pattern, of_pattern in patterns.items():
        if pattern.partition(".")[0] == "*":
            plain.update(of_pattern)
    few = len(data) < _MANY
    completed: dict[pathlib.Path, Split] = {}  # train_notes.txt is not read beside train.txt
    deep: dict[pathlib.Path, Split] = {file: split for file, split in splits.items() if few and file in likely}
    for part in (plain, in_folders, top, deep):
        completed = _and_missing(completed, part)
    whole = set(completed.values())
    if (plain or in_folders) and _is_set(whole):
        return completed
    if any(_is_set(set(of_pattern.values())) for of_pattern in patterns.values()):
        return _and_missing(top, in_folders)
    if few and whole - {"train"}:  # what is held out is never trained on
        return completed
    everywhere = set(splits.values())
    rest = [file for file in data if file not in splits and ending(file)]
    return splits if not rest and (_is_set(everywhere) or "train" in everywhere) else {}


def _and_missing(named: dict[pathlib.Path, Split], others: dict[pathlib.Path, Split]) -> dict[pathlib.Path, Split]:
    """Named files, and those of the others whose split they lack."""
    splits = set(named.values())
    return {**named, **{file: split for file, split in others.items() if split not in splits}}


def _is_set(splits: set[Split]) -> bool:
    """Whether splits make up a data set: train and what is held out, or, with train missing, both of the others."""
    return len(splits) > 1


def _of_folder(root: pathlib.Path, file: pathlib.Path) -> Split | None:
    parts = file.relative_to(root).parts
    return names.split_of(parts[0]) if len(parts) > 1 else None


def is_beside(file: pathlib.Path) -> bool:
    """Whether a file is of the kind that stands beside data: a script, settings, an archive."""
    return ending(file) in _SCRIPTS | _SETTINGS or compressed.is_archive(compressed.head(file))


def _one_form(task: str, root: pathlib.Path, named: dict[pathlib.Path, Split]) -> dict[pathlib.Path, Split]:
    """Without the files whose split is there in a plainer form too, as train.txt.raw and train.json beside train.txt.

    Raises UsageError where it is not known which one is plainer, as of .raw and .tokens.
    """
    forms: dict[str, dict[Split, list[pathlib.Path]]] = {}
    for file, split in named.items():
        if _of_folder(root, file) is None:
            forms.setdefault(names.form_of(bare(file)), {}).setdefault(split, []).append(file)
    trained = sorted((form for form in forms if "train" in forms[form]), key=len)
    if len(trained) > 1 and set(trained) <= _FORMS - {"txt"}:
        both = " and ".join(forms[form]["train"][0].name for form in trained[:2])
        raise UsageError(f"{task}: path={root}: there are {both}: keep one form of the data")
    if not trained:
        return named
    plain = "txt" if "txt" in trained else trained[0]
    others = {
        file
        for form, of_form in forms.items()
        if form != plain and (plain == "txt" or form.startswith(f"{plain}."))
        for split, of_split in of_form.items()
        if split in forms[plain]
        for file in of_split
    }
    return {file: split for file, split in named.items() if file not in others}


def of_classes(root: pathlib.Path) -> Layout:
    """The splits of a folder of class folders: of train/GROUP/N and test/GROUP/N, NAME-train/GROUP/N and so on.

    `files` holds a folder for each split, or several; {None: [root]} where the classes stand in the root itself.
    """
    tops = [folder for folder in files.folders(root) if files.below(folder)]
    outer: dict[pathlib.Path, Split] = {
        folder: split for folder in tops if (split := names.split_of(folder.name)) and files.folders(folder)
    }
    others = [folder for folder in tops if folder not in outer]
    classes = [folder for folder in others if names.split_of(folder.name) is None]
    # A folder called train may be that of a class, if others are too.
    alone = not _is_set(set(outer.values())) and classes
    if tops and not outer and not classes:  # splits without class folders
        outer = {folder: split for folder in tops if (split := names.split_of(folder.name))}
        others = []
    if not outer or (alone and (any(map(files.folders, classes)) or all(len(files.folders(top)) < 2 for top in outer))):
        return Layout({None: [root]}, ignored(root, [file for file in files.below(root) if file.parent == root]))
    by_split: dict[Split | None, list[pathlib.Path]] = {}
    for folder, split in outer.items():
        by_split.setdefault(split, []).append(folder)
    loose = [file for file in files.below(root) if file.parent == root or file.parent in outer]
    return Layout(by_split, ignored(root, [*others, *loose]))
