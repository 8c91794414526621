"""torch: attention as PyTorch itself has it."""

# pyright: reportMissingImports=false

import torch

from peers._small import qkv, small, weights


def dense_mha() -> dict:
    layer = small(torch.nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 12, 32)
    ignored = torch.arange(12)[None] >= torch.tensor([12, 9])[:, None]
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    y, attn = layer(x, x, x, average_attn_weights=False)
    return weights(layer) | {
        "meta": {"heads": 4},
        "x": x,
        "kpm": ignored,
        "y": y,
        "attn": attn,
        "y_padded": layer(x, x, x, key_padding_mask=ignored)[0],
        "y_causal": layer(x, x, x, attn_mask=future)[0],
    }


def sdpa_gqa() -> dict:
    attend = torch.nn.functional.scaled_dot_product_attention
    case = qkv((2, 8, 10, 16), (2, 2, 14, 16)) | {"q_causal": torch.randn(2, 8, 14, 16)}
    q, k, v, q_causal = case.values()
    case["y"] = attend(q, k, v, enable_gqa=True)
    case["y_causal"] = attend(q_causal, k, v, enable_gqa=True, is_causal=True)
    return case
