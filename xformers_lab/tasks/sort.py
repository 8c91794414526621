"""Sort: write the symbols of a random string in order."""

import numpy as np

from xformers_lab.tasks.copy import Copy


class Sort(Copy):
    """Sorting (Delétang et al., 2023, arXiv 2207.02098, appendix A: "bucket sort", a context-sensitive task).

    A separator, a string of random symbols, the separator again, and the same symbols from the least to the largest:
    `| 3 1 3 2 | 1 2 3 3`. The model predicts the next token and is asked on the second string alone. The string is as
    long as fits, h = (seq_len - 1) // 2. Splits share no string.

    Options:
        symbols: how many different symbols the string is made of
        shortest: length of the shortest strings of the training split, drawn as those of task=copy; none: all are as
            long as fits

    Metric: accuracy on the second string. Chance: 1 / symbols, a guess that looks at nothing.
    """

    def answer(self, string: np.ndarray) -> np.ndarray:
        return np.sort(string, 1)
