"""Depths: what they say that a token cost, how large the states are that they give their first layer, and which of
their parameters decay; see inside.py for the rest."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.check import inside
from xformers_lab.check.subject import Broken, NotApplicable
from xformers_lab.check.tiny import Inside, Tiny
from xformers_lab.config import edit
from xformers_lab.errors import UsageError
from xformers_lab.measure.flops import count_flops
from xformers_lab.model import size_of
from xformers_lab.model._block import Block
from xformers_lab.model._transformer import Transformer
from xformers_lab.train import checkpoint, optimizer


def subject(choice: str) -> Inside:
    return Inside("depth", choice, {"depth": choice}, layers=(3, 4), both=True)


def computation(subject: Inside) -> None:
    """It says how many layers a token passed."""
    metrics = subject.model.trained(1)[1][0]
    if "computation" not in metrics:
        raise Broken('its aux lacks "computation", the layers that a valid token passed through on average')
    if not 0 < (spent := float(metrics["computation"])) < math.inf:
        raise Broken(f'"computation" is {spent:g}, and should be a number of layers')


def computes_again(subject: Inside) -> None:
    """With remat its layers are computed again in the backward pass, with full more of them than with dots."""
    model = subject.model
    try:
        steps = {remat: model.step(remat=remat) for remat in ("none", "dots", "full")}
    except UsageError as reason:
        raise NotApplicable(str(reason)) from None
    arguments = model.first_state(), model.task.batch("train", 0)
    flops = {remat: count_flops(step, *arguments) for remat, step in steps.items()}
    if not flops["none"] < flops["dots"] < flops["full"]:
        counted = ", ".join(f"{count:,} with remat={remat}" for remat, count in flops.items())
        raise Broken(
            f"a training step has {counted} FLOPs, which should be more each time: run layers by `run_stack` or "
            "`run_layer` of depth/_stack.py"
        )


def unit_size(subject: Inside) -> None:
    """What its first layer is given at the start is as large as the tokens, nearly, so that depths do not differ in
    scale; also with positions that it adds again."""
    for position in ("none", "sinusoidal"):
        size = _first_input(subject.model, position)
        if abs(size - 1) > inside.UNIT:
            raise Broken(f"with position={position} unit vectors reach its first layer {size:.3g} {inside.QUIETER}")


def _first_input(model: Tiny, position: str) -> float:
    """The root mean square of the states that the first sub-layer is given, where that of the tokens is 1."""
    config = edit(model.config, position=position, dim=128)
    seen: list[float] = []

    class Watched(Block):
        """A block that tells how large what it is given is; the first one that is called is the first layer."""

        def attend(self, x, *args, **options):
            tell(x)
            return super().attend(x, *args, **options)

        def apply_ffn(self, x, *args, **options):
            tell(x)
            return super().apply_ffn(x, *args, **options)

    def tell(x):
        """Rows of zeros fill up segments."""
        rows = jnp.square(x.astype(jnp.float32)).mean(-1)
        jax.debug.callback(lambda size: seen.append(float(size)), jnp.sqrt(rows.sum() / (rows > 0).sum()))

    class Watching(Transformer):
        causal = model.causal

        def block(self, size, attention, **options):
            return Watched(size, attention, **options)

    built = Watching(size_of(config), config=config, task=model.task, rngs=nnx.Rngs(0))
    table = built.embedding.embedding
    sizes = jnp.sqrt(jnp.square(table[...] * built.embedding.scale).mean(-1, keepdims=True))
    table[...] = table[...] / sizes  # of exactly unit size, for the draw is no matter here
    graph, variables = nnx.split(built)
    jax.block_until_ready(jax.jit(lambda variables, x: nnx.merge(graph, variables)(x)[0])(variables, model.tokens))
    jax.effects_barrier()
    return seen[0]


def matrices_decay(subject: Inside) -> None:
    """Weight decay takes kernels for matrices, and biases and scales, however many axes they have, for vectors."""
    for name, decays in checkpoint.named_leaves(
        optimizer.roles(subject.model.built(subject.model.variables)).decays
    ).items():
        last = name.rpartition(".")[2]
        if decays != (last == "kernel") and last in ("kernel", "bias", "scale"):
            raise Broken(
                f"{name} {'would' if decays else 'would not'} decay: say what it is where it is declared, "
                f"nnx.Param(value, decays={not decays}); and stack layers with `build_stack` of depth/_stack.py"
            )


PROPERTIES = [*inside.PROPERTIES, computation, computes_again, unit_size, matrices_decay]
