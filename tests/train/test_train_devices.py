"""Eight simulated devices compute what one computes, by jit over a mesh, by pmap, and with experts shared out."""

import json
import os
import subprocess
import sys

import pytest
from test_train import TASK

# Plain SGD at rate 1, so that the difference of the parameters is the gradient itself; Adam would hide a factor.
PROGRAM = """
import json, pathlib, sys
import jax, numpy as np
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import checkpoint, prefetch, optimizer
from xformers_lab.train.layout import AXIS, Layout, compile_eval_step, compile_train_step, layout_of, mesh_of, sharing
from xformers_lab.train.state import abstract, init, structure

changes, layouts, folder = json.loads(sys.argv[1])
tiny = edit(Config(), **({"seq_len": 16, "dim": 16, "layers": 1, "batch": 16} | changes))
config = edit(tiny, optimizer="sgd", lr=1.0, schedule="constant", warmup=0, weight_decay=0, clip=0)
task = build_task(config)
tx = optimizer.of(config, task)
graph, start = structure(config, task), init(config, task, tx)
batches = [prefetch.checked(task, "train", step, config.model.memory != "none") for step in range(2)]

def trained(config, layout):
    state = layout.place_state(start)
    compiled = compile_train_step(config, task, graph, tx, layout, state, batches[0])
    score, _ = compile_eval_step(task, graph, layout)(state, layout.place_batch(batches[0]))
    losses = []
    for batch in batches:
        state, metrics = compiled.step(state, layout.place_batch(batch))
        losses.append(float(metrics["loss"]))
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.params, state.params)
    score.pop("said", None)  # what was answered at each place: no sum
    return losses, grads, jax.tree.map(float, score), compiled.flops, state

def far(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(np.abs(np.asarray(x, float) - np.asarray(y, float)).max()) for x, y in pairs), default=0.0)

alone = Layout("jit", mesh_of(jax.devices()[:1], {AXIS: 1}))
losses, grads, score, flops, state = trained(config, alone)
results = {"devices": len(jax.devices()), "gradient": max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))}
for kind, accumulate in layouts:
    changed = edit(config, layout=kind, accumulate=accumulate)
    layout = sharing(layout_of(changed), changed, task)
    others = trained(changed, layout)
    results[f"{kind} {accumulate}"] = {
        "loss": far(losses, others[0]),
        "gradient": far(grads, others[1]),
        "score": far(score, others[2]),
        "flops": others[3] / flops,
        "calls": [int(x.max()) for x in jax.tree.leaves(others[4].extra)],
        "kept": far((state.extra, state.memory), (others[4].extra, others[4].memory)),
        "moved": far((state.extra, state.memory), (start.extra, start.memory)),
    }
    if kind == "experts":
        adam = optimizer.of(edit(config, optimizer="adamw"), task)
        piece = lambda leaf: (leaf.shape, leaf.addressable_shards[0].data.shape)
        pieces = lambda state: jax.tree.map(piece, checkpoint.named_leaves(state))
        checkpoint.save(pathlib.Path(folder), 2, others[4], {})
        one, _ = checkpoint.restore(pathlib.Path(folder), alone.abstract_state(abstract(config, task, tx)), {})
        again = layout.place_state(one)
        results[f"{kind} {accumulate}"] |= {
            "pieces": pieces(layout.place_state(init(config, task, adam))),
            "restored": (far(others[4].params, one.params), pieces(again) == pieces(others[4])),
        }
print(json.dumps(results))
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

    def attend_heads(self, call):
        self.calls[...] = self.calls[...] + 1
        # Older calls fade in what it computes, so that a lost counter shows in every number after it.
        out, carry, aux = super().attend_heads(call)
        return out * (1 + self.fade / self.calls[...]), carry, aux
"""


MEMORY = {"memory": "xl:length=8", "position": "rope", "task": "lm:path=FOLDER/words.txt"}
CASES = {
    "counting": ({"attention": "FOLDER/counting.py:fade=0"}, [("jit", 1), ("jit", 2), ("pmap", 2)]),
    "what a batch shares": ({"ffn": "moe:top=2", "norm": "pre:normaliser=powernorm", **MEMORY}, [("jit", 1)]),
    # Eleven tokens, so that some devices get far more than an even share, and it takes them several rounds.
    "hash": ({"ffn": "hash:experts=8"}, [("experts", 2)]),
    # Two groups of four devices.
    "experts that choose": ({"ffn": "moe:experts=4:choice=expert", "model": "encoder"}, [("experts", 1)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.full
def test_eight_devices_equal_one(case, tmp_path, monkeypatch):
    changes, layouts = CASES[case]
    (tmp_path / "uneven.py").write_text(TASK)
    (tmp_path / "counting.py").write_text(COUNTING)
    (tmp_path / "words.txt").write_text(" ".join(str(number * 7919 % 1009) for number in range(3000)))
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    argument = json.dumps([{"task": "FOLDER/uneven.py"} | changes, layouts, "FOLDER/run"])
    words = [sys.executable, "-c", PROGRAM, argument.replace("FOLDER", str(tmp_path))]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads(ran.stdout.splitlines()[-1])
    assert results.pop("devices") == 8
    size = results.pop("gradient")
    assert size > 0.1  # else everything would be near
    assert len(results) == len(layouts)
    for (kind, accumulate), (name, far) in zip(layouts, results.items(), strict=True):
        assert far["gradient"] < 1e-6 * max(size, 1) and far["loss"] < 5e-6, (name, far)
        assert far["score"] < 2e-3, (name, far)  # sums over 256 tokens
        assert far["flops"] == pytest.approx(1, abs=0.01), (name, far)
        if case == "counting":
            assert far["calls"] == [2 * accumulate], (name, far)
        else:  # statistics and memory, which only one of the models has
            assert far["kept"] < 1e-6 * max(far["moved"], 1), (name, far)
            assert (far["moved"] > 0.1) == ("memory" in changes)
        if kind == "experts":
            assert_shared_out(far, changes["ffn"])


def assert_shared_out(far: dict, ffn: str) -> None:
    """Every device holds its share of the experts and of Adam's moments of them, and all of everything else."""
    experts = 4 if "experts=4" in ffn else 8
    shared = {name: shape for name, (shape, piece) in far["pieces"].items() if shape != piece}
    assert {name.rpartition(".")[2] for name in shared} == {"up", "down"}
    assert len(shared) == 3 * 2  # of the parameters, and of both moments
    for name, shape in shared.items():
        assert shape[1] == experts and far["pieces"][name][1] == [shape[0], 1, *shape[2:]]
    assert far["restored"] == [0.0, True]
