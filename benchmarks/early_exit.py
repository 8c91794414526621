"""What early exit saves: wall-clock of evaluation and of decoding beside the expected saving of DeeBERT's formula.

    python benchmarks/early_exit.py [--steps 400] [--rounds 5]

A classifier (listops, encoder) and a language model (copy, decoder) are trained with exits, then run at thresholds
from the first exit to the whole depth. Evaluation shrinks the batch as samples leave; decoding runs one sequence, where
a token that left costs the keys and values of the layers above. Each threshold's program is compiled and warmed up
apart; calls are interleaved, and times are minima, of a batch or of a decoded token. "saved" is 1 - time / time of the
whole depth; exits are evaluated there too. Heads cost nothing in the formula, and cost something here. Results go to
benchmarks/results/.
"""

import argparse
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _duel import save
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.depth.early_exit import expected_saving
from xformers_lab.measure import speed
from xformers_lab.train import loop
from xformers_lab.train.trained import load

LAYERS = 8
THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)


def trained(steps: int, folder: str, **changes):
    base = {"depth": "early_exit", "dim": 128, "heads": 4, "layers": LAYERS, "batch": 32, "steps": steps}
    config = edit(Config(), runs=folder, **(base | changes))
    record = loop.run(config)
    return load(record["run_dir"])


def at_threshold(model, threshold: float):
    """Structure and variables of the model with another threshold."""
    model.stack.threshold = threshold
    return nnx.split(model)


def seconds_of(calls: dict, rounds: int) -> dict[float, float]:
    """Threshold -> the least time of its call; raises what a call raised."""
    seconds = {}
    for threshold, timing in speed.interleaved(calls, rounds=rounds).items():
        if isinstance(timing, Exception):
            raise timing
        seconds[threshold] = timing.seconds_min
    return seconds


def classifier(steps: int, rounds: int, folder: str) -> list[dict]:
    _, task, model = trained(steps, folder, task="listops", seq_len=128)
    batch = jax.tree.map(jnp.asarray, task.batch("test", 0))
    calls, scores, aux_results = {}, {}, {}
    for threshold in THRESHOLDS:
        graph, variables = at_threshold(model, threshold)
        run = jax.jit(lambda v, b, graph=graph: nnx.merge(graph, v)(b.inputs, valid=b.valid))
        calls[threshold] = functools.partial(run, variables, batch)
        logits, aux = calls[threshold]()
        aux_results[threshold] = aux
        right, count = task.metric(logits, batch)
        scores[threshold] = float(right / count)
    shares = lambda aux: [float(aux.scalars[f"exit/{number}"]) for number in range(1, LAYERS + 1)]
    expected = {
        threshold: expected_saving([round(share * len(batch.inputs)) for share in shares(aux)])
        for threshold, aux in aux_results.items()
    }
    return rows("classifier, a batch", scores, aux_results, expected, seconds_of(calls, rounds), 1)


def decoder(steps: int, rounds: int, folder: str) -> list[dict]:
    _, task, model = trained(steps, folder, task="copy", seq_len=64)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), task.batch("test", 0))
    tokens, calls, scores, aux_results = batch.inputs, {}, {}, {}
    for threshold in THRESHOLDS:
        graph, variables = at_threshold(model, threshold)

        def run(variables, tokens, graph=graph):
            model: Any = nnx.merge(graph, variables)
            step = lambda cache, token: model.step(cache, token)[::-1]
            return jax.lax.scan(step, model.init_cache(1, tokens.shape[1]), tokens.T)[1]

        whole = jax.jit(lambda v, t, graph=graph: nnx.merge(graph, v)(t))
        logits, aux_results[threshold] = whole(variables, tokens)
        right, count = task.metric(logits, batch)
        scores[threshold] = float(right / count)
        calls[threshold] = functools.partial(jax.jit(run), variables, tokens)
        np.testing.assert_allclose(calls[threshold]()[:, 0], logits[0], atol=1e-3)
    expected = {threshold: 1 - float(aux.scalars["computation"]) / LAYERS for threshold, aux in aux_results.items()}
    return rows(
        "language model, a decoded token", scores, aux_results, expected, seconds_of(calls, rounds), tokens.size
    )


def rows(case: str, scores: dict, aux_results: dict, expected: dict, times: dict, calls: int) -> list[dict]:
    """One line for each threshold; times are of so many calls."""
    most = times[THRESHOLDS[-1]]
    return [
        {
            "case": case,
            "threshold": threshold,
            "accuracy": round(scores[threshold], 3),
            "layers": round(float(aux_results[threshold]["computation"]), 2),
            "expected_saving": round(expected[threshold], 3),
            "saved": round(1 - times[threshold] / most, 3),
            "ms": round(1e3 * times[threshold] / calls, 3),
        }
        for threshold in THRESHOLDS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="wall-clock of early exit beside the expected saving")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for measure in (classifier, decoder) for line in measure(chosen.steps, chosen.rounds, folder)]
    save("early_exit", lines, chosen.rounds)


if __name__ == "__main__":
    main()
