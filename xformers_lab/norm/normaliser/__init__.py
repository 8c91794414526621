"""The shelf of normalisers: (B, T, D) -> (B, T, D), in decoding (B, D) -> (B, D), statistics in float32.

One that looks beyond a single row writes `context` into the signature of its `__call__(x, context)`, which says which
rows are valid and whether this is training (see nn/layer_context.py). Running statistics are an `nnx.Variable` that is
no parameter: it moves in training alone, and trainer and checkpoints carry it; `nn.backward.Backward` is one for
statistics of gradients.
"""
