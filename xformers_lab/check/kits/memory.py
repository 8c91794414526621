"""What was read is remembered in the next segment; see inside.py for the rest."""

import numpy as np

from xformers_lab.check import inside
from xformers_lab.check.subject import Broken, NotApplicable
from xformers_lab.check.tiny import Inside


def subject(choice: str) -> Inside:
    # A length that many numbers divide, and a position that goes on from segment to segment.
    return Inside("memory", choice, {"memory": choice, "position": "none", "seq_len": 12})


def remembers(subject: Inside) -> None:
    """What a segment says depends on the one before it, in a text that goes on, sample by sample."""
    model = subject.model
    if not model.memory:
        raise NotApplicable("it remembers nothing")
    other = np.concatenate([model.tokens[:1], np.roll(model.tokens[1:], 1, 1)])
    after = [model.forward(model.tokens, memory=model.after(first)[1]) for first in (model.tokens, other)]
    gap = np.abs(after[0] - after[1]).max((1, 2))
    if gap[0] > 0:
        raise Broken("a sample is told what another one read: the batch is the second axis of what is remembered")
    if gap[1:].min() < 1e-6:
        raise Broken("the next segment says the same whatever was read: look at what `write` keeps and `read` gives")


PROPERTIES = [*inside.PROPERTIES, remembers]
