"""Does the memory of Transformer-XL lower the loss on the same text?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="A memory of a whole segment lowers the loss of a model that reads short segments of one text after another.",
    source="Dai et al., 2019, Transformer-XL (arXiv:1901.02860), table 6",
    literature="WikiText-103, 128M parameters: perplexity 26.77 with recurrence, 29.02 without",
    doubt="A memory of one position is the control: it reads the same bytes in the same order. Without memory batches "
    "are drawn from everywhere, and a short training learns more of that than any memory gives.",
    minutes=7,
)
STUDIES = {
    "memory": compare(
        "task=lm memory=xl:length=1,xl:length=32,none position=xl seq_len=32 layers=2 dim=64 heads=4 batch=32 "
        "steps=600 lr=3e-3"
    )
}


def judge(tables):
    bits = lambda memory: tables["memory"].metric(memory=memory)
    return [
        at_least("memory of 1 less memory of 32: bits per byte", bits("xl:length=1") - bits("xl:length=32"), 0.0),
        *(
            reported(f"memory={memory}: bits per byte", bits(memory))
            for memory in ("xl:length=1", "xl:length=32", "none")
        ),
    ]
