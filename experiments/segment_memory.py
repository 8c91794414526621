"""Does the memory of Transformer-XL lower the loss on the same text?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="A memory of the segment before lowers the loss of a model with short segments.",
    source="Dai et al., 2019, Transformer-XL (arXiv:1901.02860), table 6",
    literature="WikiText-103, 128M parameters: perplexity 26.77 with recurrence, 29.02 without",
    doubt="A gain that a longer segment without memory has as well, at the same cost.",
    minutes=9,
)
STUDIES = {
    "memory": compare(
        "task=lm memory=none,xl position=xl seq_len=16 layers=2 dim=64 heads=4 batch=16 steps=800 lr=3e-3"
    )
}


def judge(tables):
    bits = lambda memory: tables["memory"].metric(memory=memory)
    return [
        at_least("bits per byte without memory less those with it", bits("none") - bits("xl"), 0.02),
        reported("without memory", bits("none")),
        reported("with the memory of one segment", bits("xl")),
    ]
