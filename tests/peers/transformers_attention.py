"""transformers: attention layers, and a layer in place of attention."""

# pyright: reportMissingImports=false

import types

import torch
from transformers import FNetConfig, LongT5Config, NystromformerConfig, ReformerConfig, YosoConfig
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.longt5 import modeling_longt5
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
from transformers.models.reformer.modeling_reformer import LocalSelfAttention
from transformers.models.yoso.modeling_yoso import YosoSelfAttention

from peers._small import qkv, small, weights

CAUSAL = torch.full((1, 1, 9, 9), float("-inf")).triu(1)


def fnet_fourier() -> dict:
    x = torch.randn(2, 20, 24)
    return {"x": x, "y": FNetBasicFourierTransform(FNetConfig(hidden_size=24))(x)[0]}


def softcap_gemma2() -> dict:
    case = qkv((2, 4, 9, 8), (2, 2, 9, 8))
    layer = types.SimpleNamespace(head_dim=8, num_key_value_groups=2, training=False)
    y, _ = modeling_gemma2.eager_attention_forward(layer, *case.values(), CAUSAL, softcap=5.0)  # type: ignore
    return case | {"y": y}


def attention_sinks_gptoss() -> dict:
    case, sinks = qkv((2, 4, 9, 8), (2, 2, 9, 8)), 0.4 * torch.randn(4)
    layer = types.SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    y, attn = modeling_gpt_oss.eager_attention_forward(layer, *case.values(), CAUSAL, scaling=8**-0.5)  # type: ignore
    return case | {"sinks": sinks, "y": y, "attn": attn}


def longt5_local() -> dict:
    config = LongT5Config(d_model=32, d_kv=8, num_heads=4, local_radius=3)
    layer = small(modeling_longt5.LongT5LocalAttention(config, has_relative_attention_bias=True))
    x = torch.randn(2, 24, 32)
    near = modeling_longt5._get_local_attention_mask(torch.ones(2, 24), layer.block_len, x.device)
    return weights(layer) | {"meta": {"local_radius": 3}, "x": x, "y": layer(x, mask=near)[0]}


def longt5_transient_global() -> dict:
    """Two samples, the second with an end of padding, and positions behind the last whole block in both."""
    meta = {"window": 3, "block": 4}
    config = LongT5Config(
        d_model=32,
        d_kv=8,
        num_heads=4,
        local_radius=meta["window"],
        global_block_size=meta["block"],
        encoder_attention_type="transient-global",
    )
    layer = small(modeling_longt5.LongT5TransientGlobalAttention(config, has_relative_attention_bias=True))
    x, valid = torch.randn(2, 27, 32), torch.ones(2, 27)
    valid[1, 18:] = 0
    return weights(layer) | {"meta": meta, "x": x, "valid": valid, "y": layer(x, mask=valid)[0]}


def _reformer(causal: bool) -> dict:
    meta = {"chunk": 8, "before": 1, "after": 0}
    config = ReformerConfig(
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=16,
        local_attn_chunk_length=meta["chunk"],
        local_num_chunks_before=meta["before"],
        local_num_chunks_after=meta["after"],
        is_decoder=causal,
    )
    layer, x = small(LocalSelfAttention(config)), torch.randn(2, 64, 32)
    return weights(layer) | {"meta": meta, "x": x, "y": layer(x).hidden_states}


def reformer_local_bidir() -> dict:
    return _reformer(causal=False)


def reformer_local_causal() -> dict:
    return _reformer(causal=True)


def nystromformer_noconv() -> dict:
    meta = {"heads": 4, "num_landmarks": 8}
    config = NystromformerConfig(
        hidden_size=32,
        num_attention_heads=meta["heads"],
        num_landmarks=meta["num_landmarks"],
        segment_means_seq_len=32,
    )
    layer, x = small(NystromformerSelfAttention(config)), torch.randn(2, 32, 32)
    layer.conv_kernel_size = None  # the config would refuse None
    del layer.conv
    middle = torch.randn(2, 4, 8, 8).softmax(-1)
    pinv = layer.iterative_inv(middle, 6)
    return weights(layer) | {"meta": meta, "x": x, "y": layer(x)[0], "mat": middle, "pinv": pinv}


def yoso_expectation() -> dict:
    meta = {"heads": 4, "hash_code_len": 9}
    config = YosoConfig(
        hidden_size=32,
        num_attention_heads=meta["heads"],
        hash_code_len=meta["hash_code_len"],
        use_expectation=True,
        conv_window=None,
    )
    layer, x = small(YosoSelfAttention(config)), torch.randn(2, 16, 32)
    return weights(layer) | {"meta": meta, "x": x, "y": layer(x, attention_mask=torch.zeros(2, 16))[0]}
