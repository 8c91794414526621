"""A kernel on several devices: what the compiler cannot partition runs as a program of each."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from xformers_lab.layouts import ROWS, TENSOR
from xformers_lab.nn import on_mesh


def by_device(run: Callable, q, k, v, valid, documents, *, alike: bool):
    """run(q, k, v, valid=..., documents=...) of q (B, T, N, H), k and v (B, S, K, ...), valid and documents (B, S) or
    None, by each device on its share of the sequences and, where heads are alike, of the heads. -> (B, T, N, ...)"""
    if not on_mesh.any_shared():
        return run(q, k, v, valid=valid, documents=documents)
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = ROWS if len(q) % math.prod(sizes[axis] for axis in ROWS) == 0 else None
    heads = TENSOR if alike and k.shape[2] % sizes[TENSOR] == 0 else None
    of_heads, of_tokens = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    of_each = lambda x: None if x is None else of_tokens
    local = lambda q, k, v, valid, documents: run(q, k, v, valid=valid, documents=documents)
    specs = (of_heads, of_heads, of_heads, of_each(valid), of_each(documents))
    return jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)(q, k, v, valid, documents)
