"""A whole training step side by side with the same model in plain PyTorch, eager and compiled.

    python benchmarks/train_step.py [--rounds 7] [--torch-python PATH]

4 layers, width 256, 4 heads, 512 positions, batch 8, bytes. Results go to benchmarks/results/.
"""

import argparse
import sys

from _duel import Side, duel, save
from attention import row

TARGET = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description="a training step side by side with PyTorch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    chosen = parser.parse_args()
    lab, torch = Side("_lab_side"), Side("_torch_side", chosen.torch_python)
    cases = {
        "lab": (lab, "train_step", {}),
        "torch eager": (torch, "train_step", {}),
        "torch compiled": (torch, "train_step", {"compiled": True}),
    }
    times = duel(cases, chosen.rounds)
    rows = [row("train step", f"against {peer}", times["lab"], times[peer], TARGET) for peer in list(cases)[1:]]
    save("train_step", rows, chosen.rounds)
    lab.close()
    torch.close()


if __name__ == "__main__":
    main()
