"""Every mechanism that is cheaper than a square of the length, forward and backward at 16,384 and 65,536 tokens.

    python benchmarks/long_sequences.py [--attention NAME,...] [--lengths 16384,65536] [--anew]

What `xlab bench` times: one layer without its projections, width 256, 4 heads, float32, one sequence, causal where the
mechanism can be. A mechanism is one of these where four times the length takes less than eight times the FLOPs that it
declares, between 16,384 and 65,536. Rows that results/ has are not made again, so that a run that was stopped goes on;
`--anew` makes all.
"""

import argparse
import json
import sys

from _duel import keep, place

import xformers_lab as xl
from xformers_lab import spec

NAME = "long_sequences"
LENGTHS = (16384, 65536)
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", default="all")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--anew", action="store_true")
    chosen = parser.parse_args()
    mechanisms = spec.names("attention") if chosen.attention == "all" else chosen.attention.split(",")
    lengths = [int(length) for length in chosen.lengths.split(",")]
    kept = [] if chosen.anew or not place(NAME).is_file() else json.loads(place(NAME).read_text())["rows"]
    made = {(row["attention"], row["N"]): row for row in kept}
    for mechanism in filter(below_a_square, mechanisms):
        missing = [length for length in lengths if (mechanism, length) not in made]
        if not missing:
            continue
        for row in timed(mechanism, missing):
            made[mechanism, row["N"]] = row
            print(row, file=sys.stderr, flush=True)
        keep(NAME, [made[key] for key in sorted(made)], about={"work": "width 256, 4 heads, float32, one sequence"})


def below_a_square(mechanism: str) -> bool:
    short, long = (_flops(mechanism, length) for length in LENGTHS)
    return long < short * (LENGTHS[1] / LENGTHS[0]) ** 1.5


def _flops(mechanism: str, length: int) -> float:
    # Some need no products at all.
    return max(1, spec.build("attention", mechanism, length=length, dim=256, heads=4).cost(length, length).flops)


def timed(mechanism: str, lengths: list[int]) -> list[dict]:
    """Rows of a mechanism: seconds of forward and backward, and what the program takes beside its arguments."""
    table = xl.bench(attention=mechanism, seq_len=lengths, dim=256, heads=4, batch=1, rounds=1, check=False, quiet=True)
    rows = [row for row in table.rows if row["pass"] == "forward+backward"]
    size = lambda row: None if row.get("temp_bytes") is None else row["temp_bytes"] / GIB
    return [
        {"attention": mechanism, "N": row.get("seq_len", lengths[0]), "status": row.get("reason") or row["status"]}
        | {"causal": row.get("causal"), "seconds": row.get("seconds_min"), "GiB": size(row)}
        | {"GFLOP": row["flops"] / 1e9 if row.get("flops") else None, "compile_seconds": row.get("compile_seconds")}
        for row in rows
    ]


if __name__ == "__main__":
    main()
