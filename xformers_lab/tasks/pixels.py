"""Pixels: classify images that are read as sequences."""

import functools
import gzip
import hashlib
import math
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _sources, _splits

LEVELS = 256
# Red, green and blue in what the eye takes for brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
_GIVE = "give a folder with idx files like MNIST's, or with train.npz and test.npz"


class Pixels(Task):
    """Image classification pixel by pixel, the Image task of Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    An image is the grey levels 0 to 255 of its pixels, row by row, so seq_len is rows times columns, divided by shrink
    squared. Read are idx files, as MNIST has them (also .gz; their names begin with the split, or t10k for test), and
    npz files with an array of images (N, rows, columns) or (N, rows, columns, 3) beside one of labels (N,), named by
    split (train.npz, or x_train and y_train in one file). Colours become grey. Test data that the source sets apart
    stay test data: validation is a tenth of the training images; without them, images are split 80 / 10 / 10. Images
    go by a hash of what the model sees of them, so copies stay together; a copy of a test image is dropped from the
    training data. Long Range Arena has CIFAR-10 in 1024 grey pixels.

    Options:
        path: a folder of idx or npz files, or one npz file
        shrink: squares of so many pixels a side become one pixel, their mean

    Metric: accuracy. Chance: 1 / classes.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = LEVELS

    def __init__(self, setting: Setting, *, path: str | None = None, shrink: int = 1):
        super().__init__(setting)
        if path is None:
            raise ValueError(f"images are read from disk: {_GIVE} as path=...")
        if shrink < 1:
            raise ValueError(f"shrink must be at least 1, got {shrink}")
        self.corpus = load(path, shrink)
        self.image = rows, columns = self.corpus.shape
        if setting.seq_len != rows * columns:
            raise ValueError(
                f"images of {rows}x{columns} pixels need seq_len={rows * columns}, got {setting.seq_len} "
                "(a larger shrink makes them smaller)"
            )
        self.outputs = len(self.corpus.classes)
        self.chance = 1 / self.outputs
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def batch(self, split: Split, step: int) -> Batch:
        """Images in an order shuffled anew for every pass over the split: each comes once a pass."""
        count = self.setting.batch
        passes, places = np.divmod(np.arange(step * count, (step + 1) * count), self.examples(split))
        chosen = [self._order(split, int(one))[place] for one, place in zip(passes, places, strict=True)]
        return self.take(split, np.array(chosen))

    def examples(self, split: Split) -> int:
        return len(self.corpus.splits[split][1])

    def take(self, split: Split, numbers: np.ndarray) -> Batch:
        pixels, labels = self.corpus.splits[split]
        return Batch(pixels[numbers].astype(np.int32), labels[numbers], np.ones(len(numbers), np.float32))

    def describe(self) -> dict:
        """Source, size, classes, images per split, copies dropped, share of the most frequent class, sha256 of all."""
        fingerprint = hashlib.sha256()
        for pixels, labels in self.corpus.splits.values():
            fingerprint.update(pixels.tobytes() + labels.tobytes())
        counts = np.bincount(self.corpus.splits["test"][1])
        return {
            "source": self.corpus.source,
            "pixels": "x".join(map(str, self.corpus.shape)),
            "classes": list(self.corpus.classes),
            **{f"{split}_images": len(labels) for split, (_, labels) in self.corpus.splits.items()},
            "copies_dropped": self.corpus.dropped,
            "majority": round(float(counts.max() / counts.sum()), 4),
            "sha256": fingerprint.hexdigest(),
        }

    def _shuffled(self, split: Split, one: int) -> np.ndarray:
        return _splits.generator(self.setting.seed, split, one).permutation(len(self.corpus.splits[split][1]))


class Images(NamedTuple):
    """Labelled images of one shape: for each split pixels (n, T) uint8, and labels (n,) int32 that index classes."""

    source: str
    shape: tuple[int, int]
    classes: tuple[str, ...]
    splits: dict[Split, tuple[np.ndarray, np.ndarray]]
    dropped: int


@functools.lru_cache(maxsize=4)
def load(path: str, shrink: int) -> Images:
    """Read, shrink, check and split the images; once per process."""
    arrays = _read(path, shrink)
    shapes = {images.shape[1:] for images, _ in arrays.values()}
    if len(shapes) > 1:
        raise UsageError(f"pixels: path={path} mixes images of {' and '.join(sorted(map(_times, shapes)))} pixels")
    kinds = sorted({int(label) for _, labels in arrays.values() for label in labels})
    if len(kinds) < 2:
        raise UsageError(f"pixels: path={path} has {len(kinds)} class(es): there must be 2 or more")
    pairs: dict[Split | None, list[tuple[bytes, int]]] = {}
    for split, (images, labels) in arrays.items():
        pairs[split] = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    parts = _sources.resplit("pixels", pairs, lambda pair: pair[0])
    (shape,) = shapes
    seen: set[bytes] = set()
    splits, count = {}, 0
    for split in reversed(SPLITS):
        new = [(image, label) for image, label in parts[split] if image not in seen]
        seen.update(image for image, _ in new)
        if not new:
            raise UsageError(f"pixels: the {split} split of path={path} is empty: give more images")
        pixels = np.frombuffer(b"".join(image for image, _ in new), np.uint8).reshape(len(new), -1)
        splits[split] = pixels, np.searchsorted(kinds, [label for _, label in new]).astype(np.int32)
        count += len(new)
    dropped = sum(map(len, parts.values())) - count
    return Images(path, shape, tuple(map(str, kinds)), {split: splits[split] for split in SPLITS}, dropped)


def _read(path: str, shrink: int) -> dict[Split | None, tuple[np.ndarray, np.ndarray]]:
    """Images (N, rows, columns) uint8 and labels (N,) of each split; None where they are of no named split."""
    place = _sources.existing("pixels", path)
    arrays: dict[Split | None, list[np.ndarray]] = {}
    for file in _sources.files(place) if place.is_dir() else [place]:
        if file.suffix == ".npz":
            for split, array in _npz(file):
                arrays.setdefault(split, []).append(array)
        elif "idx" in file.name:
            arrays.setdefault(_split(file.name.replace(".", "-")), []).append(_idx(file))
    if not arrays:
        raise UsageError(f"pixels: path={path} has no images: {_GIVE}")
    pairs: dict[Split | None, tuple[np.ndarray, np.ndarray]] = {}
    for split, of_split in arrays.items():
        images, labels = _pair(path, split, of_split)
        pairs[split] = _shrunk(images, shrink), labels
    return pairs


def _split(name: str) -> Split | None:
    """The split that one of the words of a file's or an array's name means."""
    words = name.lower().replace("_", "-").split("-")
    return next((split for word in words if (split := "test" if word == "t10k" else _sources.split_name(word))), None)


def _npz(file: pathlib.Path) -> list[tuple[Split | None, np.ndarray]]:
    if not zipfile.is_zipfile(file):
        raise UsageError(f"pixels: cannot read {file}: it is no npz file, or not all of one")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return [(_split(name) or _split(file.stem), arrays[name]) for name in arrays.files]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"pixels: cannot read {file}: {error}") from error


def _idx(file: pathlib.Path) -> np.ndarray:
    """The array of an idx file: two zeros, the type (8: bytes), the number of axes, their sizes, the values."""
    content = _sources.read("pixels", file)
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"pixels: cannot read {file}: {error}") from error
    start = 4 + 4 * (content[3] if len(content) > 3 else 0)
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if content[:3] != b"\0\0\x08" or len(content) != start + math.prod(shape):
        raise UsageError(f"pixels: {file} is no idx file of bytes, or not all of one: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _pair(path: str, split: Split | None, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The images and the labels among the arrays of a split, whatever they are called."""
    where = f"pixels: path={path}" + (f", {split}" if split else "")
    images, labels = ([array for array in arrays if array.ndim in axes] for axes in ((3, 4), (1,)))
    if len(images) != 1 or len(labels) != 1 or len(images[0]) != len(labels[0]):
        shapes = ", ".join(sorted(_times(array.shape) for array in arrays))
        raise UsageError(f"{where}: there must be images NxRxC and as many labels N, but there are arrays of {shapes}")
    (pixels,), (classes,) = images, labels
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
