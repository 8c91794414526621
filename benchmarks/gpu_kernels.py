"""Attention over patterns of positions on one GPU, by every kernel that runs it, beside PyTorch on the same GPU.

    python benchmarks/gpu_kernels.py [--minutes 7.5] [--out DIR] [--torch-python PATH]
    python benchmarks/gpu_kernels.py --tiny        # whether the script works: a CPU, kernels interpreted

First, whether each kernel computes the definition of every patterned mechanism of the shelf and leaks nothing. Then
times, in bfloat16, forward and forward+backward, causal: each mechanism by the block-sparse kernel, by the block engine
and by cuDNN where it has it; linear attention; PyTorch's scaled_dot_product_attention and flex_attention. Last, blocks
of other sizes. Every sequence length has as many tokens in all. Cases are built by several processes at once, and timed
one after the other when all of a length are built, in rounds of random order; the figure is the minimum. Results are
written as they come, the most telling lengths first, and what does not fit into the time is left out and said.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import queue
import random
import sys
import time

from _duel import Side, keep

LENGTHS, TOKENS, HEADS, HEAD = (4096, 16384, 1024, 65536), 65536, 16, 64
ROUNDS, INNER = 3, 10
SHORT = 0.03  # seconds: what is shorter is repeated within a round
# By which mechanism torch is asked, and how long: flex_attention takes ten seconds to compile.
SDPA, FLEX, FLEX_LENGTHS = ("full",), ("local", "longformer", "strided"), (4096, 16384)
# Queries and keys per block, warps, stages.
TUNINGS = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 8, 2),
    (64, 32, 4, 3),
    (128, 128, 8, 2),
    (32, 32, 4, 3),
]
TUNED, TUNED_LENGTH = ("full", "local", "bigbird"), 16384
BUILDERS, TORCH_BUILDERS = 6, 2


class Bench:
    def __init__(self, chosen: argparse.Namespace):
        self.began, self.chosen, self.rows = time.monotonic(), chosen, []
        small = chosen.tiny
        self.lengths = (128,) if small else LENGTHS
        self.sizes = {"N": 2, "H": 16} if small else {"N": HEADS, "H": HEAD}
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the GPU
        if small:
            os.environ.update(INTERPRETED="1", JAX_PLATFORMS="cpu")
        self.labs = [Side("_gpu_side") for _ in range(1 if small else BUILDERS)]
        self.torch = [Side("_torch_gpu_side", chosen.torch_python) for _ in range(1 if small else TORCH_BUILDERS)]
        self.about = self.labs[0].ask(call="machine", options={})["value"]
        names = self.labs[0].ask(call="patterned", options={})["value"]
        self.names = ["full", "strided"] if small else names

    def left(self) -> float:
        """Seconds."""
        return 60 * self.chosen.minutes - (time.monotonic() - self.began)

    def add(self, **row) -> None:
        self.rows.append(row)
        print(f"{time.monotonic() - self.began:5.0f} s", *(f"{key}={value}" for key, value in row.items()), flush=True)
        label = "-".join(self.about["gpu"].lower().split())
        keep(f"gpu_kernels-{label}", self.rows, ROUNDS, self.about, folder=self.chosen.out)

    def each(self, work: list[tuple[dict, dict]]):
        """(side, row, answer) of requests as they come, shared out to this laboratory's processes and to torch's."""
        sides, shares = [*self.labs, *self.torch], [[] for _ in range(len(self.labs) + len(self.torch))]
        ours, theirs = itertools.cycle(shares[: len(self.labs)]), itertools.cycle(shares[len(self.labs) :])
        for row, request in work:
            next(theirs if row.get("kernel") in ("sdpa", "flex") else ours).append((row, request))

        answers: queue.Queue = queue.Queue()

        def ask(side: Side, share) -> None:
            for row, request in share:
                answer = {"error": "no time was left"} if self.left() < 0 else tried(side, request)
                answers.put((side, row, answer))

        with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
            asking = [pool.submit(ask, side, share) for side, share in zip(sides, shares, strict=True)]
            for _ in work:
                yield answers.get()
            for one in asking:
                one.result()

    def check(self) -> None:
        work = []
        for choice, causal in itertools.product(self.names, (True, False)):
            options = {"choice": choice, "kernel": "pallas", "causal": causal}
            work.append(({"part": "check", **options}, {"call": "check", "options": options}))
        for _, row, answer in self.each(work):
            self.add(**row, **(answer.get("value") or failed(answer)))

    def time(self, cases: list[tuple[dict, dict]]) -> None:
        """cases: (row, request to open it)."""
        built = []
        for side, row, answer in self.each(cases):
            if "error" in answer:
                self.add(**row, **failed(answer))
            else:
                built.append((side, row, answer["first"]))
        labels = {id(row): request["open"] for row, request in cases}
        times: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            random.Random(number).shuffle(built)
            for side, row, _ in built:
                label = labels[id(row)]
                known = times.setdefault(label, [])
                repeat = max(1, round(SHORT / known[0] / INNER)) if known else 1
                answer = tried(side, {"time": label, "repeat": repeat})
                if "seconds" in answer:
                    known.append(answer["seconds"] / INNER)
            if self.left() < 0:
                break
        for _, row, first in built:
            known = times[labels[id(row)]]
            measured = (
                {"ms": min(known) * 1e3, "spread": max(known) / min(known), "rounds": len(known)} if known else {}
            )
            self.add(**row, **measured, first_s=first)

    def cases(self, T: int) -> list[tuple[dict, dict]]:
        work = []
        for choice, grad in itertools.product(self.names, (True, False)):
            kernels = ["pallas", "blocks"] + (["cudnn"] if choice in ("full", "local") else [])
            work += [self.case("attention", choice, kernel, T, grad) for kernel in kernels]
        for grad in (True, False):
            work.append(self.case("attention", "linear", "auto", T, grad))
            work += [self.case("sdpa", choice, "sdpa", T, grad) for choice in SDPA]
            work += [self.case("flex", choice, "flex", T, grad) for choice in FLEX if T in FLEX_LENGTHS]
        return work

    def case(self, name: str, choice: str, kernel: str, T: int, grad: bool, **more) -> tuple[dict, dict]:
        row = {"part": "tuning" if more else "time", "choice": choice, "kernel": kernel, "T": T}
        row |= {"pass": "forward+backward" if grad else "forward", **more}
        options = {"choice": choice, "T": T, "B": 1 if self.chosen.tiny else max(1, TOKENS // T), **self.sizes}
        options |= {"causal": True, "grad": grad, **more} | ({"kernel": kernel} if name == "attention" else {})
        return row, {"open": str(row), "name": name, "options": options}

    def run(self) -> None:
        self.check()
        for T in self.lengths:
            self.time(self.cases(T))
        tunings = TUNINGS[:1] if self.chosen.tiny else TUNINGS
        T = self.lengths[0] if self.chosen.tiny else TUNED_LENGTH
        tried_out = itertools.product([name for name in TUNED if name in self.names], tunings, (True, False))
        self.time(
            [self.case("tuned", choice, "pallas", T, grad, tuning=list(sizes)) for choice, sizes, grad in tried_out]
        )

    def close(self) -> None:
        for side in (*self.labs, *self.torch):
            with contextlib.suppress(OSError):  # one that has ended
                side.close()


def tried(side: Side, request: dict) -> dict:
    """An answer, also where the process has ended."""
    try:
        return side.tried(**request)
    except (SystemExit, OSError) as ended:
        return {"error": str(ended)}


def failed(answer: dict) -> dict:
    return {"failed": answer["error"].strip().splitlines()[0][:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description="attention over patterns on one GPU, beside PyTorch")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--tiny", action="store_true", help="try the script itself, without a GPU")
    bench = Bench(parser.parse_args())
    bench.run()
    bench.close()


if __name__ == "__main__":
    main()
