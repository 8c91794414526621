"""Do shared layers carry an algorithm beyond the trained length, and does halting spend steps where they are needed?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="A Universal Transformer reverses longer strings better than layers of their own do, and halts sooner where "
    "inputs are easy.",
    source="Dehghani et al., 2019, Universal Transformers (arXiv:1807.03819), table 4 and section 3.1",
    literature="trained on 40 symbols, tested on 400: reverse 0.96 against 0.13 (Transformer), copy 0.91 against 0.53",
    doubt="Positions that begin at a random place in training, as the paper has them.",
    minutes=8,
)
MODEL = "seq_len=16 dim=32 heads=2 batch=64 lr=3e-3"
STUDIES = {
    "reverse": compare(
        f"task=reverse depth=fixed,universal,universal:act=true position=t5 layers=4 test_len=24+32 steps=600 {MODEL}"
    ),
}


def judge(tables):
    accuracy = lambda depth, length: tables["reverse"].metric(depth=depth, test_len=length)
    arms = ("fixed", "universal", "universal:act=true")
    return [
        at_least("shared less own layers: accuracy at 24", accuracy(arms[1], 24) - accuracy(arms[0], 24), 0),
        *(reported(f"{arm} at {length}", accuracy(arm, length)) for arm in arms for length in (16, 24, 32)),
        reported("ACT: steps of 4 on reverse", tables["reverse"].reports("steps", depth=arms[2])),
    ]
