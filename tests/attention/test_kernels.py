"""Kernels of accelerators compute a mechanism's definition, and leak nothing: in Pallas' interpreter, on a CPU."""

import contextlib
import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import config, spec
from xformers_lab.attention import Attention, MultiHead
from xformers_lab.attention._base.projected import Projected
from xformers_lab.attention._engine import kernels, splash
from xformers_lab.attention._engine.asked import interpreted
from xformers_lab.attention._engine.pattern import Causal
from xformers_lab.errors import Refused
from xformers_lab.measure.flops import count_flops
from xformers_lab.nn.plan import BLOCKS, Kernel, Plan

# Of those that the interpreter runs here.
INTERPRETED = ("splash", "pallas")
LENGTH, LAST = 200, 150  # no multiple of any block; the last query that is asked

# choice, key heads, whether causal, padding, documents; queries.
CASES = [
    ("full", 1, False, True, False, LENGTH),
    ("full", 4, True, True, True, 130),
    ("local:window=20", 2, True, True, False, LENGTH),
    ("dilated:window=8:dilation=4", 2, False, True, True, LENGTH),
    ("multiscale", 2, True, False, True, LENGTH),
    ("softcap:cap=2", 2, True, True, False, LENGTH),
]
# What a kernel may run, and options with which more is.
NAMES = [
    name
    for name in spec.names("attention")
    if spec.entry("attention", name).why_no_kernel is not Attention.why_no_kernel
]
NAMES += ["longformer:projections=shared", "sparse:pattern=random(16,2)|first(3)", "gated:per=head"]


@contextlib.contextmanager
def ran(name: str):
    """What is traced meanwhile runs in the interpreter, by this kernel and nothing else."""
    with interpreted(), kernels.noted() as names:
        yield
    assert set(names) == {name}, names


def built(choice: str, kernel: str, **size) -> MultiHead:
    sizes: dict[str, Any] = {"length": LENGTH, "dim": 64, "heads": 4} | size
    return spec.build("attention", choice, plan=dataclasses.replace(Plan.of("cpu"), kernel=kernel), **sizes)


