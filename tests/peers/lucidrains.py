"""Small packages of one layer each. Every function imports its own, so that one that is missing hides no other."""

# pyright: reportMissingImports=false

import torch

from peers._small import qkv, small, weights


def _layer(layer, *shape: int, **meta) -> dict:
    """A layer with weights, on one input."""
    x = torch.randn(shape)
    return weights(small(layer)) | {"meta": meta, "x": x, "y": layer(x)}


def linformer_basic() -> dict:
    from linformer import LinformerSelfAttention

    return _layer(LinformerSelfAttention(32, seq_len=24, k=6, heads=4), 2, 24, 32, k=6, heads=4)


def linformer_sharedkv() -> dict:
    from linformer import LinformerSelfAttention

    shared = {"share_kv": True, "one_kv_head": True}
    return _layer(LinformerSelfAttention(32, seq_len=24, k=6, heads=4, **shared), 2, 24, 32, k=6, heads=4, **shared)


def nystrom_lucidrains() -> dict:
    from nystrom_attention import NystromAttention

    meta = {"heads": 4, "dim_head": 8, "num_landmarks": 8, "pinv_iterations": 6}
    return _layer(NystromAttention(32, residual=False, **meta), 2, 32, 32, **meta)


def axial_attention_sum() -> dict:
    from axial_attention import AxialAttention

    return _layer(AxialAttention(16, num_dimensions=2, heads=2, sum_axial_out=True), 2, 5, 6, 16, heads=2)


def _local(causal: bool) -> dict:
    from local_attention import LocalAttention

    case = qkv((2, 4, 24, 16))
    layer = LocalAttention(window_size=4, causal=causal, use_rotary_pos_emb=False)  # one window back and, if not, ahead
    return case | {"meta": {"window_size": 4, "causal": causal}, "y": layer(*case.values())}


def local_attention_bidir() -> dict:
    return _local(causal=False)


def local_attention_causal() -> dict:
    return _local(causal=True)


def shen_linear_attention() -> dict:
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn, linear_attn

    case = qkv((2, 4, 24, 16))
    return case | {"y": linear_attn(*case.values()), "y_causal": causal_linear_attn(*case.values(), bucket_size=6)}
