"""Claims of the literature, run and judged: what a file of `experiments/` is made of.

A file states a claim (`CLAIM`), the studies that test it (`STUDIES`: ordinary `xlab compare` and `xlab bench`), and its
verdict (`judge`, from their tables to findings with thresholds):

    from xformers_lab.experiment import Claim, at_most, compare

    CLAIM = Claim(says="...", source="...", literature="...", doubt="...", minutes=5)
    STUDIES = {"lengths": compare("task=lm position=alibi,sinusoidal seq_len=64 test_len=512 steps=500")}

    def judge(tables):
        at = lambda length: tables["lengths"].metric(position="alibi", test_len=length)
        return [at_most("ALiBi's bits at 512 tokens less those at 64", at(512) - at(64), 0.02)]
"""

from xformers_lab.experiment.claim import Claim, bench, compare, error, signals
from xformers_lab.experiment.findings import Finding, at_least, at_most, reported
from xformers_lab.experiment.sample import Sample, highest, lowest, rank_correlation, slope

__all__ = [
    "Claim",
    "Finding",
    "Sample",
    "at_least",
    "at_most",
    "bench",
    "compare",
    "error",
    "highest",
    "lowest",
    "rank_correlation",
    "reported",
    "signals",
    "slope",
]
