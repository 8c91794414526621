"""Batches, prepared by one background thread one step ahead of the device."""

import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import numpy as np

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Batch, Split, Task

T = TypeVar("T")


def ahead(make: Callable[[int], T], steps: Iterable[int]) -> Generator[T]:
    """make(step) for each step in order, the next one under way while the last one is used."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = None
        for step in steps:
            ready, coming = coming, pool.submit(make, step)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def checked(task: Task, split: Split, step: int, segments: bool = False) -> Batch:
    """The batch of a step; raises UsageError where it breaks the task's own declaration, for a device would clamp an id
    beyond its table without a word."""
    batch = task.segment(split, step) if segments else task.batch(split, step)
    check(task, batch, f"{split} batch {step}")
    return batch


def check(task: Task, batch: Batch, where: str) -> None:
    """Raises UsageError where a batch breaks the task's declaration; `where` names it."""
    setting, name = task.setting, type(task).__name__
    per_sequence = (setting.batch,)
    per_token = (setting.batch, setting.seq_len)
    answers = per_token if task.target == "token" else per_sequence
    shapes = {"inputs": per_token, "targets": answers, "weights": answers, "valid": per_token, "fresh": per_sequence}
    shapes |= dict.fromkeys(("documents", "marked"), per_token)
    if task.channels:
        shapes |= {"inputs": (*per_token, task.channels), "targets": (*answers, task.outputs)}
    for field, shape in shapes.items():
        value = getattr(batch, field)
        if value is not None and np.shape(value) != shape:
            raise UsageError(f"task {name}: {field} of {where} is {np.shape(value)}, not {shape}")
    if task.packed != (batch.documents is not None):
        raise UsageError(f"task {name}: packed={task.packed}, but {where} has documents={batch.documents is not None}")
    if bool(task.marks) != (batch.marked is not None):
        raise UsageError(f"task {name}: marks={task.marks}, but {where} has marked={batch.marked is not None}")
    if batch.marked is not None and (most := int(np.sum(batch.marked, 1).max())) > task.marks:
        raise UsageError(f"task {name}: marks={task.marks}, but a row of {where} has {most} marked positions")
    if task.channels:
        for field in ("inputs", "targets"):
            if not np.isfinite(getattr(batch, field)).all():
                raise UsageError(f"task {name}: {field} of {where} hold what is no finite number")
        return
    for field, limit, bound in (("inputs", task.vocab, "vocab"), ("targets", task.outputs, "outputs")):
        low, high = int(np.min(getattr(batch, field))), int(np.max(getattr(batch, field)))
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise UsageError(f"task {name}: {field} of {where} hold {wrong}, but {bound}={limit}")
