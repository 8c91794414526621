"""What decoding costs, against what bounds it and against a peer; results go to benchmarks/results/.

    python benchmarks/decode.py [--rounds 5] [--torch-python PATH]

* One more token behind a context against reading its state once, a sum over it: the lab's own `xlab bench --pass
  decode` on 8 heads of 32, batch 8, float32. Of linear and windowed attention, whose state does not grow, against the
  token behind the shortest context.
* A prompt of 4,096 tokens, read in the parts that generation reads it in, against a forward pass of as many.
* 256 tokens behind 8 prompts of 16, greedily, by a GPT-2 of 4 layers with the same weights on both sides, against
  `generate` of transformers with its static cache. Both sides' logits of the prompts are compared first.

Every figure is a ratio of minima over interleaved rounds. --torch-python names an interpreter that has torch and
transformers; by default this one (the extra `peers`).
"""

import argparse
import sys

import _gpt2
import numpy as np
from _duel import Side, duel, save

LENGTHS = (1024, 4096, 16384)
READS, FLAT, PREFILL = 2.0, 1.3, 1.3
STATES = ("linear", "local:window=64")
# Mechanisms that read a prompt by their chunked form, one of each engine.
READERS = ("linear", "gla", "delta_net", "mamba")


def main() -> None:
    parser = argparse.ArgumentParser(description="decoding against its bounds and a peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable)
    chosen = parser.parse_args()
    lab, torch = Side("_lab_side"), Side("_torch_side", chosen.torch_python)
    agree(lab, torch)
    duels = {}
    for T in LENGTHS:
        duels["full", "one token", "reading its state once", T, READS] = [of(lab, way, "full", T) for way in TOKEN]
    for choice in STATES:
        for T in LENGTHS[1:]:
            pair = [of(lab, "decode", choice, length) for length in (T, LENGTHS[0])]
            duels[choice, "one token", f"one behind {LENGTHS[0]}", T, FLAT] = pair
    for choice in READERS:
        pair = [of(lab, way, choice, 4096) for way in ("prefill", "forward")]
        duels[choice, "prompt", "a forward pass", 4096, PREFILL] = pair
    sides = [(side, "gpt2", {}) for side in (lab, torch)]
    duels["gpt2", "256 tokens of 8", "transformers", _gpt2.PROMPT, None] = sides
    cases = {f"{key}|{place}": case for key, pair in duels.items() for place, case in enumerate(pair)}
    times = duel(cases, chosen.rounds)
    save("decode", [line(key, times[f"{key}|0"], times[f"{key}|1"]) for key in duels], chosen.rounds)
    lab.close()
    torch.close()


TOKEN = ("decode", "read")


def of(lab: Side, direction: str, choice: str, T: int):
    return lab, "of_bench", {"direction": direction, "choice": choice, "T": T}


def agree(lab: Side, torch: Side) -> None:
    """Ends the run where both sides' GPT-2 are not one model."""
    logits = []
    for side in (lab, torch):
        logits.append(np.asarray(side.ask(call="gpt2_logits", options={})["value"]))
    if (gap := np.abs(logits[0] - logits[1]).max()) > 1e-3 * np.abs(logits[1]).max():
        raise SystemExit(f"the two GPT-2 differ by {gap:.3g} of {np.abs(logits[1]).max():.3g}")


def line(key: tuple, ours: dict, other: dict) -> dict:
    """One row: milliseconds, the ratio of minima, spreads (maximum over minimum), and of generation tokens a second."""
    case, what, against, T, target = key
    row = {"case": case, "what": what, "behind": T, "ms": round(1e3 * ours["min"], 4), "against": against}
    row |= {"its_ms": round(1e3 * other["min"], 4), "ratio": round(ours["min"] / other["min"], 3), "target": target}
    row |= {name: round(x["max"] / x["min"], 2) for name, x in (("spread", ours), ("its_spread", other))}
    rate = lambda seconds: round(_gpt2.BATCH * _gpt2.NEW / seconds) if case == "gpt2" else None
    return row | {"tokens_a_second": rate(ours["min"]), "its_tokens_a_second": rate(other["min"])}


if __name__ == "__main__":
    main()
