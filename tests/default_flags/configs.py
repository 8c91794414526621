"""The model that a choice is trained in: of the lab's default sizes, on a task that the choice is made for."""

import pathlib

import numpy as np

from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import check_config

TRAINED = {"steps": 20, "batch": 8}


def of_choice(shelf: str, choice: str, folder: pathlib.Path) -> Config:
    """The config that trains a choice for a few steps; a task that needs files gets them in `folder`."""
    words = {shelf: choice}
    if shelf == "normaliser":
        words = {"norm": f"pre:normaliser={choice}"}
    elif shelf == "depth":
        words |= {"layers": 4}
    elif shelf == "memory":
        words |= {"task": "lm", "position": "rope"}
    elif shelf == "optimizer":
        words |= {"schedule": "constant"}
    elif shelf == "model":
        words |= _of_model(choice, folder)
    if shelf in ("attention", "depth") and not _decodes(words):
        words |= {"task": "listops"}
    return edit(Config(), **(TRAINED | words))


def _decodes(words: dict) -> bool:
    """Whether the default task's decoder takes a choice."""
    try:
        check_config(edit(Config(), **words))
    except UsageError:
        return False
    return True


def _of_model(kind: str, folder: pathlib.Path) -> dict:
    if kind == "vit":
        return {"task": f"pixels:path={_images(folder)}", "seq_len": 96, "model": "vit:patch=2"}
    tasks = {"encoder": "listops", "bag": "listops", "encoder_decoder": "copy", "seq2seq": "copy"}
    return {"task": tasks.get(kind, "mqar")}


def _images(folder: pathlib.Path) -> pathlib.Path:
    """Images of 8x12 pixels, noise, and which of three classes each is said to be."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (64, 8, 12)).astype(np.uint8), np.arange(64) % 3
    np.savez(folder / "train.npz", x_train=pixels, y_train=labels)
    return folder
