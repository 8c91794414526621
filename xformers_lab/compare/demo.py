"""The demo: five attention mechanisms at three lengths, on a recall task and on real text, in minutes on two cores.

`copy` asks for every symbol of the first half again, half a sequence later: two layers with a window of 8 reach 16
positions back, enough for 32 tokens and for no longer sequence, however long they train. `lm` predicts the next byte
of the Python standard library's source, at lengths where the cost of attention shows.
"""

ATTENTION = ["full", "local:window=8", "strided", "linear", "axial"]
GRID = [
    # task, sequence length, optimizer steps, tokens per step
    ("copy", [32, 64, 128], 200, 2048),
    ("lm", [128, 512, 2048], 30, 4096),
]

configs = [
    {
        "task": task,
        "attention": attention,
        "seq_len": length,
        "steps": steps,
        "batch": tokens // length,
        "dim": 64,
        "layers": 2,
        "heads": 2,
        "lr": 3e-3,
        "eval_batches": 4,
    }
    for task, lengths, steps, tokens in GRID
    for length in lengths
    for attention in ATTENTION
]
