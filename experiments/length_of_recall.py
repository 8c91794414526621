"""Does a Transformer recall over any distance, where an LSTM forgets?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Attention recalls a token however far back it is, an LSTM does not.",
    source="Vaswani et al., 2017 (arXiv:1706.03762), table 1; Khandelwal et al., 2018 (arXiv:1805.04623)",
    literature="length of the path between two positions: O(1) in attention, O(n) in a recurrence",
    doubt="An LSTM that bridges the longest distance with more steps, or with another learning rate.",
    minutes=8,
)
DISTANCES = (8, 32, 128)
STUDIES = {
    f"{name}_{distance}": compare(
        f"task=needle:distance={distance} {keys} seq_len={2 * distance} dim=64 layers=2 batch=32 steps=300 lr=3e-3"
    )
    for name, keys in {"attention": "model=encoder position=rope", "lstm": "model=lstm"}.items()
    for distance in DISTANCES
}


def judge(tables):
    accuracy = lambda name, distance: tables[f"{name}_{distance}"].metric()
    return [
        *(at_least(f"attention over {each} tokens: accuracy", accuracy("attention", each), 0.9) for each in DISTANCES),
        at_most("LSTM over 128 tokens: accuracy", accuracy("lstm", 128), 0.5),
        *(reported(f"LSTM over {each} tokens: accuracy", accuracy("lstm", each)) for each in DISTANCES[:2]),
    ]