def drawn(
    mechanism, T: int = LENGTH, padding: bool = False, documents: bool = False
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """q, k and v, and the masks of two samples: one whole, one padded on both sides."""
    size = mechanism.size
    shapes = [(heads, size.head) for heads in (size.heads, size.key_heads, size.key_heads)]
    if isinstance(mechanism, Projected):
        shapes = mechanism.shapes()
    q, k, v = (
        jax.random.normal(jax.random.key(seed), (2, n, *shape))
        for seed, (n, shape) in enumerate(zip((T, LENGTH, LENGTH), shapes, strict=True))
    )
    at = jnp.arange(LENGTH)[None]
    masks = {"valid": (at >= jnp.array([[0], [60]])) & (at < jnp.array([[LENGTH], [140]]))} if padding else {}
    if documents:
        masks["documents"] = jnp.broadcast_to(at // 45, (2, LENGTH))
    return q, k, v, masks


def compared(mechanism, kernel: str, causal: bool, arrays) -> None:
    """A kernel's values and gradients are the definition's, and no number of them comes from what is not seen."""
    q, k, v, masks = arrays
    S, T = k.shape[1], q.shape[1]
    asked = np.arange(S - T, S) <= LAST  # queries behind LAST weigh nothing, so no later key has a gradient

    def both(method: str):
        def loss(q, k, v):
            x = jnp.zeros((len(q), S, mechanism.size.dim))  # for what stands in front of, or behind, the means
            out = mechanism.mix(q, k, v, x=x, causal=causal, method=method, **masks)[0]
            weights = jnp.where(asked[None, :, None, None], jax.random.normal(jax.random.key(3), out.shape), 0)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    with jax.default_matmul_precision("highest"):
        with ran(kernel):
            (_, out), grads = both("attend")
        (_, expected), defined = both("reference")
    for ours, its in zip((out, *grads), (expected, *defined), strict=True):
        np.testing.assert_allclose(ours, its, atol=2e-5, rtol=2e-5)
    if causal:
        assert not np.asarray(grads[1])[:, LAST + 1 :].any() and not np.asarray(grads[2])[:, LAST + 1 :].any()
    if "valid" in masks:
        hidden = ~np.asarray(masks["valid"])
        assert not np.asarray(grads[1])[hidden].any() and not np.asarray(grads[2])[hidden].any()


@pytest.mark.parametrize("kernel", INTERPRETED)
@pytest.mark.parametrize("choice, K, causal, padding, documents, T", CASES)
def test_it_is_the_definition_and_leaks_nothing(choice, K, causal, padding, documents, T, kernel):
    mechanism = built(choice, kernel, kv_heads=K)
    compared(mechanism, kernel, causal, drawn(mechanism, T, padding, documents))


@pytest.mark.full
@pytest.mark.parametrize("kernel", INTERPRETED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_of_the_folder(name, causal, kernel):
    mechanism = built(name, kernel)
    if mechanism.why_no_kernel() is not None:
        with pytest.raises(Refused, match=f"kernel={kernel} cannot run attention="):
            mechanism.check_kernel()
        return
    if causal and "causal" in mechanism.refusals():
        pytest.skip("it cannot be causal")
    compared(
        mechanism, kernel, causal, drawn(mechanism, padding=True, documents="documents" not in mechanism.refusals())
    )


@pytest.mark.parametrize(
    "reason, change",
    [
        ("it is for TPUs, and this is a cpu", {"platform": "cpu"}),
        ("it takes no bias", {"bias": True}),
        ("it computes 128 queries and keys at a time", {"T": 100}),
        ("it takes float32 or bfloat16", {"dtype": "float16"}),
        ("it takes at most 65,536 blocks", {"T": 1 << 18, "S": 1 << 18}),
        ("the pattern has 1 different blocks", {"S": LENGTH + 512}),
    ],
)
def test_what_splash_cannot_run_is_refused_with_the_reason(reason, change, monkeypatch):
    q, k, v, masks = drawn(built("full", "auto", kv_heads=2), padding=True)
    asked = dataclasses.replace(kernels.asked(q, k, v, [Causal()], **masks), platform="tpu")
    assert kernels.chosen(asked) is splash
    assert kernels.chosen(asked, BLOCKS) is None
    if "different" in reason:
        monkeypatch.setattr(splash, "MOST_MASKED", 1)
    call = dataclasses.replace(asked, **change)
    with kernels.noted() as names:
        assert kernels.chosen(call) is None
    assert names == {BLOCKS: f"splash: {splash.why_not(call)}" if call.platform == "tpu" else ""}
    with pytest.raises(Refused, match=f"kernel=splash: {reason}"):
        kernels.chosen(call, "splash")


def test_a_layer_that_no_kernel_knows_refuses_one():
    with pytest.raises(Refused, match="kernel=splash cannot run attention=linear: it is no softmax"):
        built("linear", "splash").check_kernel()
    built("linear", BLOCKS).check_kernel()


def test_one_list_of_kernels():
    """What a config may say is what a plan may hold, and what there is."""
    known = typing.get_args(typing.get_type_hints(config.Train)["kernel"])
    assert known == typing.get_args(Kernel)
    assert [kernels.named(name).name for name in kernels.MODULES] == list(kernels.MODULES)
    assert set(kernels.MODULES) <= set(known)
    assert {name for names in kernels.OF_PLATFORM.values() for name in names} == set(kernels.MODULES)


def test_flops_are_of_the_blocks_that_are_computed():
    """Of 1,024 causal positions three in four blocks of 512 positions: 2 products forward, 3 and 4 backward."""
    mechanism = built("full", "splash", length=1024, kv_heads=1)
    size = mechanism.size
    shapes = [jax.ShapeDtypeStruct((2, 1024, heads, size.head), jnp.float32) for heads in (size.heads, 1, 1)]
    run = lambda q, k, v: mechanism.mix(q, k, v, causal=True)[0]
    one = 3 * 512**2 * 2 * size.head * size.heads * 2
    with ran("splash"):
        assert count_flops(run, *shapes) == 2 * one
        beside = 2 * 2 * size.heads * 1024 * size.head  # of each query its output by its gradient
        assert count_flops(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)), *shapes) == 9 * one + beside
