"""Does one full layer among windows bring back the recall that windows lack?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="A stack of windows cannot recall what lies outside its reach; one full layer of four recovers most of it.",
    source="Arora et al., 2024, Based (arXiv:2402.18668), section 5; Poli et al., 2024 (arXiv:2403.17844)",
    literature="hybrids close 97.4 % of the gap in recall between gated convolutions and attention (Zoology)",
    doubt="A window whose layers together reach the key would need no full layer: four layers of 4 reach 16 tokens.",
    minutes=6,
)
ARMS = {
    "local:window=4": "no full layer",
    "full+local:window=4+local:window=4+local:window=4": "the first of four full",
    "full+local:window=4": "two of four full",
    "full": "all full",
}
STUDIES = {
    "ratio": compare(
        f"task=mqar:pairs=4 attention={','.join(ARMS)} position=conv layers=4 seq_len=64 ffn=none batch=64 steps=400 "
        "lr=3e-3"
    )
}


def judge(tables):
    accuracy = {words: tables["ratio"].metric(attention=arm) for arm, words in ARMS.items()}
    none, one, two, full = accuracy.values()
    return [
        at_least("all full: accuracy", full, 0.9),
        at_most("no full layer: accuracy", none, 0.6),
        at_least("one full layer of four, share of the gap closed", (one - none) / (full - none), 0.8),
        reported("two of four: share of the gap closed", (two - none) / (full - none)),
    ]
