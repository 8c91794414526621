"""Does a token cost the same however long the text is, with linear attention, and how much more with full attention?"""

from xformers_lab.experiment import Claim, at_least, at_most, bench, reported

CLAIM = Claim(
    says="Linear attention generates each token in constant time and memory; with full attention and a cache both grow "
    "with every token before it.",
    source="Katharopoulos et al., 2020 (arXiv:2006.16236), table 1 and section 3.4",
    literature="images per second: MNIST 142 against 0.45 of softmax computed again for every token, CIFAR-10 17.85 "
    "against 0.004",
    doubt="A cache that is not updated in place would charge full attention with copying it; the bytes are exact.",
    minutes=2,
)
LENGTHS = (256, 1024, 4096)
STUDIES = {
    "token": bench("attention=full,linear seq_len=256,1024,4096 dim=256 heads=4 batch=1", passes="decode", rounds=9)
}


def judge(tables):
    rows = tables["token"]
    keys = lambda name, length: {"attention": name, "seq_len": length, "pass": "decode"}
    seconds = lambda name, length: rows.seconds(**keys(name, length))
    state = lambda name, length: rows.value("state_bytes", **keys(name, length))
    growth = lambda of, name: of(name, LENGTHS[-1]) / of(name, LENGTHS[0])
    return [
        at_most("linear: state at 4,096 tokens over that at 256", growth(state, "linear"), 1.0),
        at_least("full: the same", growth(state, "full"), 12),
        at_most("linear: time of a token behind 4,096 over that behind 256", growth(seconds, "linear"), 1.3),
        at_least("full, cached: the same", growth(seconds, "full"), 1.5),
        reported("full over linear: time behind 4,096", seconds("full", 4096) / seconds("linear", 4096)),
    ]
