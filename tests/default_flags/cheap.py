"""Compilation that XLA does little for: what programs of default flags are compared with."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp


def quick_jit(function, **options):
    """jax.jit with the cheapest machine code on CPU."""
    return jax.jit(function, **options, compiler_options=_quick() if jax.default_backend() == "cpu" else None)


@functools.cache
def _quick() -> dict[str, Any]:
    """What makes compilation on CPU cheap, of the options that this XLA knows: they come and go."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
            known[name] = value
    return known
