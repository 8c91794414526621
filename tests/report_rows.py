"""Rows of a comparison and of a bench as they might have been measured, and what reports make of them."""

import io
import math
import pathlib
import random

from rich.console import Console

from xformers_lab.report import html, table

KEYS = ["task", "seq_len", "attention"]
ATTENTIONS = ("full", "local:window=16", "strided:stride=8", "linear", "axial")
PAYLOAD = '</script><script>document.title="owned"</script><img src=x onerror=document.title="owned">'
# Text that a browser would run if a page did not escape it, for every place of a page.
PAYLOADS = (
    PAYLOAD,
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre><script>alert(1)</script>",
    "</text></svg><script>alert(1)</script>",
    "</textarea><img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<iframe src=https://example.org>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href=https://example.org>",
    "<form action=https://example.org><input autofocus onfocus=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "]]><script>alert(1)</script>",
    "\u2028\u202e<!--<script>alert(1)//",
)
HOSTILE = (PAYLOAD, "[bold]x[/bold]", "=1+1", "a-very-long-name" * 20, '\x1b[31mred\u202eder\\" + alert(1)')


def cell(attention="full", task="mqar", seq_len=64, seed=0, metric=0.9, **more) -> dict:
    lower = task == "lm"
    row = {
        "attention": attention,
        "task": task,
        "seq_len": seq_len,
        "seed": seed,
        "id": f"{attention}-{task}-{seq_len}-{seed}",
        "run_dir": f"runs/{task}/x",
        "kind": "compare",
        "status": "ok",
        "metric": metric,
        "metric_name": "bits/byte" if lower else "accuracy",
        "higher_is_better": not lower,
        "chance": 8.0 if lower else 0.125,
        "loss": 1.5,
        "tokens_per_second": 100_000.0 * 64 / seq_len,
        "seconds_min": 0.010,
        "seconds_median": 0.012,
        "compile_seconds": 1.5,
        "flops": 800_000_000,
        "parameters": 132_480,
        "temp_bytes": int(3.4 * 2**20),
        "steps": 300,
        "curve": [[step, 3.0 * math.exp(-step / 100)] for step in range(0, 300, 3)],
    }
    row["config"] = {
        "task": task,
        "seq_len": seq_len,
        "seed": seed,
        "runs": "runs",
        "model": {"attention": attention, "norm": "pre", "dim": 64},
        "train": {"steps": 300, "lr": 0.003},
    }
    return row | more


def failed(status: str, reason: str, **where) -> dict:
    nothing = dict.fromkeys(("metric", "loss", "tokens_per_second", "seconds_min", "seconds_median", "temp_bytes"))
    return cell(**where) | nothing | {"status": status, "reason": reason, "curve": []}


def sample(names=ATTENTIONS, seeds=(0,), lengths=(64, 128, 256)) -> list[dict]:
    """Five variants, three lengths, two tasks; three cells have failed in three ways."""
    cells = []
    for task in ("mqar", "lm"):
        for rank, name in enumerate(names):
            for seq_len in lengths:
                for seed in seeds:
                    metric = 2.2 + rank / 10 if task == "lm" else 0.95 - rank / 5
                    metric += 0.001 * seed * (1 + rank)
                    speed = 1e5 * (1 + rank) * (64 / seq_len if rank == 0 else 1)
                    costs = {
                        "seconds_min": 60 * seq_len / speed,
                        "seconds_median": 64 * seq_len / speed,
                        "flops": 10**7 * seq_len,
                        "temp_bytes": 2**14 * seq_len,
                    }
                    cells.append(cell(name, task, seq_len, seed, metric, tokens_per_second=speed, **costs))
    endings = {1: ("oom", "3.1 GiB asked"), 6: ("nan", "loss not finite at step 41"), -1: ("failed", "8 x 8 is not 60")}
    for place, (status, reason) in endings.items():
        where = {key: cells[place][key] for key in ("attention", "task", "seq_len", "seed")}
        cells[place] = failed(status, reason, **where)
    return cells


def bench(attention: str, seq_len: int, seconds: float, exponent: float) -> dict:
    taken = {
        "seconds_min": seconds,
        "seconds_median": seconds,
        "exponent": exponent,
        "temp_bytes": 4 * seq_len,
        "flops": 10,
    }
    return {"attention": attention, "seq_len": seq_len, "kind": "bench", "pass": "forward", "status": "ok", **taken}


BASELINES = ("chance", "bag of tokens", "LSTM")
WINDOWS = ("window 8", "window 64")
STUDY = ("full", "local:window=16", "linear", "bigbird:window=8", "performer", "linformer")


