"""Mechanisms side by side with the peers a user would otherwise pick; results go to benchmarks/results/.

    python benchmarks/attention.py [--rounds 7] [--torch-python PATH]

Every figure is a ratio of minima over interleaved rounds, one process each. --torch-python names an interpreter that
has torch and local-attention; by default this one (the extra `peers`).
"""

import argparse
import sys

from _duel import Side, duel, save

# name: (peer, peer's options, our mechanism, our options, target forward, target forward and backward)
DUELS = {
    "full N=1024": ("sdpa", {"T": 1024}, "full", {"T": 1024}, 0.75, 0.80),
    "full N=4096": ("sdpa", {"T": 4096}, "full", {"T": 4096}, 0.75, 0.80),
    "causal N=1024": ("sdpa", {"T": 1024, "causal": True}, "full", {"T": 1024, "causal": True}, 0.85, None),
    "causal N=4096": ("sdpa", {"T": 4096, "causal": True}, "full", {"T": 4096, "causal": True}, 0.85, None),
    "local w=128 causal N=4096": ("local", {}, "local:window=128", {"T": 4096, "causal": True}, 0.65, 0.75),
    "local w=128 both sides N=4096": ("local", {"causal": False}, "local:window=128", {"T": 4096}, 0.65, 0.75),
    "linear causal N=4096": ("linear", {}, "linear", {"T": 4096, "causal": True}, 0.65, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="mechanisms side by side with their peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    chosen = parser.parse_args()
    lab, torch = Side("_lab_side"), Side("_torch_side", chosen.torch_python)
    cases = {}
    for name, (peer, peer_options, choice, options, *_) in DUELS.items():
        for grad in (False, True):
            cases[f"{name}|{grad}|peer"] = (torch, peer, {**peer_options, "grad": grad})
            cases[f"{name}|{grad}|lab"] = (lab, "attention", {"choice": choice, **options, "grad": grad})
    times = duel(cases, chosen.rounds)
    rows = []
    for name, (peer, _, choice, _, *targets) in DUELS.items():
        for grad, target in zip((False, True), targets, strict=True):
            ours, theirs = times[f"{name}|{grad}|lab"], times[f"{name}|{grad}|peer"]
            rows.append(
                row(name, "forward+backward" if grad else "forward", ours, theirs, target)
                | {"peer": peer, "choice": choice}
            )
    save("attention", rows, chosen.rounds)
    lab.close()
    torch.close()


def row(name: str, which: str, ours: dict, theirs: dict, target: float | None) -> dict:
    """One line of the table: milliseconds, the ratio of minima, and both spreads (maximum over minimum)."""
    return {
        "case": name,
        "pass": which,
        "ours_ms": round(ours["min"] * 1e3, 2),
        "peer_ms": round(theirs["min"] * 1e3, 2),
        "ratio": round(ours["min"] / theirs["min"], 3),
        "ratio_of_medians": round(ours["median"] / theirs["median"], 3),
        "our_spread": round(ours["max"] / ours["min"], 2),
        "peer_spread": round(theirs["max"] / theirs["min"], 2),
        "target": target,
    }


if __name__ == "__main__":
    main()
