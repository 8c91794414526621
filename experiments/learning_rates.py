"""How wide is the range of learning rates at which each norm placement learns?"""

import math

from xformers_lab.experiment import Claim, Sample, at_least, compare, reported

CLAIM = Claim(
    says="Pre-LN learns over a wider range of learning rates than post-LN.",
    source="Xiong et al., 2020 (arXiv:2002.04745), section 4; Wortsman et al., 2023 (arXiv:2309.14322), figure 1",
    literature="post-LN, warm-up 500: BLEU 31.16 at lr 5e-4 and 2.77 at 1e-3; pre-LN trains at both",
    doubt="A post-LN that is as wide as pre-LN in fewer layers, or with a longer warm-up.",
    minutes=6,
)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NORMS = ("pre", "post", "rezero", "deepnorm")
STUDIES = {
    "rates": compare(
        f"task=lm norm={','.join(NORMS)} lr={','.join(map(str, RATES))} position=sinusoidal seq_len=32 layers=4 dim=64 "
        "batch=16 steps=120"
    )
}


def decades(bits: dict[float, Sample]) -> Sample:
    """At each seed the decades of learning rate, half a step around each, within 5 % of the best."""
    trials = set.intersection(*(set(sample.values) for sample in bits.values()))
    step = math.log10(RATES[-1] / RATES[0]) / (len(RATES) - 1)
    near = lambda trial: min(sample.values[trial] for sample in bits.values()) * 1.05
    count = lambda trial: sum(sample.values[trial] <= near(trial) for sample in bits.values())
    missing = tuple(dict.fromkeys(reason for sample in bits.values() for reason in sample.missing))
    return Sample({trial: step * count(trial) for trial in sorted(trials)}, missing=missing)


def judge(tables):
    width = {norm: decades({rate: tables["rates"].metric(norm=norm, lr=rate) for rate in RATES}) for norm in NORMS}
    return [
        at_least(
            "pre-LN less post-LN: decades of learning rate within 5 % of its best", width["pre"] - width["post"], 0.25
        ),
        *(reported(f"{norm}: decades", sample) for norm, sample in width.items()),
    ]
