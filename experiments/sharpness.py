"""How widely and how far do the heads of full, windowed and linear attention look?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Linear attention looks at all keys more alike than softmax attention, and windows look nearer.",
    source="Katharopoulos et al., 2020 (arXiv:2006.16236); Zhang et al., 2024, Hedgehog (arXiv:2402.04347), figure 2",
    literature="the entropy of linear attention is near that of equal weights; softmax attention is spiky",
    doubt="A gap that closes with training: linear attention fitted to softmax attention becomes spiky.",
    minutes=4,
)
STUDIES = {
    "text": compare(
        "task=lm attention=full,local:window=8,linear,talking_heads position=rope seq_len=64 dim=64 layers=2 heads=4 "
        "batch=32 steps=300 lr=3e-3"
    )
}


def judge(tables):
    heads = lambda figure, name, layer=None: tables["text"].heads(figure, attention=name, layer=layer)
    findings = [
        at_least(
            "linear less full: entropy over that of equal weights",
            heads("relative", "linear") - heads("relative", "full"),
            0.1,
        ),
        at_most("local: mean distance in tokens", heads("distance", "local:window=8"), 8),
        at_least("full less local: mean distance", heads("distance", "full") - heads("distance", "local:window=8"), 1),
    ]
    names = tables["text"].all("attention")
    return findings + [
        reported(f"{name}, layer {layer}: {figure}", heads(figure, name, layer))
        for name in names
        for layer in (1, 2)
        for figure in ("entropy", "distance")
    ]
