"""Which mechanisms recall what they have read, each at its own best learning rate?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Full attention recalls associations; linear attention and windows of this size do not, and both together do.",
    source="Arora, Eyuboglu et al., 2023, Zoology (arXiv:2312.04927), figure 2; Based (arXiv:2402.18668)",
    literature="accuracy at N=128, 8 pairs, d=64/128/256: attention 1/1/1, H3 .25/.74/.91, RWKV .18/.50/.75",
    doubt="A learning rate outside the grid at which linear attention solves it: recurrences do so in a narrow range.",
    minutes=10,
)
BASED = "linear:features=taylor+local:window=16"
STUDIES = {
    "recall": compare(
        f"task=mqar:pairs=4 attention=full,linear,local:window=16,{BASED},delta_net,gla,mamba2 position=conv dim=32 "
        "ffn=none seq_len=64 batch=64 steps=300 tune=lr:share=0.5"
    )
}


def judge(tables):
    accuracy = lambda name: tables["recall"].metric(attention=name)
    others = ("delta_net", "gla", "mamba2")
    return [
        at_least("full: accuracy", accuracy("full"), 0.95),
        at_least("Taylor features and a window of 16", accuracy(BASED), 0.9),
        at_most("linear (elu)", accuracy("linear"), 0.6),
        at_most("window of 16", accuracy("local:window=16"), 0.9),
        *(reported(name, accuracy(name)) for name in others),
    ]
