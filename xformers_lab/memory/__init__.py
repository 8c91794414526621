"""The shelf of memories: what survives from one segment to the next. One file = one class or function.

`none` returns None. A memory will hand each layer the keys' source of past segments, (B, M, D), to stand before the
current one; attention is aligned at the end, so every mechanism that takes T != S takes it.
"""
