"""Splits with an end, read in passes: each example comes once before any comes again."""

import functools
from collections.abc import Callable

import numpy as np

from xformers_lab.tasks import Batch, Split, Task, _splits


class InPasses(Task):
    """A task that defines `examples` and `take`: batches take their examples in an order that is shuffled anew for each
    pass over the split."""

    def batch(self, split: Split, step: int) -> Batch:
        count = self.setting.batch
        passes, places = np.divmod(np.arange(step * count, (step + 1) * count), self._size(split))
        chosen = [self._order(split, int(one))[place] for one, place in zip(passes, places, strict=True)]
        return self.take(split, np.array(chosen))

    @functools.cached_property
    def _order(self) -> Callable[[Split, int], np.ndarray]:
        return functools.lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, split: Split, one: int) -> np.ndarray:
        return _splits.generator(self.setting.seed, split, one).permutation(self._size(split))

    def _size(self, split: Split) -> int:
        size = self.examples(split)
        assert size is not None, "what is read in passes has an end"
        return size
