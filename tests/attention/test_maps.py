"""Attention maps: the weights that are read off are those of the scores, or give what the layer gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import spec
from xformers_lab.attention import MultiHead
from xformers_lab.check.subject import heads_of
from xformers_lab.config import Config, edit
from xformers_lab.errors import Refused
from xformers_lab.measure import maps
from xformers_lab.model import build_model, build_task

T = 12


def model_of(task: str = "copy", **changes):
    sizes = {"seq_len": T, "dim": 16, "heads": 2, "layers": 2, "batch": 2, "position": "none"}
    config = edit(Config(), task=task, **(sizes | changes))
    task_ = build_task(config)
    return build_model(config, task_), task_


def maps_of(valid=None, **changes):
    model, task = model_of(**changes)
    return maps.of_model(model, np.asarray(task.batch("test", 0).inputs[:1]), valid)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("attention", ["full", "local:window=3"])
def test_softmax_weights_are_read_off(attention, kind):
    """By hand from queries and keys of the layer."""
    model, task = model_of(task="copy" if kind == "decoder" else "listops", attention=attention, model=kind)
    calls = []
    with maps.watched(lambda layer, call: calls.append((layer, call))):
        model(jnp.asarray(task.batch("test", 0).inputs[:1]))
    assert len(calls) == 2
    for layer, call in calls:
        found = maps.of_call(layer, call)
        seen = layer.seen(call.causal)(np.arange(T)[:, None], np.arange(T)[None])
        scores = np.einsum("tnh,snh->nts", call.q[0], call.k[0]) * call.q.shape[-1] ** -0.5
        wanted = jax.nn.softmax(jnp.where(np.broadcast_to(seen, (T, T)), scores, -jnp.inf), -1)
        np.testing.assert_allclose(found.weights, wanted, atol=2e-6)
        assert not found.implied


@pytest.mark.full
@pytest.mark.parametrize(
    "choice", [{"position": "alibi"}, {"position": "xl"}, {"kv_heads": 1}, {"attention": "bigbird"}]
)
def test_the_definition_has_the_same_weights(choice):
    """Rows sum to one, nothing is seen ahead, and the reference with basis values says the same."""
    model, task = model_of(**choice)
    calls = []
    with maps.watched(lambda layer, call: calls.append((layer, call))):
        model(jnp.asarray(task.batch("test", 0).inputs[:1]))
    layer, call = calls[0]
    found = maps.of_call(layer, call).weights
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert not found[:, ~np.tri(T, dtype=bool)].any() and (found >= 0).all()
    again = maps.of_call(layer, call.replace(method="reference")).weights
    np.testing.assert_allclose(found, again, atol=1e-5)


@pytest.mark.full
def test_weights_that_heads_mix_are_those_of_the_definition():
    model, task = model_of(attention="talking_heads", layers=1)
    calls = []
    with maps.watched(lambda layer, call: calls.append((layer, call))):
        model(jnp.asarray(task.batch("test", 0).inputs[:1]))
    ((layer, call),) = calls
    found = maps.of_call(layer, call)
    again = maps.of_call(layer, call.replace(method="reference"))
    np.testing.assert_allclose(found.weights, again.weights, atol=1e-5)
    assert not found.implied and abs(found.weights.sum(-1) - 1).max() > 0.01


@pytest.mark.full
def test_many_keys_are_read_off_in_parts(monkeypatch):
    """However many values there are at once, the weights are the same."""
    layer = spec.build("attention", "full", length=T, dim=4, heads=2)
    q = jax.random.normal(jax.random.key(0), (1, T, 2, 2))
    whole = maps.of_call(layer, maps.Call(q, q, q, causal=True))
    monkeypatch.setattr(maps, "AT_ONCE", 2 * T * T * 4)
    np.testing.assert_allclose(maps.of_call(layer, maps.Call(q, q, q, causal=True)).weights, whole.weights, atol=1e-6)


def test_padding_has_no_weight():
    valid = np.arange(T)[None] < 8
    for found in maps_of(task="listops", valid=valid, model="encoder", attention="full"):
        assert not found.weights[:, :, 8:].any()
        np.testing.assert_allclose(found.weights[:, :8].sum(-1), 1, atol=1e-5)


def test_linear_attention_has_effective_weights():
    for found in maps_of(attention="linear"):
        assert found.implied and not found.weights[:, ~np.tri(T, dtype=bool)].any()
        np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [("fnet", "fnet has no map: its transform mixes channels"), ("rwkv", "every channel has weights of its own")],
)
def test_what_is_no_mean_of_values_is_refused(attention, reason):
    with pytest.raises(Refused, match=reason):
        maps_of(task="listops" if attention == "fnet" else "copy", attention=attention)


# Whose defaults are so long that at T tokens nothing of what has no map is there.
SHORT: dict[str | None, str] = {"transient_global": "transient_global:block=4"}


def call_of(layer, seed: int = 0) -> maps.Call:
    """A call of random arrays, causal where the layer can be."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal((1, T, *shape)), jnp.float32)
    heads: Any = {name: draw(*shape) for name, shape in heads_of(layer).items()}
    x = draw(layer.size.dim)
    return maps.Call(**heads, x=x, x_q=x, causal="causal" not in layer.refusals())


