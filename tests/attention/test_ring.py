"""Ring attention on eight simulated devices: the definition's values and gradients, in memory that devices share."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import spec
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine import ring

EQUAL = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from xformers_lab import layouts
from xformers_lab.attention._engine import ring
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import All, Band, Causal
from xformers_lab.train.mesh import mesh_of

ring.TILE = 2  # two tiles of four positions on each of eight devices
B, T, N, K, H = 2, 32, 4, 2, 8
draw = lambda key, heads: jax.random.normal(jax.random.key(key), (B, T, heads, H))
q, k, v, weights = draw(0, N), draw(1, K), draw(2, K), draw(3, N)
valid = jnp.arange(T) < jnp.array([[T], [20]])
documents = jnp.tile(jnp.arange(T) // 10, (B, 1))

class Bias:
    # A gradient for the slopes, and whole numbers beside them, which have none.
    def __init__(self, slopes, shifts):
        self.slopes, self.shifts = slopes, shifts
    def __call__(self, q_at, k_at):
        return -self.slopes * jnp.abs(q_at - k_at - self.shifts)

jax.tree_util.register_pytree_node(Bias, lambda b: ((b.slopes, b.shifts), None), lambda _, leaves: Bias(*leaves))
bias = Bias(jnp.linspace(0.1, 1, N), jnp.arange(N))

def defined(q, k, v, bias, pattern, valid, documents):
    head = lambda *of: dense(*of[:3], pattern=pattern, valid=of[4], documents=of[5], bias=of[3])
    heads = jax.vmap(head, (1, 1, 1, 0, None, None), 1)
    k, v = (jnp.repeat(each, N // K, 2) for each in (k, v))
    return jax.vmap(heads, (0, 0, 0, None, 0, 0))(q, k, v, bias, valid, documents)

def both(attend, bias):
    def loss(q, k, v, slopes):
        out = attend(q, k, v, None if bias is None else Bias(slopes, bias.shifts))
        return (out * weights).sum(), out
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, jnp.linspace(0.1, 1, N))
    return out, *grads

rules = {
    "causal": (ring.Rule(True), Causal()),
    "whole": (ring.Rule(False), All()),
    "causal window": (ring.Rule(True, 5), Band(5) & Causal()),
    "window": (ring.Rule(False, 5), Band(5)),
}
far = {}
for layout in sys.argv[1:]:
    mesh = mesh_of(jax.devices(), layouts.sizes(layouts.canonical(layout), 8))
    for name, (rule, pattern) in rules.items():
        for more in ((None, None, None), (bias, valid, documents)):
            with jax.set_mesh(mesh):
                assert ring.fits(q, k) and not ring.fits(q[:, :31], k[:, :31]) and not ring.fits(q[:, :16], k)
                how = {"valid": more[1], "documents": more[2]}
                ours = both(lambda q, k, v, bias: ring.attend(q, k, v, rule=rule, bias=bias, **how), more[0])
            theirs = both(lambda q, k, v, bias: defined(q, k, v, bias, pattern, *more[1:]), more[0])
            pairs = zip(ours, theirs, strict=True)
            apart = [float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1)) for a, b in pairs]
            far[f"{layout} {name} {more[0] is not None}"] = max(apart)
assert not ring.fits(q, k)  # without a mesh
print(json.dumps(far))
"""

MEMORY = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from xformers_lab import layouts
from xformers_lab.attention._engine import ring
from xformers_lab.train.mesh import mesh_of

shape, temporary = (1, 65536, 2, 16), {}
for devices in (2, 4, 8):
    mesh = mesh_of(jax.devices()[:devices], layouts.sizes("sequence", devices))
    loss = lambda q, k, v: ring.attend(q, k, v, rule=ring.Rule(True)).astype(jnp.float32).sum()
    place = NamedSharding(mesh, PartitionSpec(None, layouts.SEQUENCE))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=place).lower(x, x, x).compile()
    temporary[devices] = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps(temporary))
"""


def on_eight_devices(program: str, *layouts: str) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program, *layouts],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "layout",
    [
        "data:2+sequence:4",
        *(pytest.param(each, marks=pytest.mark.full) for each in ("sequence", "sequence:2+tensor:4")),
    ],
)
def test_it_is_the_definition(layout):
    far = on_eight_devices(EQUAL, layout)
    assert len(far) == 8 and max(far.values()) < 2e-6, far


def test_each_device_holds_a_share():
    """At 65,536 positions what a device needs beside its arguments falls as one over the devices, but for the tiles of
    scores, which are of one size."""
    temporary = {int(devices): size for devices, size in on_eight_devices(MEMORY).items()}
    scores = 3 * 2 * 512 * 512 * 4  # two heads; the scores, their exponentials and their gradients
    for devices in (2, 4):
        assert temporary[2 * devices] - scores < 0.6 * temporary[devices], temporary
    whole = 65536 * 2 * 16 * 4
    assert temporary[8] < scores + 10 * whole / 8, temporary


def test_the_rule_is_the_pattern():
    """What a mechanism says of its pattern by distance is its pattern, so that the ring runs what the engine runs."""
    at, ruled = np.arange(300), []
    for name in spec.names("attention"):
        mechanism = spec.build("attention", name, length=300, dim=16, heads=2, kv_heads=None)
        if not isinstance(mechanism, Patterned) or ring.rule_of(mechanism.seen(True)) is None:
            continue
        ruled.append(name)
        for causal in (True, False):
            rule = ring.rule_of(mechanism.seen(causal))
            assert rule is not None
            seen = mechanism.seen(causal)(jnp.asarray(at[:, None]), jnp.asarray(at[None]))
            assert (np.broadcast_to(seen, (300, 300)) == np.asarray(rule(at[:, None], at[None]))).all(), (name, causal)
    assert {"full", "local"} <= set(ruled)
