"""Whole models of other implementations, their weights put into models that are built of choices on the shelves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stacks import layer

from xformers_lab.config import Config, edit
from xformers_lab.model import build_model
from xformers_lab.tasks import Setting, Task

# The golden files do not name the number of heads; a head of 8 channels reproduces them, others do not.
HEADS = 4


class Words(Task):
    """A task that only says how many symbols there are."""

    kinds = ("decoder", "encoder")

    def __init__(self, vocab: int, outputs: int):
        super().__init__(Setting(32, 1))
        self.vocab, self.outputs = vocab, outputs


class Weights:
    """The arrays of one peer; `w(name)` one weight, `w(name with {})` that of every layer, stacked.

    PyTorch's linear layers hold (out, in): `linear` gives (in, out) and the bias; `transposed=False` leaves them.
    """

    def __init__(self, arrays: dict, layers: int | None):
        self.arrays, self.layers = arrays, layers

    def __getitem__(self, name: str):
        return self.arrays[name]

    def __call__(self, name: str):
        if "{}" not in name:
            return jnp.asarray(self.arrays[f"w.{name}"])
        return jnp.stack([self.arrays[f"w.{name.format(layer)}"] for layer in range(self.layers or 0)])

    def has(self, name: str) -> bool:
        return f"w.{name.format(0)}" in self.arrays

    def linear(self, name: str, transposed: bool = True) -> tuple[Any, Any]:
        kernel, bias = self(f"{name}.weight"), self(f"{name}.bias") if self.has(f"{name}.bias") else None
        return jnp.swapaxes(kernel, -1, -2) if transposed else kernel, bias


def put(module: Any, **arrays) -> None:
    """Gives a module other parameters."""
    for name, array in arrays.items():
        if array is not None:
            old = getattr(module, name)
            assert old is None or old.shape == array.shape, f"{name}: {old.shape} here, {array.shape} there"
            setattr(module, name, nnx.Param(array))


def put_linear(module, linear) -> None:
    """(kernel, bias or None); the bias of the projections of attention is one that the lab's own do not have."""
    kernel, bias = linear
    put(module, kernel=kernel, bias=bias)
    module.use_bias = bias is not None


def put_attention(attention, *projections) -> None:
    """(kernel, bias or None) of query, key, value and output."""
    for name, linear in zip(("query", "key", "value", "out"), projections, strict=True):
        put_linear(getattr(attention, name), linear)


def put_norm(norm, w: Weights, name: str, epsilon: float = 1e-6) -> None:
    """Scale, shift where there is one, and the number that keeps the root above 0."""
    put(norm, scale=w(f"{name}.weight"), **({"bias": w(f"{name}.bias")} if w.has(f"{name}.bias") else {}))
    norm.epsilon = epsilon


def build(vocab: int, outputs: int, task: type[Words] = Words, **chosen) -> Any:
    config = edit(Config(), **({"seq_len": 32, "dim": 32, "heads": HEADS} | chosen))
    return build_model(config, task(vocab, outputs))


def put_tokens(model, table) -> None:
    """Embeddings that are used as they are, as these models' are: not multiplied up to unit size, nor is the sum with
    positions divided by sqrt(3/2) (see nn/embedding.py)."""
    put(model.embedding, embedding=table)
    model.embedding.scale = model.embedding.share = 1.0


def put_positions(model, table) -> None:
    """`put_tokens` for learned positions, which come after it."""
    put(model.position, table=table)
    model.position.scale, whole = 1.5**0.5, model.embedding
    if hasattr(whole, "scale"):
        whole.scale = 1.5**0.5
    else:
        project, token = whole.project, whole.token
        put_linear(project, (1.5**0.5 * project.kernel[...], 1.5**0.5 * project.bias[...]))
        put(whole, token=1.5**0.5 * token[...])


def run(model, inputs):
    """Logits of one call, compiled cheaply."""
    graph, variables = nnx.split(model)
    return np.asarray(jax.jit(lambda variables, x: nnx.merge(graph, variables)(x)[0])(variables, jnp.asarray(inputs)))


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)


