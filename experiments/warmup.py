"""Does post-LN need a warm-up of the learning rate that pre-LN does without?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Without warm-up a deep post-LN Transformer hardly learns; pre-LN, ReZero and DeepNorm do.",
    source="Xiong et al., 2020 (arXiv:2002.04745), figure 2; Bachlechner et al., 2020 (arXiv:2003.04887); Wang et al., "
    "2022 (arXiv:2203.00555)",
    literature="IWSLT14 De-En, post-LN, Adam: BLEU 8.45 without warm-up, about 34 with one of 4,000 steps",
    doubt="The learning rate: at three times this one post-LN fails with the warm-up too, at a third it needs none.",
    minutes=10,
)
STUDIES = {
    "warmup": compare(
        "task=lm norm=post,pre,rezero,deepnorm warmup=0,0.4 position=sinusoidal seq_len=32 layers=12 dim=64 heads=2 "
        "batch=16 steps=200 lr=1e-3"
    )
}


def judge(tables):
    bits = lambda norm, warmup: tables["warmup"].metric(norm=norm, warmup=warmup)
    gain = lambda norm: bits(norm, 0) - bits(norm, 0.4)
    return [
        at_least("post-LN: bits per byte that the warm-up saves", gain("post"), 0.15),
        *(at_most(f"{norm}: the same", gain(norm), 0.08) for norm in ("pre", "rezero", "deepnorm")),
        reported("post-LN with warm-up less pre-LN with it", bits("post", 0.4) - bits("pre", 0.4)),
    ]
