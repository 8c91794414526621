"""Do equal parameters, equal FLOPs and equal seconds give the same ranking?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="Which mechanism is best depends on what is held equal: parameters, FLOPs or seconds.",
    source="Dehghani et al., 2021, The Efficiency Misnomer (arXiv:2110.12894), figures 1 to 3",
    literature="the order of models by accuracy changes between parameters, FLOPs and throughput",
    doubt="The same order under all three, for mechanisms whose costs differ as much as these.",
    minutes=9,
)
ARMS = ("full", "local:window=16", "linear", "synthesizer")
STUDIES = {
    budget: compare(
        f"task=lm attention={','.join(ARMS)} position=rope seq_len=256 dim=64 layers=2 batch=8 steps=200 lr=3e-3 "
        f"match={budget}"
    )
    for budget in ("params", "flops", "wallclock")
}


def judge(tables):
    gap = lambda budget, arm: tables[budget].metric(attention=arm) - tables[budget].metric(attention="full")
    shift = {arm: gap("params", arm) - gap("wallclock", arm) for arm in ARMS[1:]}
    findings = [
        at_least(
            "local: bits per byte that equal seconds gain it on full, beside equal parameters",
            shift["local:window=16"],
            0,
        )
    ]
    for budget in tables:
        findings += [reported(f"{arm} less full, equal {budget}", gap(budget, arm)) for arm in ARMS[1:]]
    return findings
