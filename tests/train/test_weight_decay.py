"""What decays: every parameter of the package says so itself, on every shelf, and matrices alone say that they do."""

import ast
import functools
import pathlib

import jax
import pytest
from flax import nnx
from test_golden_models import Squares

import xformers_lab
from xformers_lab import spec
from xformers_lab.config import Config, edit
from xformers_lab.depth._stack import build_stack
from xformers_lab.errors import Refused, UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.nn.parameters import decays
from xformers_lab.nn.size import Size
from xformers_lab.train import checkpoint, optimizer
from xformers_lab.train.state import merge, shapes

PACKAGE = pathlib.Path(xformers_lab.__file__).parent
SMALL = {"task": "copy", "seq_len": 64, "dim": 16, "heads": 2, "layers": 2}
# What decays and is neither a linear layer's kernel nor the table of tokens: matrices with which states are multiplied.
MATRICES = {
    "attention": {
        "all_attention.keys", "all_attention.values", "capsules.votes", "collaborative.mixing", "gaussian.hidden",
        "gaussian.window_hidden", "linformer.project", "linear.maps", "mca.taps", "multi_token.mixing", "nsa.hidden",
        "nsa.squeezed", "poolingformer.weigh", "sinkhorn.first", "sinkhorn.second", "synthesizer.far",
        "synthesizer.near", "synthesizer.rows", "talking_heads.after", "talking_heads.before", "ttt.weights",
    },
    "depth": {"local_rnn.recurrent"},
    "ffn": {
        "all_attention.keys", "all_attention.values", "gshard.down", "gshard.up", "hash.down", "hash.up", "moe.down",
        "moe.up", "noisy_top.down", "noisy_top.up", "product_key.keys", "product_key.values", "prototypes.down",
        "prototypes.up",
    },
    "memory": set(),
    "model": {"bytenet.taps", "gru.recurrent", "lstm.recurrent", "seq2seq.recurrent"},
    "norm": set(),
    "normaliser": set(),
    "position": {"xl.projection"},
}  # fmt: skip
# What has several axes in its own layer, and is a vector of a head, a place or a position all the same.
VECTORS = {
    "mamba2.scale", "rwkv.decay", "rwkv.bonus", "rwkv.share_k", "rwkv.share_v", "rfa.spread", "xl.u", "xl.v",
    "gaussian.centre", "gaussian.window", "nsa.place", "learned.table", "grid.rows", "grid.columns", "conv.weights",
    "t5.table", "shaw.table", "shaw.of_values", "deberta.table", "tupe.table", "recurrent_memory.table",
    "memformer.table", "set.points", "perceiver.latents", "luna.points", "nystrom.taps", "lite.taps",
    "differential.vectors", "cope.table", "log_linear.spread", "mask_decoder.table",
}  # fmt: skip
OPTIONS = {
    "attention": [
        "gaussian:kind=distance", "gaussian:kind=layer", "linear:features=hedgehog", "streaming:logit=learned",
        "synthesizer:kind=random", "synthesizer:kind=factorised_dense", "synthesizer:kind=factorised_random",
        "linear:features=taylor:width=4", "synthesizer:beside=random:dot=true",
    ],
    "model": ["decoder:tied=true", "encoder", "seq2seq:look=additive:cell=gru:reads=both"],
    "position": ["tupe:relative=t5:reset=true", "shaw:values=true", "deberta:buckets=4:reach=9"],
}  # fmt: skip


def built(**changes):
    """The parameters of a model by name, in shapes: the variables; None where the choice does not stand in it."""
    config = edit(Config(), **(SMALL | changes))
    vit = "vit" in config.model.model
    task, config = (Squares(256, 5), edit(config, seq_len=144)) if vit else (build_task(config), config)
    try:
        return named(nnx.eval_shape(lambda: build_model(config, task)))
    except (UsageError, Refused):
        return None


