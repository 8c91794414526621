"""Brackets: which bracket closes next?"""

import math

import numpy as np

from xformers_lab.tasks import Batch, Setting, Split, Task
from xformers_lab.tasks._splits import check_room, generator, select


class Brackets(Task):
    """Nested brackets of several types and bounded depth, Dyck-(k, m) (Hewitt et al., 2020, arXiv 2010.07515; closing
    brackets are scored as in Yao et al., 2021, arXiv 2105.11115).

    A string of brackets, open as often as closed where both may stand. Wherever the next bracket closes one, the answer
    is its type: that of the innermost one still open, however far back. Tokens 0..types - 1 open, the next `types`
    close. A string is the beginning of a balanced one: what is open at its end stays so. Splits share no string.

    Options:
        types: how many types of brackets there are
        depth: how many may be open at once

    Metric: accuracy before closing brackets. Chance: 1 / types.
    """

    def __init__(self, setting: Setting, *, types: int = 4, depth: int = 8):
        super().__init__(setting)
        if types < 2:
            raise ValueError(f"types={types} leaves nothing to guess: use types=2 or more")
        if depth < 1:
            raise ValueError(f"depth={depth} opens nothing: use depth=1 or more")
        self.types, self.depth = types, depth
        self.vocab, self.outputs, self.chance = 2 * types, types, 1 / types
        # At depth 1 every second bracket opens; deeper, there are more strings.
        check_room((setting.seq_len + 1) // 2 * math.log(types), "use a longer seq_len or more types")

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            strings = self._strings(rng, n)
            return strings[:, :-1], strings[:, 1:]

        inputs, following = select(split, self.setting.batch, draw)
        closes = following >= self.types
        return Batch(inputs, np.where(closes, following - self.types, 0), closes.astype(np.float32))

    def _strings(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, seq_len + 1) brackets."""
        length, each = self.setting.seq_len + 1, np.arange(n)
        kinds = rng.integers(0, self.types, (n, length), dtype=np.int32)
        wishes = rng.random((n, length)) < 0.5
        open_now, depth = np.zeros((n, self.depth), np.int32), np.zeros(n, np.int64)
        strings = np.empty((n, length), np.int32)
        for t in range(length):
            opens = (depth == 0) | (wishes[:, t] & (depth < self.depth))
            innermost = open_now[each, np.maximum(depth - 1, 0)]
            strings[:, t] = np.where(opens, kinds[:, t], self.types + innermost)
            open_now[each[opens], depth[opens]] = kinds[opens, t]
            depth += np.where(opens, 1, -1)
        return strings

    def describe(self) -> dict:
        return {"source": "generated", "types": self.types, "depth": self.depth}