@pytest.mark.full
@pytest.mark.parametrize("name", spec.names("attention"))
def test_what_has_no_map_says_why_and_has_none(name, monkeypatch):
    layer = spec.build("attention", SHORT.get(name) or name, length=T, dim=16, heads=2)
    if not isinstance(layer, MultiHead):
        assert layer.refusals()["map"]
        return
    call = call_of(layer)
    if "map" not in layer.refusals():
        weights = maps.of_call(layer, call).weights
        assert np.isfinite(weights).all() and weights.any()
        assert not (call.causal and np.abs(weights[:, ~np.tri(T, dtype=bool)]).max() > 1e-5)
        return
    monkeypatch.setattr(maps, "_refuse_declared", lambda layer: None)
    with pytest.raises(Refused, match="no map"):
        maps.of_call(layer, call)


def test_weights_behind_a_norm_are_those_of_the_mean():
    """Retention by hand: weights fade with the distance, and the layer gives its norm and gate of the mean."""
    layer = spec.build("attention", "retnet", length=T, dim=16, heads=2)
    call = call_of(layer)
    found = maps.of_call(layer, call)
    apart = np.arange(T)[:, None] - np.arange(T)[None]
    fades = np.exp(np.asarray(layer.per_head()["decay"]))[:, None, None] ** np.maximum(apart, 0) * (apart >= 0)
    wanted = np.einsum("tnh,snh->nts", call.q[0], call.k[0]) * call.q.shape[-1] ** -0.5 * fades
    np.testing.assert_allclose(found.weights, wanted, atol=1e-5)
    mean = np.einsum("nts,snh->tnh", wanted, call.v[0])
    gate = layer.gate(call.x).reshape(T, 2, 8)
    given = mean / np.sqrt((mean**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(jax.nn.silu(gate))
    np.testing.assert_allclose(layer.attend_heads(call)[0][0], given, atol=1e-4)


def test_a_planted_norm_that_no_class_tells_is_refused():
    plain = spec.build("attention", "retnet", length=T, dim=16, heads=2)

    class Normed(type(plain)):
        def attend(self, q, k, v, *, valid=None, causal, decay, more_v):
            out = super().attend(q, k, v, valid=valid, causal=causal, decay=decay, more_v=more_v)
            return out / jnp.linalg.norm(out, axis=-1, keepdims=True)

    layer = Normed(plain.size, rngs=nnx.Rngs(0))
    with pytest.raises(Refused, match="does not tell apart from the mean"):
        maps.of_call(layer, call_of(layer))


def test_a_planted_choice_by_values_is_refused():
    layer = spec.build("attention", "full", length=T, dim=16, heads=2)

    class Chosen(type(layer)):
        def attend_heads(self, call):
            out, carry, aux = super().attend_heads(call)
            return jnp.maximum(out, 0), carry, aux

    chosen = Chosen(layer.size, rngs=nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(0), (1, T, 2, 8))
    with pytest.raises(Refused, match="no weighted mean of its values"):
        maps.of_call(chosen, maps.Call(q, q, q))


def test_a_record_has_whole_numbers():
    weights = np.eye(3, dtype=np.float32)[None] * np.array([1, 0.5, -0.5], np.float32)
    found = maps.drawn([maps.Map(weights, False), maps.Map(2 * weights, True)], ["a", "b", "c"])
    assert found["layers"][0] == [[[128, 0, 0], [0, 64, 0], [0, 0, 64]]]
    assert found["layers"][1] == [[[255, 0, 0], [0, 128, 0], [0, 0, 128]]]
    assert found["implied"] and found["tokens"] == ["a", "b", "c"] and found["queries"] == 3
