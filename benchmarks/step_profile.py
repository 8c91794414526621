"""Where the time of a training step and of an attention layer goes on a CPU, beside what its parts would take alone.

    python benchmarks/step_profile.py [--rounds 8] [--torch-python PATH]

XLA's own profile of the run says when each operation ran; a moment in which several run counts for each in equal
shares, and of several runs the least time of an operation counts. Beside it: every matrix product by itself, in XLA
and in PyTorch, and for what is no product a copy of as many bytes. The sum of these is the floor of the program.
A product whose left side lies transposed goes on in XLA's threads when its operation has ended: its time is in what
runs beside it. Results go to benchmarks/results/.
"""

import argparse
import collections
import functools
import pathlib
import sys
import tempfile
import time

import _lab_side
import jax
import jax.numpy as jnp
from _duel import Side, save
from _hlo import Product, Program
from jax import lax
from jax.profiler import ProfileData

CASES = {
    "train step": ("train_step_program", {}),
    "causal attention, N=1024": ("attention_program", {"T": 1024, "causal": True, "grad": True}),
    "attention, N=4096": ("attention_program", {"T": 4096, "grad": True}),
}
# What an operation belongs to, by the first of these names on its path.
PARTS = ("attention", "ffn", "log_softmax", "norm")
NOT_WORK = ("while", "call", "conditional")
LEAST_MS = 0.5  # shorter groups are one row


def main() -> None:
    parser = argparse.ArgumentParser(description="where the time of a step goes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--torch-python", default=sys.executable)
    chosen = parser.parse_args()
    torch, rows = Side("_torch_side", chosen.torch_python), []
    for case, (name, options) in CASES.items():
        program, run = getattr(_lab_side, name)(**options)
        rows += profiled(case, Program(program.as_text()), run, chosen.rounds, torch)
    save("step_profile", rows, chosen.rounds)
    torch.close()


def profiled(case: str, program: Program, run, rounds: int, torch: Side) -> list[dict]:
    """Rows of one program: a group of operations alike each, the sum, and the program itself without a profile."""
    run()
    whole = min(_seconds(run) for _ in range(rounds))
    profiles = [shares(program, run) for _ in range(rounds)]
    groups: dict[tuple, dict] = collections.defaultdict(lambda: collections.defaultdict(float))
    for name, (_, count) in profiles[0].items():
        instruction = program.instructions[name]
        products = program.products(instruction)
        part = next((part for part in PARTS if part in instruction.source), "other")
        what = " and ".join(map(str, products)) or instruction.opcode
        group = groups[part, what]
        group["ms"] += 1e3 * min(profile[name][0] for profile in profiles if name in profile)
        group["count"] += count
        group["GF"] += count * sum(product.flops for product in products) / 1e9
        if products:
            group["alone"] += 1e3 * count * sum(map(alone, products))
            group["torch"] += 1e3 * count * sum(in_torch(torch, product) for product in products)
        else:
            group["alone"] += 1e3 * count * copied(program.bytes(instruction))
    order = sorted(groups.items(), key=lambda item: -item[1]["ms"])
    rows = [_row(case, part, what, group) for (part, what), group in order if group["ms"] >= LEAST_MS]
    total = {key: sum(group[key] for group in groups.values()) for key in ("ms", "count", "GF", "alone", "torch")}
    least = {key: sum(group[key] for _, group in order if group["ms"] < LEAST_MS) for key in total}
    rows.append(_row(case, "", "all shorter ones", least))
    rows.append(_row(case, "", "sum", total))
    return [*rows, _row(case, "", "the program, without a profile", {"ms": 1e3 * whole, "GF": total["GF"]})]


def _row(case: str, part: str, what: str, group: dict) -> dict:
    shown = lambda key: round(group[key], 2) if group.get(key) else None
    rate = round(group["GF"] / group["ms"] * 1e3) if group.get("GF") and group["ms"] else None
    return {
        "case": case,
        "part": part,
        "operations": what,
        "times": round(group["count"]) if "count" in group else None,
        "ms": round(group["ms"], 2),
        "alone_ms": shown("alone"),
        "torch_alone_ms": shown("torch"),
        "GF_per_s": rate,
    }


def shares(program: Program, run) -> dict[str, tuple[float, int]]:
    """{operation: (seconds, how many times it ran)} of one run, its time shared out among what ran at each moment."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = ProfileData.from_file(str(file)).planes
        ran = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for plane in planes
            for line in plane.lines
            if line.name.startswith("tf_XLA")
            for event in line.events
            if event.name in program.instructions and program.instructions[event.name].opcode not in NOT_WORK
        ]
    moments = sorted((at, i) for i, event in enumerate(ran) for at in event[:2])
    seconds: dict[str, float] = collections.defaultdict(float)
    running: set[int] = set()
    before = 0
    for at, i in moments:
        for j in running:
            seconds[ran[j][2]] += (at - before) / 1e9 / len(running)
        running ^= {i}
        before = at
    counts = collections.Counter(name for _, _, name in ran)
    return {name: (seconds[name], counts[name]) for name in counts}


@functools.cache
def alone(product: Product) -> float:
    """The least seconds of a product by itself."""
    left = (product.K, product.M) if product.left_major else (product.M, product.K)
    right = (product.K, product.N) if product.right_major else (product.N, product.K)
    a, b = (jnp.ones((product.batch, *side) if product.batch > 1 else side) for side in (left, right))
    shift = int(product.batch > 1)
    contracted = ((shift + (not product.left_major),), (shift + (not product.right_major),))
    batch = tuple(range(shift))
    run = jax.jit(lambda a, b: lax.dot_general(a, b, (contracted, (batch, batch))))
    return _least(lambda: run(a, b).block_until_ready())


@functools.cache
def in_torch(torch: Side, product: Product) -> float:
    options = {"B": product.batch, "M": product.M, "K": product.K, "N": product.N}
    options |= {"left_major": product.left_major, "right_major": product.right_major}
    label = str(product)
    torch.ask(open=label, name="product", options=options)
    once = torch.ask(time=label, repeat=1)["seconds"]
    repeat = max(1, round(0.02 / once))
    return min(torch.ask(time=label, repeat=repeat)["seconds"] for _ in range(5))


@functools.cache
def copied(size: int) -> float:
    """The least seconds of a copy that reads and writes so many bytes together."""
    x = jnp.ones(max(1, size // 8), jnp.float32)
    run = jax.jit(lambda x: x + 1)
    return _least(lambda: run(x).block_until_ready())


def _least(run) -> float:
    run()
    return min(_seconds(run) for _ in range(max(5, min(50, round(0.05 / max(_seconds(run), 1e-6))))))


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
