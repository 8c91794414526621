"""Does any model of this size learn ListOps, and does full attention beat a window?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, highest, reported

CLAIM = Claim(
    says="From scratch no model exceeds 40 % on ListOps, and what separates them is small.",
    source="Tay et al., 2021, Long Range Arena (arXiv:2011.04006), table 1, and three re-runs",
    literature="Transformer 36.4, Local 15.8, Linear 16.1; in re-runs 36.0 to 38.4 for all of them; chance 10",
    doubt="A longer training that passes 40 %: self-pretraining reaches 59 (Amos et al., 2023).",
    minutes=8,
)
STUDIES = {
    "listops": compare(
        "task=listops attention=full,local:window=8,linear position=sinusoidal seq_len=128 dim=64 layers=2 heads=4 "
        "batch=32 steps=400 lr=1e-3",
        baselines=True,
    )
}


def judge(tables):
    accuracy = lambda **keys: tables["listops"].metric(**keys)
    arms = {name: accuracy(attention=name) for name in tables["listops"].all("attention")}
    beside = {name: accuracy(name=name) for name in ("bag of tokens", "LSTM")}
    everyone = highest(*arms.values(), *beside.values())
    return [
        at_most("the best of all models: accuracy", everyone, 0.4),
        at_least("full: accuracy", arms["full"], 0.1),
        *(reported(f"{name}: accuracy", sample) for name, sample in {**arms, **beside}.items()),
    ]