def assert_far(actual, expected):
    """At least ten times as far as the comparison above allows."""
    assert (np.abs(actual - expected) / (2e-5 + 1e-4 * np.abs(expected))).max() > 10


# ---- GPT-2: pre-LN, learned positions, tied embeddings ---------------------------------------------------------------


def gpt2(w: Weights, **changed):
    chosen = {
        "model": "decoder:tied=true",
        "attention": "full",
        "position": "learned",
        "norm": "pre:normaliser=layernorm",
        "ffn": "mlp:activation=gelu",
        "layers": 2,
    }
    model = build(50, 50, **(chosen | changed))
    block = model.stack.periods[0]
    put_tokens(model, w("transformer.wte.weight"))
    if "position" not in changed:
        put_positions(model, w("transformer.wpe.weight"))
    kernel, bias = w.linear("transformer.h.{}.attn.c_attn", transposed=False)
    three = zip(jnp.split(kernel, 3, -1), jnp.split(bias, 3, -1), strict=True)
    put_attention(block.attention, *three, w.linear("transformer.h.{}.attn.c_proj", transposed=False))
    put_linear(block.ffn.up, w.linear("transformer.h.{}.mlp.c_fc", transposed=False))
    put_linear(block.ffn.down, w.linear("transformer.h.{}.mlp.c_proj", transposed=False))
    put_norm(block.attention_norm.norm, w, "transformer.h.{}.ln_1", 1e-5)
    put_norm(block.ffn_norm.norm, w, "transformer.h.{}.ln_2", 1e-5)
    if model.final is not None:
        put_norm(model.final.norm, w, "transformer.ln_f", 1e-5)
    return run(model, w["ids"])


def test_gpt2(golden):
    w = Weights(golden("tiny_gpt2"), 2)
    assert_same(gpt2(w), w["logits"])
    for changed in (
        {"norm": "post"},
        {"position": "none"},
        {"ffn": "mlp:activation=relu"},
        {"model": "encoder:tied=true"},
        {"heads": 8},
    ):
        assert_far(gpt2(w, **changed), w["logits"])


# ---- Llama: RMSNorm, rotary positions, gated linear units, shared key/value heads ------------------------------------


def llama(w: Weights, **changed):
    chosen = {
        "model": "decoder",
        "attention": "full",
        "position": "rope",
        "norm": "pre:normaliser=rmsnorm",
        "ffn": "glu:ratio=1.5:activation=silu",
        "kv_heads": 2,
        "layers": 2,
    }
    model = build(50, 50, **(chosen | changed))
    block, layer = model.stack.periods[0], "model.layers.{}"
    put_tokens(model, w("model.embed_tokens.weight"))
    put(model.head, kernel=w("lm_head.weight").T, bias=jnp.zeros(50))
    put_attention(block.attention, *(w.linear(f"{layer}.self_attn.{name}_proj") for name in "qkvo"))
    for name in ("gate", "up", "down"):
        put_linear(getattr(block.ffn, name), w.linear(f"{layer}.mlp.{name}_proj"))
    put_norm(block.attention_norm.norm, w, f"{layer}.input_layernorm")
    put_norm(block.ffn_norm.norm, w, f"{layer}.post_attention_layernorm")
    if model.final is not None:
        put_norm(model.final.norm, w, "model.norm")
    return run(model, w["ids"])


@pytest.mark.full
def test_llama(golden):
    w = Weights(golden("tiny_llama"), 2)
    assert_same(llama(w), w["logits"])
    for changed in (
        {"norm": "post:normaliser=rmsnorm"},
        {"position": "none"},
        {"position": "rope:pairs=interleaved"},
        {"ffn": "glu:ratio=1.5:activation=gelu"},
        {"model": "encoder"},
    ):
        assert_far(llama(w, **changed), w["logits"])


# ---- RWKV-4: token shifts of inputs, in attention and in the feed-forward layer --------------------------------------


