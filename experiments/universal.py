"""Do shared layers carry an algorithm beyond the trained length, and does halting spend steps where they are needed?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="A Universal Transformer reverses longer strings better than layers of their own do, and halts sooner where "
    "inputs are easy.",
    source="Dehghani et al., 2019, Universal Transformers (arXiv:1807.03819), table 4 and section 3.1",
    literature="trained on 40 symbols, tested on 400: reverse 0.96 against 0.13 (Transformer), copy 0.91 against 0.53",
    doubt="Positions that begin at a random place in training, as the paper has them.",
    minutes=6,
    seeds=5,
)
MODEL = "position=rope dim=32 heads=2 lr=3e-3"
ARMS = ("fixed", "universal", "universal:act=true")
STUDIES = {
    "reverse": compare(
        f"task=reverse depth={','.join(ARMS)} seq_len=16 test_len=24+32 layers=3 batch=64 steps=500 {MODEL}"
    ),
    "halting": compare(
        "task=brackets:depth=1,brackets:depth=6 depth=universal:act=true seq_len=32 layers=4 batch=32 steps=400 "
        + MODEL
    ),
}


def judge(tables):
    accuracy = lambda depth, length: tables["reverse"].metric(depth=depth, test_len=length)
    easy, hard = (f"brackets:depth={depth}" for depth in (1, 6))
    steps = {task: tables["halting"].reports("steps", task=task) for task in (easy, hard)}
    return [
        at_least(
            "shared less own layers: accuracy at twice the length", accuracy(ARMS[1], 32) - accuracy(ARMS[0], 32), 0
        ),
        at_least("brackets: steps of 4 where 6 may be open, less those where one may", steps[hard] - steps[easy], 0.2),
        *(reported(f"{arm} at {length}", accuracy(arm, length)) for arm in ARMS for length in (16, 24, 32)),
        *(reported(f"{task}: steps", steps[task]) for task in steps),
        *(reported(f"{task}: accuracy", tables["halting"].metric(task=task)) for task in steps),
    ]
