"""transformers: recurrences and decays, in the forms that run without kernels."""

# pyright: reportMissingImports=false

import torch
from transformers import MambaConfig, MiniMaxConfig, RecurrentGemmaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from peers._small import small, weights


def rwkv4_wkv() -> dict:
    decay, first, k, v = (torch.randn(shape) for shape in ((8,), (8,), (2, 16, 8), (2, 16, 8)))
    y, _ = rwkv_linear_attention_cpu(decay, first, k, v)
    return {"time_decay": decay, "time_first": first, "k": k, "v": v, "y": y}


def minimax_lightning_attention() -> dict:
    config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_hidden_layers=2,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
    )
    layer, x = small(MiniMaxLightningAttention(config, layer_idx=0)), torch.randn(2, 20, 32)
    y, _ = layer(x, position_embeddings=None, attention_mask=None)
    return weights(layer) | {"meta": {"heads": 4}, "x": x, "slope_rate": layer.slope_rate, "y": y}


def mamba1_mixer() -> dict:
    config = MambaConfig(hidden_size=16, expand=2, state_size=4, conv_kernel=4, time_step_rank=2)
    layer, x = MambaMixer(config, layer_idx=0), torch.randn(2, 14, 16)
    decay = layer.A_log.clone()
    small(layer).A_log.copy_(decay)  # rates of 1 to 4, as it starts
    return weights(layer) | {"x": x, "y": layer(x)}


def rglru() -> dict:
    layer = small(RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=16, lru_width=16, num_attention_heads=4)))
    x, position_ids = torch.randn(2, 12, 16), torch.arange(12).expand(2, 12)
    return weights(layer) | {"x": x, "position_ids": position_ids, "y": layer(x, position_ids)}
