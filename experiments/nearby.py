"""Does text ask for more than the nearest characters, where copying does?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Beside full attention over 128 characters of text a window of 16 predicts no worse and keeps a fraction of "
    "them; linear attention, which reads all, predicts worse.",
    source="Khandelwal et al., 2018 (arXiv:1805.04623), abstract; Arora et al., 2023, Zoology (arXiv:2312.04927), "
    "abstract",
    literature="an LSTM uses about 200 tokens of context, and tells apart the order of the nearest 50; 82 % of the gap "
    "between models without attention and those with it is in what text recalls from before",
    doubt="Longer training: once a model has what the nearest characters tell, what is further away is left to gain.",
    minutes=2,
)
WINDOW = "local:window=16"
STUDIES = {
    "text": compare(
        f"task=lm attention=full,{WINDOW},linear position=rope seq_len=128 dim=64 layers=2 heads=2 batch=8 steps=240 "
        "lr=3e-3"
    )
}


def judge(tables):
    bits = lambda name: tables["text"].metric(attention=name)
    kept = lambda name: tables["text"].value("state_bytes", attention=name)
    speed = lambda name: tables["text"].value("tokens_per_second", attention=name)
    return [
        at_most("full: bits per byte", bits("full"), 3.5),
        at_most("window less full: bits per byte", bits(WINDOW) - bits("full"), 0.05),
        at_least("linear less full: bits per byte", bits("linear") - bits("full"), 0.1),
        at_most("window over full: bytes kept in decoding", kept(WINDOW) / kept("full"), 0.2),
        reported("window over full: tokens per second in training", speed(WINDOW) / speed("full")),
        reported("linear over full: tokens per second in training", speed("linear") / speed("full")),
    ]
