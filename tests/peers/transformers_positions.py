"""transformers: what models add to or do with positions."""

# pyright: reportMissingImports=false

import torch
from transformers import GemmaConfig, LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.gemma import modeling_gemma
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from peers._small import qkv


def alibi() -> dict:
    case, seen = {}, torch.ones(1, 16)
    for heads in (1, 2, 4, 6, 8, 12, 16, 20):
        bias = build_alibi_tensor(seen, heads, torch.float32)[:, 0]
        case |= {f"bloom_{heads}": bias, f"slopes_{heads}": bias[:, 1]}
    return case | {f"mpt_{heads}": build_mpt_alibi_tensor(heads, 16) for heads in (4, 8, 12, 16)}


def deberta_log_bucket() -> dict:
    ahead = torch.arange(-200, 201)
    bucket = lambda size, reach: make_log_bucket_position(ahead, size, reach)
    return {"rel": ahead, "b_16_64": bucket(16, 64), "b_256_512": bucket(256, 512)}


def rope() -> dict:
    case = {name: x for name, x in qkv((2, 4, 12, 16)).items() if name != "v"}
    q, k = case.values()
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, torch.arange(12)[None])
    case["q_half"], case["k_half"] = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    sin, cos = modeling_gptj.create_sinusoidal_positions(12, 16)[None].chunk(2, -1)
    # GPT-J has time before heads.
    case["q_interleaved"] = modeling_gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin, cos).transpose(1, 2)
    return case


def rope_gemma_fixture() -> dict:
    """Ones at position 1 and, in the second sample, 0. The file has another layout of Gemma's, which no test reads."""
    rotary = {"rope_type": "default", "rope_theta": 100.0}
    config = GemmaConfig(hidden_size=4, num_attention_heads=1, head_dim=4, rope_parameters=rotary)
    ones = torch.ones(2, 1, 2, 4)  # (B, L, N, H)
    cos, sin = modeling_gemma.GemmaRotaryEmbedding(config)(ones, torch.tensor([[1], [0]]))
    return {"expected_full": modeling_gemma.apply_rotary_pos_emb(ones, ones, cos, sin, unsqueeze_dim=2)[0]}
