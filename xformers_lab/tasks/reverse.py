"""Reverse: repeat a string of random symbols backwards."""

import numpy as np

from xformers_lab.tasks.copy import Copy


class Reverse(Copy):
    """String reversal (Delétang et al., 2023, arXiv 2207.02098, appendix A: a deterministic context-free task).

    A separator, a string of random symbols, the separator again, and the string backwards: `| s1 ... sh | sh ... s1`.
    The model predicts the next token and is asked on the second string alone. The string is as long as fits, h =
    (seq_len - 1) // 2. Splits share no string.

    Options:
        symbols: how many different symbols the string is made of
        shortest: length of the shortest strings of the training split, drawn as those of task=copy; none: all are as
            long as fits

    Metric: accuracy on the second string. Chance: 1 / symbols.
    """

    def answer(self, string: np.ndarray) -> np.ndarray:
        return string[:, ::-1]
