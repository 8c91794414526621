"""The demo: five attention mechanisms, three lengths, a recall task and real text, in a few minutes on two cores.

`copy` asks for every symbol of the first half again, half a sequence later; a window of 16 cannot reach it from 64
positions on, however long it trains. `lm` predicts the next byte of the Python standard library's source.
"""

ATTENTION = ["full", "local:window=16", "strided", "linear", "axial"]
LENGTHS = [64, 128, 256]

small = {"dim": 64, "layers": 2, "heads": 2, "lr": 3e-3, "eval_batches": 4}
configs = [
    {**small, "task": task, "attention": attention, "seq_len": length, "steps": steps, "batch": 4096 // length}
    for task, steps in (("copy", 300), ("lm", 100))
    for length in LENGTHS
    for attention in ATTENTION
]
