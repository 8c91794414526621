"""Token by token through a whole model gives the logits of the causal pass, for every mechanism that can decode."""

import functools

import jax.numpy as jnp
import kinds
import pytest
from decoded import agree, model_of

from xformers_lab import spec
from xformers_lab.attention import why_not_decode

pytestmark = pytest.mark.full

DECODABLE = [name for name in spec.names("attention") if why_not_decode(spec.entry("attention", name)) is None]


@pytest.mark.parametrize("name", kinds.one_of_each_kind(DECODABLE))
def test_mechanism(name):
    agree(*model_of(name))


@pytest.mark.parametrize("changes", kinds.every_third([
    {"position": "rope"}, {"position": "alibi"}, {"position": "t5"}, {"position": "sinusoidal"},
    {"position": "shaw"}, {"position": "xl"}, {"position": "deberta"}, {"position": "tupe"}, {"position": "conv"},
    {"position": "rope+none", "layers": 4}, {"position": "deberta+rope+alibi", "attention": "full+local:window=3"},
    {"position": "rope:scaling=yarn:scale=2:trained=8:turned=0.5"},
    {"position": "rope+none", "depth": "mixture_of_depths"},
    {"position": "grid"}, {"position": "grid:width=4"},
    {"attention": "lazyformer", "position": "deberta"}, {"attention": "predictive", "position": "tupe"},
    {"attention": "rwkv:shift=input", "ffn": "rwkv"}, {"attention": "rwkv:shift=input", "conv": 3},
    {"norm": "post"}, {"norm": "normformer"}, {"ffn": "hash"}, {"depth": "macaron"}, {"depth": "transparent"},
    {"norm": "residual_dual"}, {"norm": "hyper_connections:count=3", "embed_norm": "rmsnorm", "depth": "transparent"},
    {"position": "fire:threshold=6", "norm": "layerscale"},
    {"norm": "sandwich:normaliser=rmsnorm"}, {"norm": "deepnorm"}, {"ffn": "glu"}, {"ffn": "none"},
    {"attention": "full+local:window=3+linear", "layers": 5}, {"layers": 12},
]), ids=str)  # fmt: skip
def test_other_axes(changes):
    agree(*model_of(**({"attention": "full"} | changes)))


@pytest.mark.parametrize("name", sorted(set(spec.names("attention")) - set(DECODABLE)))
def test_what_cannot_decode_says_why(name):
    mechanism = spec.build("attention", name, length=20, dim=32, heads=4)
    with pytest.raises(ValueError, match="cannot"):
        mechanism.decode(jnp.ones((1, 32)), functools.partial(dict), at=jnp.zeros((), jnp.int32))
