"""What does every attention mechanism recall, copy and predict, and what does it cost?"""

import math

from xformers_lab import spec
from xformers_lab.experiment import Claim, Sample, at_least, at_most, compare, rank_correlation, reported

CLAIM = Claim(
    says="Mechanisms recall and copy by what they keep of the context; in text few are better than full attention.",
    source="Arora et al., 2024 (arXiv:2402.18668), figure 2; Jelassi et al., 2024 (arXiv:2402.01032); Narang et al., "
    "2021 (arXiv:2102.11972), table 1",
    literature="recall rises with the size of the recurrent state; a state of fixed size copies no longer strings than "
    "it holds; most modifications do not meaningfully improve a Transformer",
    doubt="Longer contexts, learning rates tuned for each, more steps: this is one recipe for all.",
    minutes=75,
    data={"sst2": "SST-2's sentences, train.tsv, dev.tsv and test.tsv: sentence, tab, label, no header"},
)
# Windows and blocks that are short beside 64 tokens, where those by default are as long as they. What is not named
# here is as by default.
SHORT = """
adaptive_span:span=64:start=0.25:ramp=8 bigbird:block=8 block_local:block=16 clustered:clusters=16:improved=8
csalr:landmarks=16 dilated:window=16 etc:radius=12:tokens=8 informer:factor=2 linformer:rank=16
local:window=16 longformer:window=16 luna:packed=16 moba:block=8 multiscale:scales=1x4x16
nsa:block=8:stride=4:select=8:chosen=3:window=16 nystrom:landmarks=16:kernel=9 perceiver:latents=16
poolingformer:window=8:reach=32 random:block=8 reformer:chunk=8 set:points=16 sinkhorn:block=8
skyformer:landmarks=16 sparse:pattern=band(16)|first(1) streaming:window=12 topk:keys=8
"""
SHELF = {name: name for name in spec.names("attention")} | {word.partition(":")[0]: word for word in SHORT.split()}
MODEL = f"attention={','.join(SHELF.values())} seq_len=64 dim=32 heads=2 layers=2 lr=3e-3"
SENTENCES = "mlm:path=({data}/sst2):text_column=0:label_column=1:header=false"
# The encoders are those that cannot be causal, too; what reads one way alone is no encoder.
STUDIES = {
    "recall": compare(f"task=mqar:pairs=4 position=conv ffn=none batch=32 steps=400 {MODEL}", skip_impossible=True),
    "copy": compare(f"task=copy position=conv batch=16 steps=300 {MODEL}", skip_impossible=True),
    "text": compare(f"task=lm position=conv batch=16 steps=200 {MODEL}", skip_impossible=True),
    "needle": compare(f"task=needle model=encoder batch=32 steps=200 {MODEL}", skip_impossible=True),
    "masked": compare(f"task={SENTENCES} model=encoder batch=16 steps=200 {MODEL}", skip_impossible=True),
}


def judge(tables):
    scores = {study: [table.metric(attention=each) for each in SHELF.values()] for study, table in tables.items()}
    kept = [tables["recall"].value("state_bytes", attention=each) for each in SHELF.values()]
    full = dict(zip(SHELF, scores["text"], strict=True))["full"]
    known = [sample for sample in scores["text"] if sample.values]
    better = Sample(
        {seed: sum(bits.values.get(seed, math.inf) < at - 0.05 for bits in known) for seed, at in full.values.items()}
    )
    return [
        at_least(
            "recall: rank correlation of accuracy and bytes kept in decoding",
            rank_correlation(scores["recall"], kept),
            0.3,
        ),
        at_least("copy: the same", rank_correlation(scores["copy"], kept), 0.3),
        at_most("text: share that is better than full attention by 0.05 bits", better / len(known), 0.2),
        reported("rank correlation of recall and copy", rank_correlation(scores["recall"], scores["copy"])),
        reported("rank correlation of recall and bits of text", rank_correlation(scores["recall"], scores["text"])),
        reported("rank correlation of needle and masked text", rank_correlation(scores["needle"], scores["masked"])),
    ]
