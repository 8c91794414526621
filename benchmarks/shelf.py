"""The attention shelf side by side with the packages a user would otherwise pick, and with our own full attention.

    python benchmarks/shelf.py [--rounds 5] [--only WORD] [--torch-python PATH]

H = 8 heads of 64 (layers: width 512, projections included), float32, batch 1. Every figure is a ratio of minima over
interleaved rounds, one process each; compilation and warm-up apart. Results go to benchmarks/results/.
"""

import argparse
import sys

from _duel import Side, duel, keep, save
from attention import row

LONGFORMER, BIGBIRD = "local:window=128", "bigbird:block=64"
# name: (peer, its options, our case, our options, target forward, target forward and backward)
DUELS = {
    "BigBird core, block 64, N=4096": ("bigbird", {}, "attention", {"choice": BIGBIRD, "T": 4096}, 0.25, 0.40),
    "Longformer core, window 128, N=4096": (
        "longformer", {}, "attention", {"choice": LONGFORMER, "T": 4096}, 0.45, 0.30
    ),
    **{
        f"flex, {name} mask, N={T}": (
            "flex", {"T": T, "pattern": name}, "attention", {"choice": choice, "T": T}, 1.0, None
        )
        for name, choice in (("longformer", LONGFORMER), ("bigbird", BIGBIRD))
        for T in (1024, 4096, 16384)
    },
    "Performer core, N=4096": ("performer", {}, "attention", {"choice": "performer:features=256", "T": 4096}, 0.5, 0.5),
    "Performer core, causal, N=1024": (
        "performer", {"T": 1024, "causal": True},
        "attention", {"choice": "performer:features=256", "T": 1024, "causal": True}, 0.15, 0.15,
    ),
    "Performer core, causal, N=4096": (
        "performer", {"causal": True},
        "attention", {"choice": "performer:features=256", "T": 4096, "causal": True}, 0.15, 0.15,
    ),
    "Nystrom layer, 64 landmarks, N=4096": ("nystrom", {}, "layer", {"choice": "nystrom:landmarks=64"}, 0.7, 0.7),
    "Linformer layer, rank 256, N=4096": ("linformer", {}, "layer", {"choice": "linformer:rank=256"}, 0.7, 0.7),
    "axial layer, 64x64": ("axial", {}, "layer", {"choice": "axial:shape=64x64"}, 0.7, 0.7),
    "Routing layer, window 128, N=4096": ("routing", {}, "layer", {"choice": "routing:window=128"}, 0.7, 0.7),
    "Reformer layer, bucket 64, 4 rounds, N=4096": (
        "reformer", {}, "layer", {"choice": "reformer:chunk=64:rounds=4"}, 0.7, 0.7
    ),
    **{
        f"{kind.upper()}, {layers} layer{'s' * (layers > 1)}, N=128, batch 32, width 256": (
            "recurrent", {"kind": kind, "layers": layers}, "recurrent", {"kind": kind, "layers": layers}, 2.5, 2.5
        )
        for kind in ("lstm", "gru")
        for layers in (1, 2)
    },
}  # fmt: skip
# Our own full causal attention over our own mechanism, forward: at least so many times slower.
SPEED_UPS = [("local:window=128", 4096, 3), ("local:window=128", 16384, 8), ("linear", 4096, 6), ("linear", 16384, 15)]


def main() -> None:
    parser = argparse.ArgumentParser(description="the attention shelf side by side with its peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--torch-python", default=sys.executable)
    chosen = parser.parse_args()
    lab, torch = Side("_lab_side"), Side("_torch_shelf", chosen.torch_python)
    duels = {name: duel for name, duel in DUELS.items() if chosen.only.lower() in name.lower()}
    rows, name_of_file = [], "shelf" + (f"-{chosen.only}" if chosen.only else "")
    # Case by case, so that a machine's memory holds two at a time; the rounds of a case are interleaved.
    for name, (peer, theirs, kind, ours, *targets) in duels.items():
        for grad, target in zip((False, True), targets, strict=True):
            if grad and peer == "flex":
                continue
            times = duel(
                {"peer": (torch, peer, {**theirs, "grad": grad}), "lab": (lab, kind, {**ours, "grad": grad})},
                chosen.rounds,
            )
            rows.append(
                row(name, "forward+backward" if grad else "forward", times["lab"], times["peer"], target)
                | {"peer": peer, "choice": ours.get("choice", peer)}
            )
            print(rows[-1], file=sys.stderr, flush=True)
            keep(name_of_file, rows, chosen.rounds)  # what is measured is kept, whatever happens to the next case
    for choice, T, least in SPEED_UPS if chosen.only in ("", "speed-up") else ():
        cases = {
            name: (lab, "attention", {"choice": of, "T": T, "causal": True})
            for name, of in (("mechanism", choice), ("full", "full"))
        }
        times = duel(cases, chosen.rounds)
        rows.append(
            row(f"{choice} causal, N={T}", "forward", times["mechanism"], times["full"], 1 / least)
            | {"peer": "our full", "choice": choice}
        )
        print(rows[-1], file=sys.stderr, flush=True)
        keep(name_of_file, rows, chosen.rounds)
    save(name_of_file, rows, chosen.rounds)
    lab.close()
    torch.close()


if __name__ == "__main__":
    main()
