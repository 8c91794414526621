"""Does one global token repair a window that is too short for the task?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare

CLAIM = Claim(
    says="An encoder with windows shorter than the distance it has to bridge fails, and one global token repairs it.",
    source="Zaheer et al., 2020, BigBird (arXiv:2007.14062), table 1; Beltagy et al., 2020, Longformer "
    "(arXiv:2004.05150), table 10",
    literature="accuracy on MNLI: window 73.1, random blocks too 80.5, BERT 83.4; on WikiHop: Longformer 73.8, without "
    "global attention 65.5",
    doubt="A window that reaches the needle through its layers would make the task too easy: two layers of window 6 "
    "reach 12 tokens, and the needle is 30 away.",
    minutes=3,
)
STUDIES = {
    "needle": compare(
        "task=needle:distance=30 attention=full,local:window=6,longformer:window=6:tokens=1 seq_len=64 model=encoder "
        "steps=150 batch=32 lr=3e-3"
    )
}


def judge(tables):
    full, window, mended = (tables["needle"].metric(attention=name) for name in tables["needle"].all("attention"))
    return [
        at_least("full: accuracy", full, 0.9),
        at_most("window: accuracy (chance 0.0625)", window, 0.15),
        at_least("window with a global token, less the window alone", mended - window, 0.7),
    ]
