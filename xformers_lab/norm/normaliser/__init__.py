"""The shelf of normalisers: (B, T, D) -> (B, T, D), in decoding (B, D) -> (B, D), statistics in float32.

One that looks beyond a single row writes `rows` into the signature of its `__call__(x, rows)`, and is told which rows
are valid and whether this is training. Running statistics are an `nnx.Variable` that is no parameter: it moves in
training alone, and trainer and checkpoints carry it; `backward.Backward` is one for statistics of gradients.
"""
