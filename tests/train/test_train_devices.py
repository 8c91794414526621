"""Eight simulated devices compute what one computes, whatever of it is shared out over them, and by pmap."""

import json
import os
import subprocess
import sys

import pytest
from test_train import TASK

from xformers_lab import spec

# Plain SGD at rate 1, so that the difference of the parameters is the gradient itself; Adam would hide a factor.
PROGRAM = """
import json, pathlib, sys
import jax, numpy as np
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import checkpoint, prefetch, optimizer
from xformers_lab.train.layout import alone, compile_eval_step, compile_train_step, layout_of
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

losses, grads, score, flops, state = trained(config, alone())
results = {"devices": len(jax.devices()), "gradient": max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))}
for kind, accumulate in layouts:
    changed = edit(config, layout=kind, accumulate=accumulate)
    layout = layout_of(changed, task)
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
        one, _ = checkpoint.restore(pathlib.Path(folder), alone().abstract_state(abstract(config, task, tx)), {})
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
    "counting": ({"attention": "FOLDER/counting.py:fade=0"}, [("data", 1), ("data", 2), ("pmap", 2)]),
    "what a batch shares": (
        {"ffn": "moe:top=2", "norm": "pre:normaliser=powernorm", **MEMORY},
        [("data", 1), ("data+sequence", 1)],
    ),
    "a memory, in parts": (MEMORY, [("fsdp+sequence:2", 2), ("tensor:2+data", 2)]),
    "documents in a row": (
        {"task": "lm:path=FOLDER/rows.jsonl:packed=true", "attention": "local:window=4", "conv": 4, "qk_norm": "rms"},
        [("fsdp:2+sequence:2+tensor:2", 1)],
    ),
    # Eleven tokens, so that some devices get far more than an even share, and it takes them several rounds.
    "hash": ({"ffn": "hash:experts=8"}, [("experts", 2)]),
    # Two groups of four devices.
    "statistics of a batch": (
        {"norm": "pre:normaliser=batchnorm", "model": "encoder"},
        [("fsdp:2+sequence:2+data", 1)],
    ),
    # Noise and losses are of the whole batch, however it is shared out over devices.
    "noisy experts": ({"ffn": "noisy_top:experts=8"}, [("experts", 1), ("data", 1)]),
    "second experts by chance": ({"ffn": "gshard:experts=8"}, [("experts", 1)]),
    "experts that choose": ({"ffn": "moe:experts=4:choice=expert", "model": "encoder"}, [("experts", 1)]),
}


def run(program: str, argument: list, folder, monkeypatch) -> dict:
    """What a program prints last on eight devices, with FOLDER in its argument replaced."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    words = [sys.executable, "-c", program, json.dumps(argument).replace("FOLDER", str(folder))]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # XLA's word for states that are brought together whole on every device, to be shared out in another way.
    assert "Involuntary full rematerialization" not in ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.full
def test_eight_devices_equal_one(case, tmp_path, monkeypatch):
    changes, layouts = CASES[case]
    (tmp_path / "uneven.py").write_text(TASK)
    (tmp_path / "counting.py").write_text(COUNTING)
    (tmp_path / "words.txt").write_text(" ".join(str(number * 7919 % 1009) for number in range(3000)))
    rows = ("".join("abcdefg"[i * n % 7] for i in range(3 + n % 9)) for n in range(400))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    argument = [{"task": "FOLDER/uneven.py"} | changes, layouts, "FOLDER/run"]
    results = run(PROGRAM, argument, tmp_path, monkeypatch)
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
            assert (far["moved"] > 0.1) == ("memory" in changes or "batchnorm" in changes.get("norm", ""))
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


# With dropout, whose masks must not depend on the mesh. AdamW's first moment after one step is the gradient times 0.1.
LAYOUTS = """
import json, pathlib, sys
import jax, numpy as np, optax
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import checkpoint, optimizer, prefetch
from xformers_lab.train.layout import alone, compile_eval_step, compile_train_step, layout_of
from xformers_lab.train.state import abstract, init, structure

changes, layouts, folder = json.loads(sys.argv[1])
tiny = edit(Config(), **({"seq_len": 32, "dim": 32, "heads": 8, "layers": 1, "batch": 16, "dropout": 0.1} | changes))
config = edit(tiny, clip=0, lr=1e-3)
task = build_task(config)
tx = optimizer.of(config, task)
graph, start = structure(config, task), init(config, task, tx)
batches = [prefetch.checked(task, "train", step) for step in range(4)]
compiled_programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *rest, **more: compiled_programs.append(event) if "backend_compile" in event else None)

def trained(config, layout):
    state = layout.place_state(start)
    compiled = compile_train_step(config, task, graph, tx, layout, state, batches[0])
    memory = compiled.step.memory_analysis()
    score, losses = compile_eval_step(task, graph, layout), []
    for step in range(20):
        state, metrics = compiled.step(state, layout.place_batch(batches[step % 4]))
        losses.append(float(metrics["loss"]))
        if step == 0:
            grads = jax.tree.map(lambda mu: 10 * np.asarray(mu), optax.tree.get(state.opt, "mu"))
            scores = jax.device_get(score(state, layout.place_batch(batches[0]))[0]) if folder else {}
            before = len(compiled_programs)
        if step == 19 and folder:
            score(state, layout.place_batch(batches[1]))
    scores.pop("said", None)
    here = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    return {
        "losses": losses, "grads": grads, "scores": scores, "again": len(compiled_programs) - before,
        "parameters": here(state.params), "optimizer": here(state.opt),
        "arguments": memory.argument_size_in_bytes, "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }, state

def far(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(np.abs(np.asarray(x, float) - np.asarray(y, float)).max()) for x, y in pairs), default=0.0)

one, state = trained(config, alone())
numbers = ("again", "parameters", "optimizer", "arguments", "aliased", "temporary")
largest = max(float(np.abs(grad).max()) for grad in jax.tree.leaves(one["grads"]))
results = {"alone": {key: one[key] for key in numbers} | {"gradient": largest}}
for text in layouts:
    changed = edit(config, layout=text)
    layout = layout_of(changed, task)
    other, there = trained(changed, layout)
    far_off = {key: far(one[key], other[key]) for key in ("losses", "grads", "scores")}
    results[text] = far_off | {key: other[key] for key in numbers}
    if folder:
        # Saved on one device, resumed on eight, saved there, resumed on one.
        target = lambda layout: layout.abstract_state(abstract(config, task, tx))
        place = pathlib.Path(folder) / text.replace(":", "")
        checkpoint.save(place, 1, state, {})
        spread, _ = checkpoint.restore(place, target(layout), {})
        checkpoint.save(place, 2, spread, {})
        back, _ = checkpoint.restore(place, target(alone()), {})
        pieces = lambda state: [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
        results[text] |= {"restored": [far(state, spread), far(state, back)], "placed": pieces(spread) == pieces(there)}
print(json.dumps(results))
"""

