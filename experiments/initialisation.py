"""How large are states and gradients in the layers of a Transformer before it trains?"""

from xformers_lab.experiment import Claim, Finding, at_least, at_most, highest, lowest, reported, signals

CLAIM = Claim(
    says="The gradient of the last layer keeps its size with depth in post-LN, and shrinks as 1 / sqrt(depth) in "
    "pre-LN, whose states grow with every layer.",
    source="Xiong et al., 2020 (arXiv:2002.04745), theorem 1 and lemma 2",
    literature="of the last feed-forward layer: O(d sqrt(ln d)) in post-LN, O(d sqrt(ln d / L)) in pre-LN; in pre-LN "
    "layer l has (1 + l/2) d <= E|x|^2 <= (1 + 3 l/2) d",
    doubt="Bounds that hold for one width alone, or that the first batch of another text breaks.",
    minutes=1,
    seeds=5,
)
DEPTHS = (2, 4, 8, 16)
STUDIES = {"layers": signals("task=lm norm=post,pre layers=2,4,8,16 position=sinusoidal seq_len=32 batch=16")}


def judge(tables):
    last = lambda what, norm, depth: tables["layers"].value(what, norm=norm, layers=depth, layer=depth)
    gradient = {norm: [last("ffn_gradient", norm, depth) for depth in DEPTHS] for norm in ("post", "pre")}
    post, pre = gradient["post"], gradient["pre"]
    state = last("state", "pre", 16)
    return [
        at_most(
            "post-LN: largest over least gradient of the last layer, 2 to 16 layers", highest(*post) / lowest(*post), 2
        ),
        at_least("pre-LN: that of 2 layers over that of 16 (theory: 2.83)", pre[0] / pre[-1], 2),
        Finding("pre-LN: |x|^2 / D behind layer 16", state, low=1 + 16 / 2, high=1 + 3 * 16 / 2),
        reported("post-LN: the same", last("state", "post", 16)),
    ]
