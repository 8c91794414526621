"""Is what longer inputs gain at evaluation due to more context, or to fewer tokens that have hardly any?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Where windows overlap, so that each token has context, ALiBi's loss is flat beyond the trained length; what "
    "longer windows gain without overlap is that fewer tokens stand at their beginning.",
    source="Press, Smith and Lewis, 2022 (arXiv:2108.12409), section 5 and appendix B: the early token curse",
    literature="WikiText-103, ALiBi trained at 512: perplexity falls to 18.3 with windows apart, and stays at 17.98 to "
    "18.3 with a stride of 1",
    doubt="A model that uses more context than it was trained with: its loss with overlap would fall too.",
    minutes=6,
)
APART, SLIDING = "lm", "lm:stride=16"
STUDIES = {
    "windows": compare(
        f"task={APART},{SLIDING} position=alibi,sinusoidal seq_len=32 test_len=128 layers=2 dim=64 heads=4 batch=32 "
        "steps=400 lr=3e-3"
    )
}


def judge(tables):
    bits = lambda task, position, length: tables["windows"].metric(task=task, position=position, test_len=length)
    gain = lambda task, position: bits(task, position, 32) - bits(task, position, 128)
    early = bits(APART, "alibi", 32) - bits(SLIDING, "alibi", 32)
    return [
        at_least("ALiBi at 32 tokens: bits that overlap saves", early, 0.02),
        at_most("ALiBi, overlapping: bits that 128 tokens save on 32", gain(SLIDING, "alibi"), 0.02),
        at_most("the same: bits that they lose", 0 - gain(SLIDING, "alibi"), 0.1),
        at_least("sinusoidal, overlapping: bits that 128 tokens lose on 32", 0 - gain(SLIDING, "sinusoidal"), 0.1),
        reported("ALiBi, windows apart: bits that 128 tokens save on 32", gain(APART, "alibi")),
    ]