EVERY = ("data", "fsdp", "tensor", "sequence", "data:2+fsdp:2+tensor:2")
# Of every kind at least one, and every engine, with options that make each something else than full attention here.
# Not delta_net, whose own rounding is larger than 1e-6 where heads are this small, for it divides by lengths of keys;
# nor gla, of which the compiler brings whole chunks together on every device where `sequence` cuts through them.
MECHANISMS = (
    "full", "talking_heads", "fnet", "local:window=4", "bigbird:block=4:random=1", "linformer:rank=8",
    "nystrom:landmarks=8", "linear:chunk=8", "mamba2:chunk=8", "realformer", "synthesizer",
    "routing:clusters=4", "reformer:chunk=8", "topk:keys=4",
)  # fmt: skip


def test_every_kind_of_attention_is_there():
    kind = lambda choice: spec.entry("attention", spec.parse(choice).name).kind
    assert {kind(choice) for choice in MECHANISMS} == {kind(name) for name in spec.names("attention")}


def shared_out(changes: dict, layouts, folder, monkeypatch, *, saved: bool = False) -> dict:
    """What LAYOUTS says: each layout computes what one device does, and compiles nothing after the first step."""
    argument = [{"task": "FOLDER/uneven.py"} | changes, layouts, "FOLDER/saved" if saved else ""]
    (folder / "uneven.py").write_text(TASK)
    results = run(LAYOUTS, argument, folder, monkeypatch)
    alone = results["alone"]
    assert alone["gradient"] > 1e-2 and list(results) == ["alone", *layouts]
    for layout in layouts:
        far = results[layout]
        assert far["grads"] < 1e-6 * max(alone["gradient"], 1), (layout, far)
        assert far["losses"] < 1e-5 and far["scores"] < 2e-3, (layout, far)  # the latter sums over 512 tokens
        assert far["again"] == 0, (layout, far)
        # The state that goes in makes room for the one that comes out.
        assert far["aliased"] >= far["parameters"] + far["optimizer"], (layout, far)
    return results


@pytest.mark.full
@pytest.mark.parametrize("choice", MECHANISMS)
def test_attention_is_shared_out(choice, tmp_path, monkeypatch):
    refused = spec.entry("attention", spec.parse(choice).name).refuses
    changes = {"attention": choice, "model": "encoder" if "causal" in refused else "decoder"}
    shared_out(changes, EVERY, tmp_path, monkeypatch)


@pytest.mark.full
def test_experts_are_shared_out_in_any_layout(tmp_path, monkeypatch):
    layouts = (*EVERY, "experts", "fsdp:2+experts:2+tensor:2")
    results = shared_out({"ffn": "moe:top=2"}, layouts, tmp_path, monkeypatch)
    assert results["experts"]["parameters"] < 0.3 * results["alone"]["parameters"]


def test_a_device_holds_its_share(tmp_path, monkeypatch):
    """Of parameters, of the optimizer's moments, and of what the compiled program is given. What one device has saved
    eight read, and the other way round, bit for bit."""
    layouts = ("fsdp", "sequence", "data:2+fsdp:2+tensor:2")
    results = shared_out({}, layouts, tmp_path, monkeypatch, saved=True)
    alone = results["alone"]
    share = lambda layout, key: results[layout][key] / alone[key]
    for key in ("parameters", "optimizer", "arguments"):
        # All but the bias of the 11 answers has a dimension that 8, or 2 and 2, divide.
        assert share("fsdp", key) < 1.1 / 8 + 0.02, (key, results)
        assert share("data:2+fsdp:2+tensor:2", key) < 0.3, (key, results)
    assert share("sequence", "parameters") == share("sequence", "optimizer") == 1
    assert share("sequence", "temporary") < 0.75, results
    for layout in layouts:
        assert results[layout]["restored"] == [0.0, 0.0] and results[layout]["placed"]
