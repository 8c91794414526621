"""Does attention recall at any width, where linear attention and recurrences need a wider state?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Full attention recalls associations at every width; linear attention fails where its state is small.",
    source="Arora, Eyuboglu et al., 2023, Zoology (arXiv:2312.04927), figure 2; Based (arXiv:2402.18668)",
    literature="accuracy at N=128, 8 pairs, d=64/128/256: attention 1/1/1, H3 .25/.74/.91, RWKV .18/.50/.75",
    doubt="A learning rate outside the grid at which linear attention solves it: recurrences do so in a narrow range.",
    minutes=10,
)
ARMS = "full,local:window=8,linear,linear:features=taylor+local:window=8,delta_net,gla"
STUDIES = {
    "recall": compare(
        f"task=mqar:pairs=4 attention={ARMS} position=conv dim=16,64 seq_len=64 ffn=none batch=64 steps=400 tune=lr"
    )
}


def judge(tables):
    accuracy = lambda arm, dim: tables["recall"].metric(attention=arm, dim=dim)
    findings = [at_least(f"full at width {dim}: accuracy", accuracy("full", dim), 0.95) for dim in (16, 64)]
    findings += [
        at_most("linear at width 16", accuracy("linear", 16), 0.6),
        at_most("window of 8 at width 64", accuracy("local:window=8", 64), 0.6),
    ]
    others = tables["recall"].all("attention")[3:]
    return findings + [reported(f"{arm} at width {dim}", accuracy(arm, dim)) for arm in others for dim in (16, 64)]
