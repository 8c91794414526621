"""What one more token costs behind a context: full, linear and windowed attention at rising lengths.

    python benchmarks/decode.py [--rounds 7]

The lab's own `xlab bench --pass decode` on 8 heads of 32, batch 8, float32: the prefill of a context, then one token
behind it, with the bytes that are kept of the context. "growth" is the time over that at the shortest context; the time
of a token should be flat for linear and windowed attention, at most 1.3. Results go to benchmarks/results/.
"""

import argparse
import sys

from _duel import save

from xformers_lab import config
from xformers_lab.bench import cells as bench

WORDS = (
    "attention=full,linear,local:window=64",
    "seq_len=256..4096:x4",
    "model=decoder",
    "heads=8",
    "dim=256",
    "batch=8",
)
FLAT = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description="time per token and bytes kept against context length")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    cells, _ = config.sweep(list(WORDS))
    tell = lambda text: print(text, file=sys.stderr, flush=True)
    rows = bench.bench(cells, rounds=chosen.rounds, passes=("forward", "decode"), progress=tell)
    if bad := [row for row in rows if row["status"] != "ok"]:
        raise SystemExit(f"{bad[0]['attention']} at {bad[0]['seq_len']}: {bad[0]['status']}: {bad[0]['reason']}")
    key = lambda row: (row["attention"], row["pass"])
    least = {key(row): row["seconds_min"] for row in sorted(rows, key=lambda row: -row["seq_len"])}
    rows.sort(key=lambda row: (row["pass"] == "decode", row["attention"], row["seq_len"]))
    save("decode", [line(row, least[key(row)]) for row in rows], chosen.rounds)


def line(row: dict, shortest: float) -> dict:
    flat = row["pass"] == "decode" and row["attention"] != "full"
    return {
        "case": row["attention"],
        "pass": "one token" if row["pass"] == "decode" else "prefill",
        "seq_len": row["seq_len"],
        "ms": round(1e3 * row["seconds_min"], 4),
        "median_ms": round(1e3 * row["seconds_median"], 4),
        "growth": round(row["seconds_min"] / shortest, 3),
        "target": FLAT if flat else None,
        "state_bytes": row["state_bytes"],
    }


if __name__ == "__main__":
    main()
