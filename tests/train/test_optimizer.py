"""Optimizers and schedules: their papers' rules in NumPy, ids that stay, state that lies and comes back as it was."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_longer import grown
from test_resume import arrays
from test_train import TASK, tiny
from test_train_devices import run as on_eight

from xformers_lab import config as configs
from xformers_lab import optimizer as shelf
from xformers_lab import spec
from xformers_lab.check import run as kit
from xformers_lab.check.kits import optimizer as properties
from xformers_lab.check.subject import Broken
from xformers_lab.config import Config, edit, identity
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.train import checkpoint, initial, longer, loop, optimizer, otherwise, programs, records, trained
from xformers_lab.train.layout import plan
from xformers_lab.train.state import abstract, init, rates_of, shapes

SMALL = {"task": "copy", "seq_len": 16, "dim": 16, "layers": 2, "batch": 8}
RATE, DECAY = properties.RATE, properties.DECAY


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "uneven.py"
    path.write_text(TASK)
    return str(path)


# ---- ids and numbers that stay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, before", [
    ([], "9ca17521cdcb"),
    (["optimizer=sgd"], "cbe6b0bf122a"),
    (["optimizer=sgd", "lr=0.1", "schedule=constant"], "be04145dc775"),
    (["task=copy", "seq_len=16", "dim=16", "layers=1", "batch=8", "steps=3"], "19d26f41b6c5"),
])  # fmt: skip
def test_ids_are_those_from_before_optimizers_had_options(words, before):
    config = configs.single(words)
    assert identity(config) == before
    named = config.train.optimizer
    spelled = str(spec.resolve("optimizer", named))
    assert ":" in spelled and identity(edit(config, optimizer=spelled)) == before, (
        "defaults that are said are no others"
    )
    assert dict(configs.decisive(config))["optimizer"] == named and "cooldown" not in configs.decisive(config)


def test_an_option_is_a_part_of_the_id_and_of_the_program():
    base, other = edit(Config(), optimizer="adamw:b2=0.95"), edit(Config(), optimizer="adamw:b2=0.95:b1=0.9")
    assert identity(base) == identity(other) != identity(Config())
    assert configs.compiled(base) == configs.compiled(other) != configs.compiled(Config())
    wsd = edit(Config(), schedule="wsd")
    assert identity(edit(wsd, cooldown=0.1)) != identity(wsd) == identity(edit(wsd, cooldown=0.2))
    assert configs.compiled(edit(wsd, cooldown=0.1)) == configs.compiled(wsd)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_first_two_are_as_they_were(name):
    """Structure of the state and every bit of an update."""
    config = edit(Config(), optimizer=name, steps=10, lr=0.1)
    subject = properties.Tuned(name)
    tx, rates = optimizer.build(config.train, subject.roles), rates_of(config.train)
    rate, mask = optimizer.learning_rate(config.train, rates), subject.roles.decays
    decay: float = rates.weight_decay  # type: ignore[assignment]
    if name == "adamw":
        rule = optax.adamw(rate, weight_decay=decay, mask=mask)
    else:
        rule = optax.chain(optax.add_decayed_weights(decay, mask=mask), optax.sgd(rate))
    before = optax.chain(optax.clip_by_global_norm(rates.clip), rule)  # type: ignore[arg-type]
    was, now = before.init(subject.params), tx.init(subject.params)
    assert list(checkpoint.named_leaves(was)) == list(checkpoint.named_leaves(now))
    assert jax.tree.structure(was) == jax.tree.structure(now)
    for gradient in subject.gradients:
        expected, was = before.update(gradient, was, subject.params)
        updates, now = tx.update(gradient, now, subject.params, rates=rates)
        for one, other in zip(jax.tree.leaves((expected, was)), jax.tree.leaves((updates, now)), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# ---- schedules ----------------------------------------------------------------------------------------------------


def test_schedules_are_their_formulas():
    n, w = np.arange(100), 10
    rate = lambda schedule, **more: np.asarray(
        optimizer.learning_rate(edit(Config(), steps=100, lr=2.0, warmup=0.1, schedule=schedule, **more).train)(n)
    )
    rising = (n + 1) / w
    after = {
        "constant": np.ones(100),
        "linear": 1 - (n - w) / 90,
        "cosine": 0.5 * (1 + np.cos(np.pi * (n - w) / 90)),
        "rsqrt": np.sqrt(w / (n + 1)),
        "wsd": np.minimum(1, (100 - n) / 20),
    }
    for schedule, falling in after.items():
        np.testing.assert_allclose(
            rate(schedule), 2 * np.where(n < w, rising, falling), rtol=1e-5, atol=1e-6, err_msg=schedule
        )
    np.testing.assert_allclose(rate("wsd", cooldown=0.5)[10:], 2 * np.minimum(1, (100 - n[10:]) / 50), rtol=1e-6)
    assert (rate("wsd", cooldown=0)[10:] == 2).all()
    # lr = D^-0.5 min(n^-0.5, n w^-1.5) from n = 1 on, whose peak is lr here.
    vaswani = np.minimum((n + 1) ** -0.5, (n + 1) * w**-1.5)
    np.testing.assert_allclose(rate("rsqrt"), 2 * vaswani / vaswani.max(), rtol=1e-5)


def test_the_stable_part_goes_on_and_the_cooldown_does_not():
    first = edit(Config(), schedule="wsd", steps=10, warmup=0.2)
    grown_up = edit(first, steps=20, warmup=0.1, cooldown=0.25)
    longer._refuse_other_rates(first, grown_up, 8)
    with pytest.raises(
        UsageError, match="its cooldown began after step 8, and its newest checkpoint is of step 10: begin"
    ):
        longer._refuse_other_rates(first, grown_up, 10)
    with pytest.raises(UsageError, match=r"say warmup=0\.1 too"):
        longer._refuse_other_rates(first, edit(first, steps=20), 8)
    assert longer.asked(first, ["steps=20", "warmup=0.1", "cooldown=0.25"]) == grown_up
    inverse = edit(first, schedule="rsqrt")
    longer._refuse_other_rates(inverse, edit(inverse, steps=20, warmup=0.1), 10)
    with pytest.raises(UsageError, match="only rates that do not go by the last step"):
        longer._refuse_other_rates(edit(first, schedule="linear"), edit(grown_up, schedule="linear", cooldown=0.2), 10)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"optimizer": "adamm"}, 'did you mean "radam" or "adamw"'),
    ({"optimizer": "adamw:beta=1"}, "no option \"beta\""),
    ({"optimizer": "adamw:b1=1"}, "optimizer=adamw:b1=1: b1 must be at least 0 and below 1, got 1"),
    ({"optimizer": "sgd:nesterov=true"}, "needs a momentum"),
    ({"optimizer": "muon:ratio=0"}, "ratio must be above 0"),
    ({"optimizer": "adafactor:clip=0"}, "clip must be above 0"),
    ({"optimizer": "schedule_free"}, "takes the place of a rate that falls, as schedule=cosine .* schedule=constant"),
    ({"optimizer": "schedule_free:b1=0", "schedule": "constant"}, "b1 must be above 0"),
    ({"optimizer": "schedule_free", "schedule": "constant", "ema": 0.9}, "ema=0.9: .* scores an average of its own"),
    ({"optimizer": "sophia:every=0"}, "every must be above 0"),
    ({"optimizer": "sophia:gamma=-1"}, "gamma must be above 0"),
    ({"schedule": "wsd", "warmup": 0.9}, "warmup=0.9 cooldown=0.2: together more than all steps"),
    ({"cooldown": 0.3}, "cooldown=0.3: schedule=cosine has none; say schedule=wsd"),
])  # fmt: skip
def test_refused_before_anything_compiles(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(edit(Config(), **(SMALL | changes)))


def test_what_it_keeps_counts_before_it_is_built(monkeypatch):
    """By the shapes of its state, whichever it is."""
    from xformers_lab import hardware

    config = edit(Config(), **SMALL)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(config, build_task(config))[1]))
    monkeypatch.setattr(hardware, "memory", lambda: 4 * count * 3.5)
    check_config(edit(config, optimizer="lion", batch=1))
    for words in ({"optimizer": "adamw"}, {"optimizer": "lion", "ema": 0.9}):
        with pytest.raises(UsageError, match="parameters in training take"):
            check_config(edit(config, batch=1, **words))


def test_an_evaluation_has_no_options_of_it():
    from xformers_lab.train import options

    with pytest.raises(UsageError, match='eval takes no "optimizer"'):
        options.parted("optimizer.b1")
    assert otherwise.at(edit(Config(), **SMALL, optimizer="muon"), build_task(edit(Config(), **SMALL)), 12).resized


# ---- the rules of papers ------------------------------------------------------------------------------------------


def newton_schulz(g, iterations=5):
    x = g / np.linalg.norm(g)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("options", ["", ":rms=none:ratio=0.1:nesterov=false"])
def test_muon_turns_each_matrix_of_a_stack(options):
    """The first step: the momentum is the gradient up to its size, which Newton-Schulz leaves out."""
    subject = properties.Tuned(f"muon{options}")
    rule = subject.rule()
    updates, _ = jax.jit(rule.update)(subject.gradients[0], rule.init(subject.params), subject.params)
    gradients, moved = subject.gradients[0]["stack"], updates["stack"]
    for name in ("kernel", "up"):
        matrices = (np.asarray(tree[name]).reshape(-1, *tree[name].shape[-2:]) for tree in (gradients, moved))
        was = np.asarray(subject.params["stack"][name]).reshape(-1, *moved[name].shape[-2:])
        for g, update, p in zip(*matrices, was, strict=True):
            rows, columns = g.shape
            size = 0.2 * max(g.shape) ** 0.5 if not options else max(1, columns / rows) ** 0.5
            expected = -RATE * (size * newton_schulz(g.astype(float)) + DECAY * p)
            np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-5)
    # All else by AdamW, whose first step is the sign.
    ratio = 0.1 if options else 1.0
    g, p = subject.gradients[0]["embedding"]["embedding"], subject.params["embedding"]["embedding"]
    np.testing.assert_allclose(
        updates["embedding"]["embedding"], -ratio * RATE * (np.sign(g) + DECAY * np.asarray(p)), rtol=1e-4
    )
    np.testing.assert_allclose(moved["bias"], -ratio * RATE * np.sign(gradients["bias"]), rtol=1e-4)


def test_schedule_free_is_its_three_sequences():
    """z, x and y of Defazio et al., algorithm 1 for AdamW, with a rate that warms up."""
    rates = jnp.asarray([0.1, 0.2, 0.2])
    roles = shelf.Roles({"p": True}, {"p": 0}, {"p": False})
    given = shelf.Given(lambda count: rates[jnp.clip(count, 0, 2)], jnp.float32(0.5), roles)
    rule = shelf.build("schedule_free:b1=0.8:b2=0.9:power=1", given)
    y = z = x = np.array([1.0, -2.0, 3.0])
    params: Any = {"p": jnp.asarray(y, jnp.float32)}
    v, total = np.zeros(3), 0.0
    state = rule.init(params)
    np.testing.assert_allclose(shelf.scored(state, params)["p"], x, rtol=1e-6)
    for step, rate in enumerate([0.1, 0.2, 0.2]):
        g = np.array([1.0, 0.5, -2.0]) * (step + 1)
        updates, state = rule.update({"p": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.9 * v + 0.1 * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-8) + 0.5 * y)
        total += rate
        x = (1 - rate / total) * x + rate / total * z
        y = 0.8 * x + 0.2 * z
        np.testing.assert_allclose(params["p"], y, rtol=1e-5)
        np.testing.assert_allclose(shelf.scored(state, params)["p"], x, rtol=1e-5)


def test_lamb_moves_by_a_share_of_each_layer():
    subject = properties.Tuned("lamb")
    rule = subject.rule(decay=0.0)
    updates, _ = jax.jit(rule.update)(subject.gradients[0], rule.init(subject.params), subject.params)
    for name, stacked in (("kernel", 1), ("up", 2)):
        p, u = (np.asarray(tree["stack"][name]) for tree in (subject.params, updates))
        sizes = [np.linalg.norm(array.reshape(*array.shape[:stacked], -1), axis=-1) for array in (u, p)]
        np.testing.assert_allclose(sizes[0], RATE * sizes[1], rtol=1e-4)


def test_adafactor_keeps_rows_and_columns():
    subject = properties.Tuned("adafactor:factored=2:relative=false")
    rule = subject.rule(decay=0.0)
    gradient = subject.gradients[0]
    first = jax.jit(rule.init)(subject.params)
    updates, state = jax.jit(rule.update)(gradient, first, subject.params)
    sizes = {
        leaf.shape for name, leaf in checkpoint.named_leaves(state).items() if "kernel" in name and "stack" in name
    }
    assert sizes == {(3,), (3, 4), (3, 6), (3, 1)}, "a step, rows and columns of each layer"
    for g, update in zip(np.asarray(gradient["stack"]["kernel"]), updates["stack"]["kernel"], strict=True):
        rows, columns = (g**2).mean(1, keepdims=True), (g**2).mean(0, keepdims=True)
        u = g / np.sqrt(rows * columns / (g**2).mean())
        np.testing.assert_allclose(update, -RATE * u / max(1, np.sqrt((u**2).mean())), rtol=1e-4)


@pytest.mark.parametrize("choice, rule", [
    ("radam:b1=0.8", lambda: optax.radam(RATE, b1=0.8)),
    ("nadamw:b2=0.9", lambda: optax.nadamw(RATE, b2=0.9, weight_decay=0.0)),
    ("lion:b1=0.8", lambda: optax.lion(RATE, b1=0.8, weight_decay=0.0)),
    ("adan", lambda: optax.adan(RATE)),
    ("sgd:momentum=0.9:nesterov=true", lambda: optax.sgd(RATE, momentum=0.9, nesterov=True)),
])  # fmt: skip
def test_it_is_optax_s_own(choice, rule):
    subject = properties.Tuned(choice)
    small = lambda tree: {"head": tree["head"]}
    subject.roles = shelf.Roles(*map(small, (subject.roles.decays, subject.roles.stacked, subject.roles.hidden)))
    params, gradients = small(subject.params), [small(gradient) for gradient in subject.gradients]
    expected, _ = subject.steps(rule(), params, gradients)
    ours, _ = subject.steps(subject.rule(decay=0.0), params, gradients)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


# ---- the kit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lion", "lamb", "sophia"])
def test_a_choice_passes_its_kit_in_brief(name):
    report = kit.examine(properties.subject(name), [properties.decays_alone, properties.layers_apart])
    assert report.passed, report.failed


FAULTS = {
    "descends": "optax.scale_by_learning_rate(given.rate, flip_sign=False)",
    "decays_alone": "optax.add_decayed_weights(given.weight_decay), optax.scale_by_learning_rate(given.rate)",
    "rates_are_data": "optax.scale_by_learning_rate(0.01)",
    "layers_apart": "optax.normalize_by_update_norm(), optax.scale_by_trust_ratio(), given.rule()",
    "saved": "optax.GradientTransformation(lambda p: {'n': 0}, lambda u, s, p=None: (u, s)), given.rule()",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_its_property(name, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f'import optax\n\ndef mine(given):\n    """Mine."""\n    return optax.chain({FAULTS[name]})\n')
    with pytest.raises(Broken):
        getattr(properties, name)(properties.subject(str(path)))


# ---- in runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, hidden", [
    ({"ffn": "moe", "attention": "talking_heads"},
     {"key", "query", "value", "out", "up", "down", "router", "before", "after"}),
    ({"model": "lstm"}, {"input", "recurrent"}),
    ({"model": "encoder_decoder"}, {"key", "query", "value", "out", "up", "down"}),
])  # fmt: skip
def test_roles_of_models(changes, hidden):
    config = edit(Config(), **(SMALL | changes))
    roles = optimizer.roles(build_model(config, build_task(config)))
    named = {part: checkpoint.named_leaves(getattr(roles, part)) for part in ("decays", "stacked", "hidden")}
    found = {name for name, is_hidden in named["hidden"].items() if is_hidden}
    matrix = lambda name: name.removesuffix(".kernel").rpartition(".")[2]
    assert {matrix(name) for name in found} == hidden
    assert all(named["decays"][name] for name in found)
    leaves = checkpoint.named_leaves(shapes(config, build_task(config))[1])
    assert {leaves[name].ndim - int(named["stacked"][name]) for name in found} == {2}


def test_state_lies_as_its_parameters_do():
    for choice, kept in (("muon", 1), ("lion", 1), ("adafactor", 1), ("schedule_free", 2), ("sophia", 2)):
        changes = {"layout": "fsdp:4+tensor:2", "optimizer": choice, "schedule": "constant"}
        config = edit(Config(), **(SMALL | changes))
        task = build_task(config)
        state = abstract(config, task, optimizer.of(config, task))
        places: Any = plan(config, task, 8).of_state(state)
        of: Any = lambda tree: {
            name: leaf
            for name, leaf in checkpoint.named_leaves(tree).items()
            if "stack.periods.0.ffn.up.kernel" in name
        }
        (wanted,) = (place.spec for place in of(places.params).values())
        shared = [place.spec for name, place in of(places.opt).items() if of(state.opt)[name].shape == (2, 16, 64)]
        assert any(wanted) and shared == [wanted] * kept, choice
        others = [place.spec for name, place in of(places.opt).items() if of(state.opt)[name].shape != (2, 16, 64)]
        assert not any(any(spec) for spec in others), choice


RUN = {"schedule": "constant", "warmup": 0, "dropout": 0.1, "eval_batches": 1}


@pytest.mark.full
@pytest.mark.parametrize("choice", ["muon", "schedule_free", "sophia:every=2"])
def test_resumed_it_ends_in_the_same_bits(choice, task, tmp_path):
    config = tiny(task, tmp_path / "short", **RUN, optimizer=choice, steps=2)
    loop.run(config)
    record, extended = grown(config, "steps=4")
    whole = edit(extended, runs=str(tmp_path / "whole"))
    expected = loop.run(whole)
    assert record["metric"] == expected["metric"] and arrays(extended) == arrays(whole)


@pytest.mark.full
def test_the_average_of_schedule_free_is_what_counts(task, tmp_path, caplog):
    """It is scored, saved as the best, loaded, and what another run begins with, z of which begins there."""
    config = tiny(
        task, tmp_path, **RUN, optimizer="schedule_free", steps=4, eval_every=2, select="best", score="validation"
    )
    record = loop.run(config)
    folder = configs.folder(config)
    stored = {name: np.frombuffer(data, np.float32) for name, data in arrays(config).items() if "kernel" in name}
    y, z = (stored[f"state.{part}.head.kernel"] for part in ("params", "opt.1.of.z"))
    np.testing.assert_allclose(stored["state.average.head.kernel"], (y - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(stored["state.average.head.kernel"], y)
    assert trained.evaluate(folder)["metric"] == record["metric"]
    assert "optimizer=schedule_free: the parameters are its average up to step" in caplog.text
    _, _, model = trained.load(folder)
    best = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[("head", "kernel")].get_value()
    assert np.asarray(best).ravel().tobytes() == stored["best.params.head.kernel"].tobytes()
    other = tiny(task, tmp_path, **RUN, optimizer="schedule_free", steps=1, init=str(folder))
    tx, built = optimizer.of(other, build_task(other)), build_task(other)
    taken = initial.take(initial.match(other, built), init(other, built, tx), tx)
    begun = checkpoint.named_leaves(taken)
    for part in ("params", "average", "opt.1.of.z"):
        assert np.asarray(begun[f"{part}.head.kernel"]).tobytes() == stored["best.params.head.kernel"].tobytes(), part


@pytest.mark.full
def test_runs_that_differ_in_rates_share_a_program(task, tmp_path):
    programs.forget()
    words = {"optimizer": "lion", "schedule": "wsd", "steps": 2, "eval_batches": 1}
    for number, changes in enumerate(({}, {"lr": 1e-2, "weight_decay": 0.3, "cooldown": 0.5})):
        loop.run(tiny(task, tmp_path, **words, **changes))
        assert len(programs._KEPT) == 1, number


@pytest.mark.full
def test_a_file_of_ones_own_trains(task, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import optax\n\n\ndef mine(given, *, b1: float = 0.5):\n"
        '    """Signs.\n\n    Options:\n        b1: rate of the average\n    """\n'
        "    return given.rule(optax.ema(b1), optax.scale_by_sign())\n"
    )
    config = tiny(task, tmp_path, optimizer=f"{path}:b1=0.4", steps=2, eval_batches=1)
    assert loop.run(config)["status"] == "ok"
    before = identity(config)
    stored = records.read_json(configs.folder(config) / "config.json") or {}
    assert stored["train"]["optimizer"].endswith("mine.py:b1=0.4")
    assert "optimizer source" in configs.decisive(config) and before == configs.folder(config).name


@pytest.mark.parametrize("text, message", [
    ("optax.stateless(lambda u, p: list(u.values()))", "its updates are not shaped like the parameters"),
    ("optax.stateless(lambda u, p: 1 + 'a')", "TypeError"),
    ("1", "AttributeError"),
])  # fmt: skip
def test_a_broken_file_is_named_before_anything_compiles(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f'import optax\n\ndef mine(given):\n    """Mine."""\n    return {text}\n')
    with pytest.raises(UsageError, match=f"optimizer=.*mine.py.*{message}"):
        check_config(edit(Config(), **SMALL, optimizer=str(path)))


LAYOUTS = """
import json, sys
import jax, numpy as np
from xformers_lab.config import Config, edit
from xformers_lab.model import build_task
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.layout import alone, compile_train_step, layout_of
from xformers_lab.train.state import init, structure

