"""The short convolution is numpy's, sees what it may see, and goes on token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.short_conv import ShortConv

B, T, C = 2, 9, 5
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, C)), jnp.float32)


def drawn(width: int, causal: bool = True) -> ShortConv:
    return ShortConv(C, width, causal=causal, kernel_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("width", "causal"), [(2, True), (4, True), (12, True), (3, False), (11, False)])
def test_it_is_the_convolution_of_every_channel(width, causal):
    conv = drawn(width, causal)
    weights, behind = np.asarray(conv.weights[...]), 0 if causal else width // 2
    for b in range(B):
        for c in range(C):
            whole = np.convolve(np.asarray(X)[b, :, c], weights[::-1, c])
            np.testing.assert_allclose(conv(X)[b, :, c], whole[behind : behind + T], atol=1e-5)


def test_a_causal_one_sees_nothing_after_a_position():
    seen = jax.jacobian(lambda x: drawn(4)(x[None, :, None] * jnp.ones(C))[0, :, 0])(jnp.ones(T))
    at = np.arange(T)
    np.testing.assert_array_equal(seen != 0, (at[None] <= at[:, None]) & (at[None] > at[:, None] - 4))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_counts_as_what_is_not_there(causal):
    conv, valid = drawn(5, causal), jnp.tile(jnp.arange(T) < 6, (B, 1))
    np.testing.assert_allclose(conv(X, valid=valid)[:, :6], conv(X[:, :6]), atol=1e-6)
    np.testing.assert_allclose(conv(X, valid=valid[:, ::-1])[:, 3:], conv(X[:, 3:]), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_apart(causal):
    conv, lengths = drawn(5, causal), (1, 2, 6)
    documents = jnp.tile(jnp.repeat(jnp.arange(3), jnp.asarray(lengths)), (B, 1))
    alone = [conv(x) for x in jnp.split(X, np.cumsum(lengths)[:-1], 1)]
    np.testing.assert_allclose(conv(X, documents=documents), jnp.concatenate(alone, 1), atol=1e-6)


@pytest.mark.parametrize("width", [2, 4, 12])
def test_steps_are_the_convolution(width):
    conv = drawn(width)
    whole, tail = conv(X), conv.init_tail(B)
    first, tail = conv.step_several(tail, X[:, :3])
    np.testing.assert_allclose(first, whole[:, :3], atol=1e-6)
    for t in range(3, T):
        y, tail = conv.step(tail, X[:, t])
        np.testing.assert_allclose(y, whole[:, t], atol=1e-6)


def test_it_begins_as_primer_does():
    np.testing.assert_array_equal(ShortConv(1, 4).weights[...][:, 0], [1 / 8, 1 / 8, 1 / 8, 1 / 2])
    np.testing.assert_allclose(ShortConv(1, 3, causal=False).weights[...][:, 0], [1 / 6, 1 / 2, 1 / 6])


def test_half_numbers_are_summed_in_whole_ones():
    half = X.astype(jnp.bfloat16)
    y = drawn(4)(half)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, drawn(4)(half.astype(jnp.float32)).astype(jnp.bfloat16))


def test_it_refuses_what_is_no_neighbourhood():
    with pytest.raises(Refused, match="use 3"):
        ShortConv(C, 1)
    with pytest.raises(Refused, match="use 5"):
        ShortConv(C, 4, causal=False)
    with pytest.raises(Refused, match="sees both sides cannot go on"):
        drawn(3, causal=False).step(jnp.zeros((B, 1, C)), X[:, 0])
