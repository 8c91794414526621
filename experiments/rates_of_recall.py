"""How wide is the range of learning rates at which each mechanism learns to recall?"""

import math

from xformers_lab.experiment import Claim, Sample, at_least, compare, reported

CLAIM = Claim(
    says="Recurrent mechanisms learn to recall in a narrower range of learning rates than attention does.",
    source="Okpekpe and Orvieto, 2025 (arXiv:2508.19029), abstract and section 4",
    literature="Transformers learn recall at all rates tried; recurrent models in a narrow window of them",
    doubt="More steps, with which slow rates would learn too.",
    minutes=8,
)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RECURRENT = ("linear", "gla", "delta_net", "mamba2")
ARMS = ("full", "local:window=16", *RECURRENT)
STUDIES = {
    "rates": compare(
        f"task=mqar:pairs=4 attention={','.join(ARMS)} lr={','.join(map(str, RATES))} position=conv dim=32 ffn=none "
        "seq_len=64 batch=64 steps=400"
    )
}


def decades(accuracy: dict[float, Sample]) -> Sample:
    """At each seed the decades of learning rate, half a step around each, at which 0.9 is recalled."""
    trials = set.intersection(*(set(sample.values) for sample in accuracy.values()))
    step = math.log10(RATES[-1] / RATES[0]) / (len(RATES) - 1)
    missing = tuple(dict.fromkeys(reason for sample in accuracy.values() for reason in sample.missing))
    learned = lambda trial: sum(sample.values[trial] >= 0.9 for sample in accuracy.values())
    return Sample({trial: step * learned(trial) for trial in sorted(trials)}, missing=missing)


def judge(tables):
    width = {arm: decades({rate: tables["rates"].metric(attention=arm, lr=rate) for rate in RATES}) for arm in ARMS}
    return [
        *(
            at_least(f"full less {arm}: decades of learning rate", width["full"] - width[arm], 0.25)
            for arm in RECURRENT
        ),
        *(reported(f"{arm}: decades", sample) for arm, sample in width.items()),
    ]
