"""Does a Transformer that has learned SCAN follow longer commands than it was trained on?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="It is near perfect where commands are split at random, and near zero where the test commands are longer.",
    source="Lake and Baroni, 2018 (arXiv:1711.00350), experiments 1 and 2; Csordas et al., 2021 (arXiv:2108.12284)",
    literature="exact match: simple 99.8, length 20.8 (LSTM); Transformer with absolute positions, length 0.00",
    doubt="Relative positions or shared layers that solve the length split: Csordas et al. report 100 % with a "
    "cut-off of 26 actions.",
    minutes=10,
)
STUDIES = {
    split: compare(
        f"task=scan:split={split} position=sinusoidal,rope depth=fixed,universal dim=64 layers=3 heads=4 batch=64 "
        "steps=800 lr=2e-3 seq_len=64"
    )
    for split in ("simple", "length")
}


def judge(tables):
    match = lambda split, position, depth: tables[split].metric(position=position, depth=depth)
    arms = [(position, depth) for position in ("sinusoidal", "rope") for depth in ("fixed", "universal")]
    return [
        at_least("simple split, sinusoidal positions: exact match", match("simple", "sinusoidal", "fixed"), 0.9),
        at_most("length split, sinusoidal positions: exact match", match("length", "sinusoidal", "fixed"), 0.1),
        *(reported(f"length split, {' and '.join(arm)}", match("length", *arm)) for arm in arms[1:]),
    ]
