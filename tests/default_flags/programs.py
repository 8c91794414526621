"""What a program that XLA:CPU compiled must not hold: two faults of jaxlib 0.10.2 that values do not show everywhere.

1. Sums of products. XLA hands some fusions to its YNN kernels. Where such a fusion multiplies and then sums over an
   axis that is not the last, in an array of seven or more axes, processors with AVX2 but no AVX-512 get wrong sums, or
   crash:

       a = b = jnp.ones((1, 2, 1, 1, 3, 16, 16, 8))
       jax.jit(lambda a, b: (a * b).sum(5))(a, b)

2. Calls of LAPACK. Each is run by a thread of the pool, gives parts of its work to the same pool and waits for them:
   two that may run at the same time can wait for each other for ever:

       a = jnp.ones((16, 64, 64)) + 64 * jnp.eye(64)
       jax.jit(lambda a: [jnp.linalg.qr(a + i) for i in range(4)])(a)

Neither the choice of a fusion nor that of a call depends on the processor, so the program tells it everywhere.
"""

import re

MOST_AXES = 6

_FUSION = re.compile(r"kind=kCustom, calls=%([\w.-]+),.*__ynn_fusion")
_REDUCE = re.compile(r" reduce\(%([\w.-]+), .*dimensions=\{([\d,]*)\}")


def faults(program: str) -> list[str]:
    """The lines of an optimised HLO text that hold one of the two."""
    return miscompiled_sums(program) + lapack_calls(program)


def miscompiled_sums(program: str) -> list[str]:
    bodies = dict(re.findall(r"^%([\w.-]+) \(.*?\{\n(.*?)^\}", program, re.S | re.M))
    lines = []
    for name in _FUSION.findall(program):
        body = bodies[name]
        shapes = dict(re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", body))
        for line in body.splitlines():
            if reduce := _REDUCE.search(line):
                axes = len(shapes[reduce[1]].split(","))
                over = {int(axis) for axis in reduce[2].split(",")}
                if axes > MOST_AXES and over != {axes - 1} and " multiply(" in body:
                    lines.append(line.strip())
    return lines


def lapack_calls(program: str) -> list[str]:
    return [line.strip() for line in program.splitlines() if 'custom_call_target="lapack_' in line]
