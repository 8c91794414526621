"""What early exit saves: wall-clock of evaluation and of decoding beside the expected saving of DeeBERT's formula.

    python benchmarks/early_exit.py [--steps 400] [--rounds 5]

A classifier (listops, encoder) and a language model (copy, decoder) are trained with exits, then run at thresholds
from the first exit to the whole depth. Evaluation shrinks the batch as samples leave; decoding runs one sequence, where
a token that left costs the keys and values of the layers above. Each threshold's program is compiled and warmed up
apart; calls are interleaved, and times are minima. "saved" is 1 - time / time of the whole depth; exits are evaluated
there too. Heads cost nothing in the formula, and cost something here. Prints Markdown tables.
"""

import argparse
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.depth.early_exit import expected_saving
from xformers_lab.measure import speed
from xformers_lab.train import loop

LAYERS = 8
THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)


def trained(steps: int, folder: str, **changes):
    base = {"depth": "early_exit", "dim": 128, "heads": 4, "layers": LAYERS, "batch": 32, "steps": steps}
    config = edit(Config(), runs=folder, **(base | changes))
    record = loop.run(config)
    return loop.load(record["run_dir"])


def at_threshold(model, threshold: float):
    """Structure and variables of the model with another threshold."""
    model.stack.threshold = threshold
    return nnx.split(model)


def seconds_of(calls: dict, rounds: int) -> dict[float, float]:
    """Threshold -> the least time of its call; raises what a call raised."""
    found = {}
    for threshold, timing in speed.interleaved(calls, rounds=rounds).items():
        if isinstance(timing, Exception):
            raise timing
        found[threshold] = timing.seconds_min
    return found


def classifier(steps: int, rounds: int, folder: str) -> list[str]:
    _, task, model = trained(steps, folder, task="listops", seq_len=128)
    batch = jax.tree.map(jnp.asarray, task.batch("test", 0))
    calls, lines, told = {}, {}, {}
    for threshold in THRESHOLDS:
        graph, variables = at_threshold(model, threshold)
        run = jax.jit(lambda v, b, graph=graph: nnx.merge(graph, v)(b.inputs, real=b.real))
        calls[threshold] = functools.partial(run, variables, batch)
        logits, aux = calls[threshold]()
        told[threshold] = aux
        right, count = task.metric(logits, batch)
        lines[threshold] = float(right / count)
    times = seconds_of(calls, rounds)
    found = ["| threshold | accuracy | layers | expected saving | ms | saved |", "|---|---|---|---|---|---|"]
    whole = times[THRESHOLDS[-1]]
    for threshold in THRESHOLDS:
        shares = [float(told[threshold][f"exit/{number}"]) for number in range(1, LAYERS + 1)]
        counts = [round(share * len(batch.inputs)) for share in shares]
        seconds = times[threshold]
        found.append(
            f"| {threshold} | {lines[threshold]:.3f} | {float(told[threshold]['computation']):.2f} | "
            f"{expected_saving(counts):.0%} | {1e3 * seconds:.1f} | {1 - seconds / whole:.0%} |"
        )
    return found


def decoder(steps: int, rounds: int, folder: str) -> list[str]:
    _, task, model = trained(steps, folder, task="copy", seq_len=64)
    tokens = jnp.asarray(task.batch("test", 0).inputs[:1])
    calls, told = {}, {}
    for threshold in THRESHOLDS:
        graph, variables = at_threshold(model, threshold)

        def run(variables, tokens, graph=graph):
            model = nnx.merge(graph, variables)
            step = lambda cache, token: model.step(cache, token)[::-1]
            return jax.lax.scan(step, model.init_cache(1, tokens.shape[1]), tokens.T)[1]

        whole = jax.jit(lambda v, t, graph=graph: nnx.merge(graph, v)(t))
        logits, told[threshold] = whole(variables, tokens)
        calls[threshold] = functools.partial(jax.jit(run), variables, tokens)
        np.testing.assert_allclose(calls[threshold]()[:, 0], logits[0], atol=1e-3)
    times = seconds_of(calls, rounds)
    found = ["| threshold | layers | expected saving | us a token | saved |", "|---|---|---|---|---|"]
    most = times[THRESHOLDS[-1]]
    for threshold in THRESHOLDS:
        layers, seconds = float(told[threshold]["computation"]), times[threshold]
        found.append(
            f"| {threshold} | {layers:.2f} | {1 - layers / LAYERS:.0%} | {1e6 * seconds / tokens.size:.0f} | "
            f"{1 - seconds / most:.0%} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="wall-clock of early exit beside the expected saving")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, table in (("classifier, evaluation", classifier), ("language model, decoding", decoder)):
            print(f"\n{name} ({jax.devices()[0].device_kind}, {LAYERS} layers, width 128)\n")
            print("\n".join(table(chosen.steps, chosen.rounds, folder)), flush=True)


if __name__ == "__main__":
    main()
