"""Does a Transformer recall over any distance, where an LSTM forgets?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Attention copies over any distance, an LSTM over short ones alone.",
    source="Vaswani et al., 2017 (arXiv:1706.03762), table 1; Khandelwal et al., 2018 (arXiv:1805.04623)",
    literature="length of the path between two positions: O(1) in attention, O(n) in a recurrence",
    doubt="An LSTM that copies the longest text with more steps, more width, or another learning rate.",
    minutes=5,
)
LENGTHS = (16, 32, 64, 128)
STUDIES = {
    "copy": compare("task=copy model=decoder,lstm seq_len=16,32,64,128 dim=64 layers=2 batch=16 steps=300 lr=3e-3")
}


def judge(tables):
    accuracy = lambda model, length: tables["copy"].metric(model=model, seq_len=length)
    step = lambda model, length: tables["copy"].value("seconds_median", model=model, seq_len=length)
    slower = lambda model: step(model, LENGTHS[-1]) / step(model, LENGTHS[0])
    return [
        *(at_least(f"attention, {length} tokens: accuracy", accuracy("decoder", length), 0.95) for length in LENGTHS),
        at_most("LSTM, 128 tokens: accuracy (chance 0.1)", accuracy("lstm", 128), 0.3),
        at_least("LSTM: accuracy at 16 tokens less that at 128", accuracy("lstm", 16) - accuracy("lstm", 128), 0.3),
        *(
            reported(f"{model}: time of a step at 128 tokens over that at 16", slower(model))
            for model in ("decoder", "lstm")
        ),
    ]
