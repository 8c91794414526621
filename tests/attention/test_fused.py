"""The fused kernel is chosen only where it is right, and what it is asked computes the mechanism's definition.

No GPU is needed: the call that cuDNN would get is run by XLA instead, which has the same signature.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.attention._engine import fused, kernels
from xformers_lab.attention._engine.pattern import All
from xformers_lab.errors import Refused


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    calls = []
    original = jax.nn.dot_product_attention

    def record(*arrays, **options):
        calls.append(options)
        return original(*arrays, **{**options, "implementation": "xla"})

    monkeypatch.setattr(fused, "nvidia", lambda: True)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setitem(kernels.OF_PLATFORM, "gpu", ("cudnn",))
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


def arrays(T=24, S=24, N=4, K=2, H=8, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, n, h, H), dtype) for key, n, h in zip(keys, (T, S, S), (N, K, K), strict=True)]


@pytest.mark.parametrize("choice, causal", [("full", False), ("full", True), ("local:window=5", True)])
def test_fused_call_computes_the_definition_and_leaks_nothing(as_if_on_gpu, choice, causal):
    mechanism = spec.build("attention", choice, length=24, dim=32, heads=4, kv_heads=2)
    q, k, v = arrays()
    out = mechanism.mix(q, k, v, causal=causal)[0]
    assert len(as_if_on_gpu) == 1 and as_if_on_gpu[0]["implementation"] == "cudnn"
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = mechanism.mix(*wide, causal=causal, method="reference")[0]
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
    if causal:
        grad = jax.grad(lambda v: mechanism.mix(q, k, v, causal=True)[0][:, 10].astype(jnp.float32).sum())(v)
        assert not np.asarray(grad[:, 11:].astype(jnp.float32)).any()
        assert as_if_on_gpu[-1]["is_causal"] is True


def test_calls_that_cudnn_would_get_wrong_stay_with_the_engine(as_if_on_gpu):
    full = spec.build("attention", "full", length=24, dim=32, heads=4)
    local = spec.build("attention", "local:window=5", length=24, dim=32, heads=4)
    q, k, v = arrays(K=4)
    full.mix(q, k, v, valid=jnp.ones((2, 24), bool))
    full.mix(q[:, :5], k, v, causal=True)
    full.mix(*arrays(K=4, dtype=jnp.float32))
    full.mix(*arrays(K=4, H=12))
    local.mix(q, k, v, causal=False)
    assert as_if_on_gpu == []


def test_on_cpu_the_engine_runs():
    q, k, v = arrays()
    asked = kernels.asked(q, k, v, [All()])
    assert kernels.chosen(asked) is None
    assert "and this is a cpu" in (fused.why_not(asked) or "")
    assert "no NVIDIA GPU" in (fused.why_not(dataclasses.replace(asked, platform="gpu")) or "")
    with pytest.raises(Refused, match="kernel=cudnn: it is for NVIDIA GPUs"):
        kernels.chosen(asked, "cudnn")


@pytest.mark.parametrize("per", ["channel", "head"])
def test_a_gate_stands_behind_the_fused_kernel(as_if_on_gpu, per):
    mechanism = spec.build("attention", f"gated:per={per}", length=24, dim=32, heads=4, kv_heads=2)
    q, k, v = arrays()
    x = jax.random.normal(jax.random.key(1), (2, 24, 32), jnp.bfloat16)
    out = mechanism.mix(q, k, v, x=x, causal=True)[0]
    assert len(as_if_on_gpu) == 1
    wide = [each.astype(jnp.float32) for each in (q, k, v)]
    expected = mechanism.mix(*wide, x=x, causal=True, method="reference")[0]
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
