"""Eight simulated devices compute what one computes, by jit over a mesh and by pmap."""

import json
import subprocess
import sys

import pytest

from tests.test_train import TASK

# Plain SGD at rate 1, so that the difference of the parameters is the gradient itself; Adam would hide a factor.
PROGRAM = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import feed, optimizer
from xformers_lab.train.layout import AXIS, Layout, compile_eval_step, compile_train_step, layout_of
from xformers_lab.train.state import init, structure

tiny = edit(Config(), task=sys.argv[1], attention=sys.argv[2], seq_len=16, dim=16, layers=1, batch=16)
config = edit(tiny, optimizer="sgd", lr=1.0, schedule="constant", warmup=0, weight_decay=0, clip=0)
task, tx = build_task(config), optimizer.build(config.train)
graph, start = structure(config, task), init(config, task, tx)

def trained(config, layout):
    state, batch = layout.place_state(start), feed.checked(task, "train", 0)
    compiled = compile_train_step(config, task, graph, tx, layout, state, batch)
    score = compile_eval_step(task, graph, layout)(state, layout.place_batch(batch))
    losses = []
    for step in range(2):
        state, metrics = compiled.step(state, layout.place_batch(feed.checked(task, "train", step)))
        losses.append(float(metrics["loss"]))
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.params, state.params)
    return losses, grads, jax.tree.map(float, score), compiled.flops, jax.tree.map(np.asarray, state.extra)

def far(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.subtract(x, y)).max()) for x, y in pairs)

alone = Layout("jit", Mesh(np.array(jax.devices()[:1]), (AXIS,), axis_types=(AxisType.Auto,)))
losses, grads, score, flops, extra = trained(config, alone)
found = {"devices": len(jax.devices()), "gradient": max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))}
for layout, accumulate in (("jit", 1), ("jit", 2), ("pmap", 2)):
    changed = edit(config, layout=layout, accumulate=accumulate)
    others = trained(changed, layout_of(changed))
    found[f"{layout} {accumulate}"] = {
        "loss": far(losses, others[0]),
        "gradient": far(grads, others[1]),
        "score": far(score, others[2]),
        "flops": others[3] / flops,
        "calls": [int(x.max()) for x in jax.tree.leaves(others[4])],
    }
print(json.dumps(found))
"""

# A mechanism with a variable that is no parameter: how often it was called.
COUNTING = """
from flax import nnx
import jax.numpy as jnp
from xformers_lab.attention.full import Full

class Counting(Full):
    def __init__(self, size, *, fade: float = 0.1, rngs):
        super().__init__(size, rngs=rngs)
        self.fade = fade
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def mix(self, q, k, v, **given):
        self.calls[...] = self.calls[...] + 1
        # Older calls fade in what it computes, so that a lost counter shows in every number after it.
        out, carry, aux = super().mix(q, k, v, **given)
        return out * (1 + self.fade / self.calls[...]), carry, aux
"""


def test_eight_devices_equal_one(tmp_path, monkeypatch):
    (tmp_path / "uneven.py").write_text(TASK)
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    words = [str(tmp_path / "uneven.py"), f"{tmp_path / 'counting.py'}:fade=0"]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.pop("devices") == 8
    assert found.pop("gradient") > 0.1  # else everything would be near
    assert len(found) == 3
    for name, far in found.items():
        assert far["gradient"] < 1e-6 and far["loss"] < 1e-6, (name, far)
        assert far["score"] < 1e-4, (name, far)  # sums over 256 tokens
        assert far["flops"] == pytest.approx(1, abs=0.01), (name, far)
        assert far["calls"] == [2 * int(name[-1])], (name, far)
