"""Pixels: classify images that are read as sequences."""

import functools
import hashlib
import math
import pathlib
from typing import NamedTuple

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Batch, Setting, Split, _presets
from xformers_lab.tasks._passes import InPasses
from xformers_lab.tasks._reading import account, compressed, files, labels, layout, names, npz, splits
from xformers_lab.tasks._reading.splits import Overlap

LEVELS = 256
# Red, green and blue in what the eye takes for brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
_GIVE = "give a folder with idx files like MNIST's, or with train.npz and test.npz"


class Pixels(InPasses):
    """Image classification pixel by pixel, the Image task of Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    An image is the grey levels 0 to 255 of its pixels, row by row, so seq_len is rows times columns, divided by shrink
    squared. Black is a level like any other, no padding. Read are idx files, as MNIST has them (also .gz; their names
    begin with the split, or t10k for test), and npz files with an array of images (N, rows, columns) or (N, rows,
    columns, 3) beside one of labels (N,), named by split (train.npz, or x_train and y_train in one file). Colours
    become grey. Test data that the source sets apart stay test data: validation is a tenth of the training images;
    without them, images are split 80 / 10 / 10. Images go by a hash of what the model sees of them, so copies stay
    together; a copy of a test image is dropped from the training data. Long Range Arena has CIFAR-10 in 1024 grey
    pixels.

    Options:
        path: a folder of idx or npz files, or one npz file
        shrink: squares of so many pixels a side become one pixel, their mean
        preset: lra: grey images of 32x32 pixels in 10 classes, as of CIFAR-10, at seq_len=1024
        overlap: what becomes of training images that are held out too: keep, drop, or refuse

    Metric: accuracy. Chance: 1 / classes.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = LEVELS

    def __init__(
        self,
        setting: Setting,
        *,
        path: str | None = None,
        shrink: int = 1,
        preset: _presets.Preset | None = None,
        overlap: Overlap = "drop",
    ):
        super().__init__(setting)
        if path is None:
            raise ValueError(f"images are read from disk: {_GIVE} as path=...")
        if preset is not None:
            _presets.published(preset, {"shrink": (shrink, 1)})
        if shrink < 1:
            raise ValueError(f"shrink must be at least 1, got {shrink}")
        corpus = load(path, shrink, files.stamp("pixels", path))
        copies = splits.shared(
            {split: [row.tobytes() for row in pixels] for split, (pixels, _) in corpus.splits.items()}
        )
        dropped = splits.settle("pixels", path, copies, overlap)
        kept: dict[Split, tuple[np.ndarray, np.ndarray]] = {
            split: (np.delete(pixels, dropped[split], 0), np.delete(answers, dropped[split]))
            for split, (pixels, answers) in corpus.splits.items()
        }
        self.corpus = corpus._replace(splits=kept)
        self.dropped = sum(map(len, dropped.values()))
        sizes = splits.each(kept, lambda part: len(part[1]))
        for split, size in sizes.items():
            if not size:
                raise UsageError(
                    f"pixels: the {split} split of path={path} is empty{splits.empty(self.dropped)}: give more images"
                )
        classes = splits.each(kept, lambda part: len(np.unique(part[1])))
        counts = splits.each(copies, len)
        self.read = account.record(corpus.account, sizes, counts, unit="image", classes=classes, overlap=overlap)
        self.image = rows, columns = self.corpus.shape
        if setting.seq_len != rows * columns:
            raise ValueError(
                f"images of {rows}x{columns} pixels need seq_len={rows * columns}, got {setting.seq_len} "
                "(a larger shrink makes them smaller)"
            )
        self.outputs = len(self.corpus.classes)
        if preset is not None and ((rows, columns), self.outputs) != ((32, 32), 10):
            raise ValueError(
                f"preset={preset} is of 32x32 pixels in 10 classes, and path={path} has {rows}x{columns} in "
                f"{self.outputs}: give CIFAR-10, or leave the preset out"
            )
        self.chance = 1 / self.outputs

    def examples(self, split: Split) -> int:
        return len(self.corpus.splits[split][1])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        pixels, labels = self.corpus.splits[split]
        return Batch(pixels[numbers].astype(np.int32), labels[numbers], np.ones(len(numbers), np.float32))

    def answer_name(self, answer: int) -> str:
        return self.corpus.classes[answer]

    def describe(self) -> dict:
        """Source, size, classes, images per split, copies dropped, share of the most frequent class, sha256 of all."""
        fingerprint = hashlib.sha256()
        for pixels, answers in self.corpus.splits.values():
            fingerprint.update(pixels.tobytes() + answers.tobytes())
        counts = np.bincount(self.corpus.splits["test"][1])
        return {
            "source": self.corpus.source,
            "pixels": "x".join(map(str, self.corpus.shape)),
            "classes": list(self.corpus.classes),
            **{f"{split}_images": len(labels) for split, (_, labels) in self.corpus.splits.items()},
            "copies_dropped": self.dropped,
            "majority": round(float(counts.max() / counts.sum()), 4),
            "sha256": fingerprint.hexdigest(),
            "reading": self.read,
        }

    def reading(self) -> list[str]:
        return account.words(self.read)


class Images(NamedTuple):
    """Labelled images of one shape: for each split pixels (n, T) uint8, and labels (n,) int32 that index classes."""

    source: str
    shape: tuple[int, int]
    classes: tuple[str, ...]
    splits: dict[Split, tuple[np.ndarray, np.ndarray]]
    account: account.Account


@functools.lru_cache(maxsize=4)
def load(path: str, shrink: int, stamp: str | None) -> Images:
    """Read, shrink, check and split the images; once per process, and again where the stamp of the files is another."""
    arrays, read = _read(path, shrink)
    shapes = {images.shape[1:] for images, _ in arrays.values()}
    if len(shapes) > 1:
        raise UsageError(f"pixels: path={path} mixes images of {' and '.join(sorted(map(_times, shapes)))} pixels")
    kinds = sorted({int(label) for _, answers in arrays.values() for label in answers})
    if len(kinds) < 2:
        raise UsageError(f"pixels: path={path} has {len(kinds)} class(es): there must be 2 or more")
    of_split: dict[Split | None, list[int]] = {split: answers.tolist() for split, (_, answers) in arrays.items()}
    labels.check_known("pixels", f"path={path}", of_split)
    pairs: dict[Split | None, list[tuple[bytes, int]]] = {}
    for split, (images, answers) in arrays.items():
        pairs[split] = [(image.tobytes(), int(label)) for image, label in zip(images, answers, strict=True)]
    parts = splits.complete("pixels", pairs, lambda pair: pair[0])
    (shape,) = shapes
    numbered = {}
    for split, part in parts.items():
        pixels = np.frombuffer(b"".join(image for image, _ in part), np.uint8).reshape(len(part), math.prod(shape))
        numbered[split] = pixels, np.searchsorted(kinds, [label for _, label in part]).astype(np.int32)
    return Images(path, shape, tuple(map(str, kinds)), numbered, read.saying(labels.warnings(of_split)))


def _read(path: str, shrink: int) -> tuple[dict[Split | None, tuple[np.ndarray, np.ndarray]], account.Account]:
    """Images (N, rows, columns) uint8 and labels (N,) of each split; None where they are of no named split."""
    place = files.existing("pixels", path)
    arrays: dict[Split | None, list[np.ndarray]] = {}
    sources: dict[Split | None, list[pathlib.Path]] = {}
    notes, ignored = [], []
    for file in files.below(place) if place.is_dir() else [place]:
        if file.suffix == ".npz":
            members, odd = npz.arrays("pixels", file)
            notes += [f"{file.name}: ignored: {layout.listed(odd)}"] if odd else []
            named: list[tuple[Split | None, np.ndarray]] = [
                (_split(name) or _split(file.stem), array) for name, array in members
            ]
        elif "idx" in file.name:
            named = [(_split(file.name.replace(".", "-")), _idx(file))]
        else:
            ignored.append(file)
            continue
        for split, array in named:
            arrays.setdefault(split, []).append(array)
            if file not in sources.setdefault(split, []):
                sources[split].append(file)
    if not arrays:
        raise UsageError(f"pixels: path={path} has no images: {_GIVE}")
    if "train" in arrays and None in arrays and not any(array.ndim in (3, 4) for array in arrays[None]):
        del arrays[None]
        notes.append(f"ignored: arrays of no split: {layout.listed([file.name for file in sources[None]])}")
    pairs: dict[Split | None, tuple[np.ndarray, np.ndarray]] = {}
    parts: dict[Split | None, account.Part] = {}
    for split, of_split in arrays.items():
        images, answers = _pair(path, split, of_split)
        pairs[split] = _shrunk(images, shrink), answers
        shown = tuple(file.name for file in sources[split])
        parts[split] = account.Part(shown, len(answers), None, sum(array.nbytes for array in of_split))
    notes += layout.ignored(place, ignored) if place.is_dir() else []
    return pairs, account.Account(parts, tuple(notes))


def _split(name: str) -> Split | None:
    """The split that one of the words of a file's or an array's name means."""
    return "test" if "t10k" in name.lower() else names.split_of(name)


def _idx(file: pathlib.Path) -> np.ndarray:
    """The array of an idx file: two zeros, the type (8: bytes), the number of axes, their sizes, the values."""
    content = compressed.content("pixels", file)
    start = 4 + 4 * (content[3] if len(content) > 3 else 0)
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if content[:3] != b"\0\0\x08" or len(content) != start + math.prod(shape):
        raise UsageError(f"pixels: {file} is no idx file of bytes, or not all of one: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _pair(path: str, split: Split | None, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The images and the labels among the arrays of a split, whatever they are called."""
    where = f"pixels: path={path}" + (f", {split}" if split else "")
    images, answers = ([array for array in arrays if array.ndim in axes] for axes in ((3, 4), (1,)))
    if len(images) != 1 or len(answers) != 1 or len(images[0]) != len(answers[0]):
        shapes = ", ".join(sorted(_times(array.shape) for array in arrays))
        raise UsageError(f"{where}: there must be images NxRxC and as many labels N, but there are arrays of {shapes}")
    (pixels,), (classes,) = images, answers
    for name, array in (("images", pixels), ("labels", classes)):
        if array.dtype.kind not in "iu":
            raise UsageError(f"{where}: {name} must be whole numbers, got {array.dtype}")
    if pixels.size == 0 or pixels.min() < 0 or pixels.max() >= LEVELS:
        raise UsageError(f"{where}: pixels must be levels from 0 to {LEVELS - 1}")
    if pixels.ndim == 4:
        if pixels.shape[3] not in (1, 3):
            raise UsageError(f"{where}: the last axis must be 1 or 3 colours, got images of {_times(pixels.shape[1:])}")
        pixels = pixels[..., 0] if pixels.shape[3] == 1 else np.rint(pixels @ np.array(_LUMA))
    return pixels.astype(np.uint8), classes


def _shrunk(images: np.ndarray, by: int) -> np.ndarray:
    """The mean of every square of `by` x `by` pixels."""
    count, rows, columns = images.shape
    if rows % by or columns % by:
        common = math.gcd(rows, columns)
        fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        raise UsageError(f"pixels: shrink={by} does not divide images of {rows}x{columns} pixels: use {fitting}")
    squares = images.reshape(count, rows // by, by, columns // by, by)
    return images if by == 1 else np.rint(squares.mean((2, 4))).astype(np.uint8)


def _times(shape) -> str:
    return "x".join(map(str, shape))