def rwkv4(w: Weights, **changed):
    chosen = {
        "attention": "rwkv:shift=input",
        "position": "none",
        "norm": "pre:normaliser=layernorm",
        "embed_norm": "layernorm",
        "ffn": "rwkv:ratio=1.5",
        "layers": 2,
    }
    model = build(50, 50, **(chosen | changed))
    block = model.stack.periods[0]
    put_tokens(model, w("rwkv.embeddings.weight"))
    put_norm(model.embed_norm, w, "rwkv.blocks.0.pre_ln", 1e-5)
    names = [f"rwkv.blocks.{{}}.attention.{name}" for name in ("receptance", "key", "value", "output")]
    put_attention(block.attention, *map(w.linear, names))
    heads = lambda name: w(f"rwkv.blocks.{{}}.attention.{name}").reshape(2, HEADS, -1)
    put(block.attention, decay=heads("time_decay"), bonus=heads("time_first"))
    put_shift(block, "attention", "token_shift", w, {"query": "receptance", "key": "key", "value": "value"})
    put_norm(block.attention_norm.norm, w, "rwkv.blocks.{}.ln1", 1e-5)
    put_norm(block.ffn_norm.norm, w, "rwkv.blocks.{}.ln2", 1e-5)
    if "ffn" not in changed:
        for here, there in {"up": "key", "down": "value", "receptance": "receptance"}.items():
            put_linear(getattr(block.ffn, here), w.linear(f"rwkv.blocks.{{}}.feed_forward.{there}"))
        put_shift(block, "ffn", "shift", w, {"key": "key", "receptance": "receptance"})
    put_norm(model.final.norm, w, "rwkv.ln_out", 1e-5)
    put(model.head, kernel=w.linear("head")[0])
    return model


def put_shift(block, part: str, at: str, w: Weights, names: dict[str, str]) -> None:
    """Mixes of the layers of a block, which has learned nothing yet: a parameter is what is added to the first ones."""
    there = {"attention": "attention", "ffn": "feed_forward"}[part]
    first = [getattr(getattr(layer(block, number), part), at) for number in range(2)]
    shift = getattr(getattr(block, part), at)
    for name, peer in names.items():
        mixes = w(f"rwkv.blocks.{{}}.{there}.time_mix_{peer}").reshape(2, -1)
        put(shift, **{name: mixes - jnp.stack([one.share(name) for one in first])})


def test_rwkv4(golden):
    """Also token by token, a prompt of four at once."""
    w = Weights(golden("tiny_rwkv4"), layers=2)
    model, ids = rwkv4(w), jnp.asarray(w["ids"])
    assert_same(run(model, ids), w["logits"])
    graph, variables = nnx.split(model)

    @jax.jit
    def steps(variables, ids):
        one = lambda cache, token: nnx.merge(graph, variables).step(cache, token)[::-1]
        first, cache = nnx.merge(graph, variables).step_several(model.init_cache(*ids.shape), ids[:, :4])
        return jnp.concatenate([first[None], jax.lax.scan(one, cache, ids[:, 4:].T)[1]])

    assert_same(steps(variables, ids).swapaxes(0, 1), w["logits"][:, 3:])
    for block in model.stack.periods:
        block.ffn.shift.key[...] = jnp.zeros_like(block.ffn.shift.key[...])
    assert_far(run(model, ids), w["logits"])


# ---- ALBERT: one post-LN layer, applied four times -------------------------------------------------------------------


class Factorised(nnx.Module):
    """ALBERT's input layer: narrow embeddings of word, place and segment 0, normalised, then projected."""

    def __init__(self, w: Weights):
        names = ("word", "position", "token_type")
        self.words, self.places, self.kinds = (w(f"embeddings.{name}_embeddings.weight") for name in names)
        self.scale, self.shift = w("embeddings.LayerNorm.weight"), w("embeddings.LayerNorm.bias")
        self.kernel, self.bias = w.linear("encoder.embedding_hidden_mapping_in")

    def __call__(self, ids):
        x = self.words[ids] + (self.places[: ids.shape[1]] + self.kinds[:1])[None]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return (x * self.scale[None, None] + self.shift[None, None]) @ self.kernel + self.bias[None, None]


