"""transformers: whole models of two layers, and the losses of a router."""

# pyright: reportMissingImports=false

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from peers._small import small, weights


def _tokens() -> torch.Tensor:
    return torch.randint(2, 50, (2, 16))


def tiny_gpt2() -> dict:
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model, ids = small(GPT2LMHeadModel(config)), _tokens()
    return weights(model) | {"ids": ids, "logits": model(ids).logits}


def tiny_llama() -> dict:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, ids = small(LlamaForCausalLM(config)), _tokens()
    return weights(model) | {"ids": ids, "logits": model(ids).logits}


def tiny_rwkv4() -> dict:
    config = RwkvConfig(
        vocab_size=50, context_length=32, hidden_size=32, num_hidden_layers=2, intermediate_size=48, rescale_every=0
    )
    model, ids = small(RwkvForCausalLM(config)), _tokens()
    return weights(model) | {"ids": ids, "logits": model(ids).logits}


def tiny_albert_shared() -> dict:
    config = AlbertConfig(
        vocab_size=50,
        max_position_embeddings=32,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu_new",
    )
    model, ids = small(AlbertModel(config)), _tokens()
    return weights(model) | {"ids": ids, "hidden": model(ids).last_hidden_state}


def tiny_vit() -> dict:
    config = ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config.num_labels = 5
    model, x = small(ViTForImageClassification(config)), torch.randn(2, 1, 12, 12)
    return weights(model) | {"x": x, "logits": model(x).logits}


def switch_router_losses() -> dict:
    logits = torch.randn(2, 16, 4)
    probs = logits.softmax(-1)
    losses = {
        "z_loss": switch.router_z_loss_func(logits),
        "aux_loss": switch.load_balancing_loss_func(probs, probs.argmax(-1)),
    }
    return {"logits": logits, "probs": probs, "expert": probs.argmax(-1), **losses}
