"""Does one full layer among windows, or among linear layers, bring back the recall that these lack?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare

CLAIM = Claim(
    says="Neither windows that are too short nor linear attention recall; one full layer of two recovers all of it.",
    source="Arora et al., 2024, Based (arXiv:2402.18668), section 5; Poli et al., 2024 (arXiv:2403.17844)",
    literature="hybrids close 97.4 % of the gap in recall between gated convolutions and attention (Zoology)",
    doubt="A window whose layers together reach the key would need no full layer: two layers of 8 reach 16 tokens.",
    minutes=7,
)
STUDIES = {
    "layers": compare(
        "task=mqar:pairs=4 attention=full,local:window=8,local:window=8+full,linear,linear+full position=conv dim=32 "
        "ffn=none seq_len=64 batch=64 steps=450 lr=3e-3"
    )
}


def judge(tables):
    accuracy = lambda attention: tables["layers"].metric(attention=attention)
    full = accuracy("full")
    findings = [at_least("full: accuracy", full, 0.95)]
    for name in ("local:window=8", "linear"):
        alone, mixed = accuracy(name), accuracy(f"{name}+full")
        findings += [
            at_most(f"{name}: accuracy", alone, 0.5),
            at_least(f"{name} and a full layer: share of the gap closed", (mixed - alone) / (full - alone), 0.9),
        ]
    return findings