def albert(w: Weights, **changed):
    """Hidden states: the head is the identity."""
    chosen = {
        "model": "encoder",
        "attention": "full",
        "position": "none",
        "norm": "post:normaliser=layernorm",
        "ffn": "mlp:ratio=2:activation=gelu",
        "depth": "universal:code=false",
        "layers": 4,
    }
    model = build(50, 32, **(chosen | changed))
    block, layer = model.stack.blocks[0], "encoder.albert_layer_groups.0.albert_layers.0"
    model.embedding = Factorised(w)
    put(model.head, kernel=jnp.eye(32), bias=jnp.zeros(32))
    put_attention(
        block.attention, *(w.linear(f"{layer}.attention.{name}") for name in ("query", "key", "value", "dense"))
    )
    put_linear(block.ffn.up, w.linear(f"{layer}.ffn"))
    put_linear(block.ffn.down, w.linear(f"{layer}.ffn_output"))
    put_norm(block.attention_norm.norm, w, f"{layer}.attention.LayerNorm", 1e-12)
    put_norm(block.ffn_norm.norm, w, f"{layer}.full_layer_layer_norm", 1e-12)
    return run(model, w["ids"])


def test_albert(golden):
    w = Weights(golden("tiny_albert_shared"), None)
    assert_same(albert(w), w["hidden"])
    for changed in ({"norm": "pre"}, {"depth": "universal"}, {"layers": 3}, {"heads": 8}):
        assert_far(albert(w, **changed), w["hidden"])


# ---- ViT: patches and a class token ----------------------------------------------------------------------------------


class Squares(Words):
    """Images of 12 x 12 grey levels, in five classes."""

    target = "sequence"
    kinds = ("encoder",)
    image = (12, 12)


def vit(w: Weights, pixels=None, **changed):
    chosen = {
        "model": "vit:patch=4",
        "attention": "full",
        "position": "learned",
        "norm": "pre:normaliser=layernorm",
        "ffn": "mlp:ratio=2:activation=gelu_exact",
        "layers": 2,
        "seq_len": 144,
    }
    model = build(256, 5, task=Squares, **(chosen | changed))
    block, layer = model.stack.periods[0], "vit.layers.{}"
    kernel, bias = w.linear("vit.embeddings.patch_embeddings.projection", transposed=False)
    put_linear(model.embedding.project, (kernel.reshape(32, 16).T, bias))
    if model.embedding.token is not None:
        put(model.embedding, token=w("vit.embeddings.cls_token")[0, 0])
        if "position" not in changed:
            put_positions(model, w("vit.embeddings.position_embeddings")[0])
    put_linear(model.head, w.linear("classifier"))
    put_attention(block.attention, *(w.linear(f"{layer}.attention.{name}_proj") for name in "qkvo"))
    put_linear(block.ffn.up, w.linear(f"{layer}.mlp.fc1"))
    put_linear(block.ffn.down, w.linear(f"{layer}.mlp.fc2"))
    put_norm(block.attention_norm.norm, w, f"{layer}.layernorm_before", 1e-12)
    put_norm(block.ffn_norm.norm, w, f"{layer}.layernorm_after", 1e-12)
    if model.final is not None:
        put_norm(model.final.norm, w, "vit.layernorm", 1e-12)
    # The golden images are real numbers, the lab's are levels, which its first layer divides by the largest.
    pixels = w["x"] if pixels is None else pixels
    return run(model, 255 * pixels.reshape(len(pixels), -1))


def test_vit(golden):
    w = Weights(golden("tiny_vit"), 2)
    assert_same(vit(w), w["logits"])
    assert_far(vit(w, w["x"].swapaxes(2, 3)), w["logits"])
    for changed in ({"norm": "post"}, {"position": "none"}, {"model": "vit:patch=4:pool=mean"}, {"heads": 8}):
        assert_far(vit(w, **changed), w["logits"])