choices, layouts = json.loads(sys.argv[1])
sizes = {"task": "copy", "seq_len": 16, "dim": 16, "heads": 2, "layers": 2, "batch": 8}
results = {}
for choice in choices:
    config = edit(Config(), **sizes, lr=1e-2, optimizer=choice, schedule="constant", warmup=0)
    task = build_task(config)
    tx, graph = optimizer.of(config, task), structure(config, task)
    start = init(config, task, tx)
    batches = [prefetch.checked(task, "train", step) for step in range(2)]

    def trained(layout):
        state = layout.place_state(start)
        compiled = compile_train_step(config, task, graph, tx, layout, state, batches[0])
        for batch in batches:
            state, metrics = compiled.step(state, layout.place_batch(batch))
            assert bool(metrics["ok"])
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt))
        return jax.device_get(state.params), here

    one, kept = trained(alone())
    for text in layouts:
        other, here = trained(layout_of(edit(config, layout=text), task))
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        results[f"{choice} {text}"] = [max(float(np.abs(a - b).max()) for a, b in pairs), here / kept]
print(json.dumps(results))
"""


@pytest.mark.full
def test_layouts_compute_what_one_device_does(tmp_path, monkeypatch):
    """Matrices that are shared out are orthogonalised whole; what lies shared out of the state."""
    choices = ["muon", "adafactor:factored=8", "lion:b1=0.5", "sophia:every=1"]
    results = on_eight(LAYOUTS, [choices, ["fsdp", "data:2+fsdp:2+tensor:2"]], tmp_path, monkeypatch)
    # Lion takes signs, and so does Sophia where there is no curvature: a number whose gradient is rounding moves by the
    # whole rate one way or the other.
    for name, (far, share) in results.items():
        assert far < (2.5e-2 if name.startswith(("lion", "sophia")) else 1e-4), (name, json.dumps(results))
        if not name.startswith("adafactor"):
            assert share < (0.2 if name.endswith(" fsdp") else 0.35), (name, results)
