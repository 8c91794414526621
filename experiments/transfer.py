"""Does a learning rate that was chosen at a small width serve a wider model?"""

from xformers_lab.experiment import Claim, Sample, at_least, at_most, compare, lowest, reported

CLAIM = Claim(
    says="Under muP the rate that is best at one width stays best at others; otherwise it does not.",
    source="Yang et al., 2022 (arXiv:2203.03466), figure 1",
    literature="transformers from width 128 to 8192: the best rate falls with width, and under muP it stays",
    doubt="A standard parametrisation whose best rate is the same eight times as wide, or a muP whose best rate moves.",
    minutes=8,
)
NARROW, WIDE = 32, 256
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SHARED = f"task=lm position=rope seq_len=32 dim={NARROW},{WIDE} head=16 batch=16 steps=120"
LISTED = ",".join(map(str, RATES))
STUDIES = {
    "standard": compare(f"{SHARED} lr={LISTED}"),
    "mup": compare(f"{SHARED} lr={LISTED} parametrisation=mup base_dim={NARROW}"),
}


def carried(table) -> Sample:
    """At each seed the bits that the wide model loses with the rate that is best at the narrow one."""
    narrow, wide = ({rate: table.metric(dim=dim, lr=rate) for rate in RATES} for dim in (NARROW, WIDE))
    bits = lambda sample, trial: sample.values.get(trial, float("inf"))
    best = lambda trial: min(RATES, key=lambda rate: bits(narrow[rate], trial))
    trials = set.intersection(*(set(sample.values) for sample in (*narrow.values(), *wide.values())))
    missing = tuple(dict.fromkeys(why for sample in (*narrow.values(), *wide.values()) for why in sample.missing))
    chosen = Sample({trial: bits(wide[best(trial)], trial) for trial in sorted(trials)}, missing=missing)
    return chosen - lowest(*wide.values())


def judge(tables):
    lost = {name: carried(tables[name]) for name in STUDIES}
    return [
        at_most("muP: bits lost 8 times as wide by the rate that is best at the base", lost["mup"], 0.03),
        at_least("standard less muP: bits lost", lost["standard"] - lost["mup"], 0.05),
        reported("standard: bits lost", lost["standard"]),
    ]