def study(names=STUDY, lengths=(64, 256), seeds=(0, 1, 2), tokens=12, text="") -> list[dict]:
    """A study as `compare tune=lr match=params seeds=3` makes one: variants, baselines and windows, tuned and matched,
    with maps, wrong answers and one cell that failed. text: put into every text that a user may write."""
    cells = []
    for rank, name in enumerate((*names, *BASELINES, *WINDOWS)):
        for seq_len in lengths:
            for seed in seeds:
                dice = random.Random(f"{name} {seq_len} {seed}")
                kind = "baseline" if name in BASELINES else "range" if name in WINDOWS else "variant"
                metric = {"variant": 0.93 - 0.07 * rank, "baseline": 0.14 + 0.12 * (rank - len(names)), "range": 0.4}[
                    kind
                ]
                metric += dice.gauss(0, 0.02) - 0.05 * math.log2(seq_len / lengths[0]) / 2
                time = (
                    0.012
                    * (seq_len / 64) ** (1.9 if rank == 0 else 1.05)
                    * (1.0 + 0.1 * rank)
                    * dice.uniform(0.97, 1.03)
                )
                cells.append(_studied(name, kind, seq_len, seed, max(0.02, metric), time, rank, dice, tokens, text))
    where = {key: cells[-1][key] for key in ("attention", "task", "seq_len", "seed", "name", "role")}
    cells[-1] = failed("oom", f"3.1 GiB asked{text}", **where)
    return cells


def _studied(name, kind, seq_len, seed, metric, time, rank, dice, tokens, text) -> dict:
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    best = rates[2] if rank % 3 else rates[-1]
    points = [
        {"lr": rate, "metric": metric - 0.1 * abs(math.log10(rate / best)), "loss": 1.0, "status": "ok"}
        for rate in rates
    ]
    points[0] |= {"metric": None, "loss": None, "status": "nan"} if rank == 1 else {}
    row = cell(
        name,
        "copy",
        seq_len,
        seed,
        metric,
        tokens_per_second=32 * seq_len / time,
        eval_tokens_per_second=90 * seq_len / time,
        seconds_min=time * 0.96,
        seconds_median=time,
        prefill_seconds=time / 90,
        token_seconds=time / 4000,
        temp_bytes=int(2**14 * seq_len * (1 + rank / 4) * (seq_len / 64 if rank == 0 else 1)),
        state_bytes=1024 * seq_len * (1 + rank),
        flops_per_token=2.1e6 * (1 + rank / 20) * (1 + (seq_len / 640 if rank == 0 else 0.05)),
        parameters=132_480 + 900 * rank,
        curve=[
            [step, 0.4 + 2.6 * math.exp(-step / (60 + 12 * rank)) + dice.gauss(0, 0.07), step * time]
            for step in range(0, 300, 3)
        ],
        command=f"xlab train task=copy attention={name} seq_len={seq_len} seed={seed} lr={best}{text}",
        matched={
            "budget": f"params{text}", "target": 132_480, "reached": 132_480 * (1.004 if rank < 5 else 1.061),
            "ok": rank < 5, "changed": {f"ffn_dim{text}": [256, 256 + 8 * rank]},
        },
        shared={"status": "ok", "metric": metric - 0.03 * (rank % 3 == 0), "knobs": {"lr": 3e-3}},
        tuning={
            "knobs": ["lr"], "share": 0.2, "steps": 60, "split": "validation", "metric_name": "accuracy" + text,
            "higher_is_better": True, "best": {"lr": best}, "edge": best == rates[-1], "widened": best == rates[-1],
            "points": points,
        },
        by_length=[
            {"seq_len": seq_len * times, "metric": max(0.02, metric - 0.2 * math.log2(times)), "examples": 256}
            for times in (2, 4)
        ],
        wrong=[
            {"input": f"3 1 4 1 5 9 2 6{text}", "answer": f"3 1 4 1{text}", "said": f"3 1 4 4{text}"} for _ in range(3)
        ],
    )  # fmt: skip
    row["config"] = row["config"] | {"batch": 32}
    if kind != "variant":
        row |= {"name": name + text, "role": kind}
    elif seed == 0 and tokens:
        row["maps"] = _weights(rank, tokens, dice, text)
    return row


def _weights(rank: int, tokens: int, dice: random.Random, text: str) -> dict:
    """Two layers of two heads, causal; the first looks back a fixed way, the second at what is near."""
    spoken = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "grey", "dog")
    words = [f"{spoken[at % len(spoken)]}{text}" for at in range(tokens)]

    def head(number: int) -> list[list[int]]:
        rows = []
        for query in range(tokens):
            row = [
                math.exp(-abs(query - key - 3 * number) / (0.5 + rank)) * dice.uniform(0.5, 1)
                for key in range(query + 1)
            ]
            rows.append([round(255 * weight / sum(row)) for weight in row] + [0] * (tokens - query - 1))
        return rows

    layers = [[head(number + layer) for number in range(2)] for layer in range(2)]
    return {"tokens": words, "queries": words, "layers": layers, "implied": rank > 1}


def printed(cells, keys, width=100, terminal=False) -> str:
    page = io.StringIO()
    table.print_rows(cells, keys, Console(file=page, width=width, force_terminal=terminal, color_system=None))
    return page.getvalue()


def written(path: pathlib.Path, cells, keys, title="Attention", command="xlab compare", **more) -> str:
    html.write_report(cells, keys, path, title=title, command=command, **more)
    return path.read_text(encoding="utf-8")