def named(module) -> dict:
    """A module's parameters by name."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    leaves = jax.tree.leaves_with_path(nnx.state(module, nnx.Param), is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@functools.cache
def of_shelf(shelf: str) -> dict[str, dict]:
    """{choice: its variables} of every choice of a shelf, inside a small model of its own."""
    if shelf == "attention":  # a layer alone has all of them
        size = Size(64, dim=16, heads=2)
        layer = lambda choice: nnx.eval_shape(lambda: spec.build("attention", choice, size, rngs=nnx.Rngs(0)))
        return {choice: named(layer(choice)) for choice in [*spec.names(shelf), *OPTIONS[shelf]]}
    tasks: list[dict] = [{}, {"task": "listops"}]
    if shelf != "model":
        tasks = [{"position": "none"} | task for task in (*tasks, {"task": "lm"})]
    every = {}
    for choice in [*spec.names(shelf), *OPTIONS.get(shelf, [])]:
        key, value = ("norm", f"pre:normaliser=({choice})") if shelf == "normaliser" else (shelf, choice)
        standing = (built(**task | {key: value, "layers": 4 if shelf == "depth" else 2}) for task in tasks)
        every[choice] = next(variables for variables in standing if variables is not None)
    return every


def names(shelf: str, pulled: bool) -> set[str]:
    """choice.parameter of all that decay, or do not."""
    return {
        f"{spec.parse(choice).name}.{name.rpartition('.')[2]}"
        for choice, variables in of_shelf(shelf).items()
        for name, variable in variables.items()
        if decays(variable) == pulled
    }


@pytest.mark.parametrize("shelf", MATRICES)
def test_matrices_decay_and_nothing_else(shelf, capsys):
    """The two lists of a shelf, printed; each parameter says in which it is."""
    for choice, variables in of_shelf(shelf).items():
        for name, variable in variables.items():
            assert "decays" in variable.get_metadata(), f"{choice}: {name} does not say whether it decays"
    pulled, left = names(shelf, True), names(shelf, False)
    with capsys.disabled():
        only = lambda both: ", ".join(sorted({name.rpartition(".")[2] for name in both}))
        print(f"\n{shelf}: decay: {only(pulled)}\n{shelf}: do not: {only(left)}")
    assert {name for name in pulled if name.rpartition(".")[2] not in ("kernel", "embedding")} == MATRICES[shelf]


def test_vectors_of_several_axes_do_not_decay():
    """Those that counting axes would take for matrices, on the shelves that have them."""
    assert set().union(*(names(shelf, False) for shelf in ("attention", "position", "depth"))) >= VECTORS


def test_every_declaration_says_whether_it_decays():
    """In every file of the package and every skeleton: with any option, then, that is not tried above."""
    own = {"Linear", "LayerNorm", "RMSNorm", "Embedding"}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.py.txt")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, where = ast.unparse(node.func), f"{path.relative_to(PACKAGE)}:{node.lineno}"
            if called in ("nnx.Param", "Bank"):
                assert any(word.arg == "decays" for word in node.keywords), f"{where}: decays= is not said"
            if called.startswith("nnx.") and hasattr(nnx.nn, called[4:].lower()):
                pytest.fail(f"{where}: {called} says nothing of decay: use those of nn/, {', '.join(sorted(own))}")


def test_the_mask_is_what_parameters_say():
    """Of a model in shapes as of a real one; stacked or not, an axis of layers counts for nothing."""
    for changes in ({"attention": "full+linear"}, {"model": "encoder_decoder"}, {"depth": "universal"}):
        config = edit(Config(), **(SMALL | changes))
        task = build_task(config)
        mask, params = optimizer.roles(build_model(config, task)).decays, shapes(config, task)[1]
        assert mask == optimizer.roles(merge(*shapes(config, task))).decays, "with shapes for values, as a run has it"
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        named = checkpoint.named_leaves(mask)
        assert any("bias" in name for name in named)
        for name, on in named.items():
            assert on == (name.rpartition(".")[2] in ("kernel", "embedding")), name


def test_a_parameter_that_says_nothing_decays_as_its_axes_say():
    """In a file of the user's; one that says so is believed, however many axes it has."""

    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.gains = nnx.Param(jax.numpy.ones((2, 3)), decays=False)
            self.row = nnx.Param(jax.numpy.ones(3), decays=True)

    for layer in (Mine(nnx.Rngs(0)), build_stack(lambda _, rngs: Mine(rngs), [0, 1], nnx.Rngs(0))):
        says = {name: decays(getattr(layer, name)) for name in ("gains", "row")}
        assert says == {"gains": False, "row": True}
        assert layer.linear.bias is not None
        assert (decays(layer.linear.kernel), decays(layer.linear.bias)) == (True, False)
