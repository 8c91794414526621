"""Do positions drawn from a range longer than the training sequences carry an algorithm to longer strings?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="Trained on positions drawn at random from a longer range, a Transformer reverses strings of twice the "
    "trained length better than with rotary or sinusoidal positions.",
    source="Ruoss et al., 2023 (arXiv:2305.16843), abstract; Dehghani et al., 2019 (arXiv:1807.03819), table 4",
    literature="accuracy on lengths beyond those of training rises by 12 % on average over 15 tasks",
    doubt="Rotary or sinusoidal positions that do as well after more steps.",
    minutes=5,
)
ARMS = ("rope", "sinusoidal", "randomized:range=64", "randomized:range=64:draw=offset", "randomized")
STUDIES = {
    "reverse": compare(
        f"task=reverse:shortest=3 position={','.join(ARMS)} seq_len=24 test_len=48 layers=3 dim=64 heads=4 batch=32 "
        "steps=600 lr=3e-3"
    )
}


def judge(tables):
    accuracy = lambda position, length: tables["reverse"].metric(position=position, test_len=length)
    twice = {position: accuracy(position, 48) for position in ARMS}
    return [
        at_least("drawn from 64 less rotary: accuracy at 48", twice["randomized:range=64"] - twice["rope"], 0.2),
        at_least("drawn from 64 less sinusoidal", twice["randomized:range=64"] - twice["sinusoidal"], 0.2),
        *(reported(f"{position} at {length}", accuracy(position, length)) for position in ARMS for length in (24, 48)),
    ]
