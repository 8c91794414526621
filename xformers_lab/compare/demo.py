"""The demo: five attention mechanisms at three lengths, three seeds each, in minutes on two cores.

`copy` asks for every symbol of the first half again, half a sequence later: two layers with a window of 8 reach 16
positions back, enough for 32 tokens and for no longer sequence, however long they train.
"""

ATTENTION = ["full", "local:window=8", "strided", "linear", "axial"]
TOKENS = 2048  # per step, at every length

configs = [
    {
        "task": "copy",
        "attention": attention,
        "seq_len": length,
        "seed": [0, 1, 2],
        "steps": 200,
        "batch": TOKENS // length,
        "dim": 64,
        "layers": 2,
        "heads": 2,
        "lr": 3e-3,
        "eval_batches": 8,
    }
    for length in (32, 64, 128)
    for attention in ATTENTION
]
