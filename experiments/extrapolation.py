"""Does a model with ALiBi keep its loss beyond the length that it was trained at, where other positions lose it?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Trained on 64 tokens, ALiBi predicts 512 as well as 64; sinusoidal positions do not.",
    source="Press, Smith and Lewis, 2022 (arXiv:2108.12409), figure 1 and table 2",
    literature="WikiText-103, trained at 512 tokens, perplexity at 512 and 2,512: ALiBi 19.73 and 18.41, sinusoidal "
    "20.05 and 132.41, rotary 20.07 and 31.58, T5 19.65 and 20.41",
    doubt="A loss that rises with ALiBi too once the model is trained for longer, or one that does not rise with "
    "sinusoidal positions, on another text.",
    minutes=4,
)
STUDIES = {
    "lengths": compare(
        "task=lm position=alibi,sinusoidal,rope,t5,none seq_len=64 test_len=128+256+512 layers=2 dim=64 heads=4 "
        "batch=16 steps=300 lr=3e-3"
    )
}


def judge(tables):
    bits = lambda position, length: tables["lengths"].metric(position=position, test_len=length)
    rise = {position: bits(position, 512) - bits(position, 64) for position in tables["lengths"].all("position")}
    return [
        at_most("ALiBi: bits per byte at 512 tokens less those at 64", rise["alibi"], 0.05),
        at_least("sinusoidal: the same", rise["sinusoidal"], 0.3),
        at_least("sinusoidal less ALiBi at 512 tokens", bits("sinusoidal", 512) - bits("alibi", 512), 0.1),
        *(reported(f"{position}: the same rise", rise[position]) for position in ("rope", "t5", "none")),
    ]
