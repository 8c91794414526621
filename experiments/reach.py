"""How far back do windows copy: as far as their layers together reach?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare

CLAIM = Claim(
    says="Windows copy half a sequence back while their layers together reach that far, and not beyond; full attention "
    "does at every length.",
    source="Beltagy et al., 2020, Longformer (arXiv:2004.05150), section 3.1",
    literature="the receptive field of l layers of windows is l windows",
    doubt="A window that copies beyond its reach sees what it must not. One whose reach just covers the distance needs "
    "more steps: 16 over 2 layers learns nothing at 31 back in 150.",
    minutes=2,
)
LENGTHS, LAYERS = (32, 64, 128), 2
WINDOW, REACH = "local:window=30", 30 * LAYERS
STUDIES = {
    "copy": compare(
        f"task=copy attention=full,{WINDOW} seq_len={','.join(map(str, LENGTHS))} tokens=1024 dim=64 "
        f"layers={LAYERS} heads=2 steps=200 lr=5e-3"
    )
}


def judge(tables):
    accuracy = lambda name, length: tables["copy"].metric(attention=name, seq_len=length)
    findings = [at_least(f"full, {length} tokens: accuracy", accuracy("full", length), 0.95) for length in LENGTHS]
    for length in LENGTHS:
        back = (length - 1) // 2
        what = f"{WINDOW}, {length} tokens: accuracy {back} back with a reach of {REACH}"
        there = accuracy(WINDOW, length)  # chance is 0.1
        findings.append(at_least(what, there, 0.9) if back <= REACH else at_most(what, there, 0.2))
    return findings
