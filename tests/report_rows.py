"""Rows of a comparison and of a bench as they might have been measured, and what reports make of them."""

import io
import math
import pathlib

from rich.console import Console

from xformers_lab.report import html, table

KEYS = ["task", "seq_len", "attention"]
ATTENTIONS = ("full", "local:window=16", "strided:stride=8", "linear", "axial")
PAYLOAD = '</script><script>document.title="owned"</script><img src=x onerror=document.title="owned">'
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


def printed(cells, keys, width=100, terminal=False) -> str:
    page = io.StringIO()
    table.print_rows(cells, keys, Console(file=page, width=width, force_terminal=terminal, color_system=None))
    return page.getvalue()


def written(path: pathlib.Path, cells, keys, title="Attention", command="xlab compare", **more) -> str:
    html.write_report(cells, keys, path, title=title, command=command, **more)
    return path.read_text(encoding="utf-8")


def study(seeds=(0, 1, 2), lengths=(256, 1024)) -> list[dict]:
    """Rows of a study: three variants, tuned and matched, at two lengths; two baselines and two windows beside them.

    Under the shared recipe full is best, tuned it is linear, whose best lr is at the end of the grid. bigbird cannot be
    matched. Windows do as well as full attention.
    """
    scores = {"full": (0.90, 0.91), "linear": (0.80, 0.95), "bigbird": (0.70, 0.71)}
    beside = {
        "LSTM": ("baseline", 0.91),
        "bag of tokens": ("baseline", 0.20),
        "window 64": ("range", 0.905),
        "window 16": ("range", 0.90),
    }
    cells = []
    for seq_len in lengths:
        for name, (shared, tuned) in scores.items():
            lr = 0.01 if name == "linear" else 0.003
            reached = 108_000 if name == "bigbird" else 100_500
            for seed in seeds:
                noise = 0.002 * ((seed * 7 + len(name)) % 3 - 1)
                speed = 1e5 if name == "full" else 60_000 * seq_len / 256
                more = {
                    "role": "variant",
                    "tokens_per_second": speed * (1 + 0.01 * seed),
                    "seconds_median": 64 * seq_len / speed / (1 + 0.01 * seed),
                    "seconds_min": 60 * seq_len / speed / (1 + 0.01 * seed),
                    "temp_bytes": (2**22 if name == "full" else 2**21) * seq_len // 256,
                    "parameters": reached,
                    "shared": {
                        "status": "ok",
                        "metric": shared + noise,
                        "metric_interval": None,
                        "knobs": {"lr": 0.001},
                    },
                    "tuning": {
                        "knobs": ["lr"],
                        "best": {"lr": lr},
                        "edge": name == "linear",
                        "widened": name == "linear",
                    },
                    "matched": {
                        "budget": "params",
                        "target": 100_000,
                        "reached": reached,
                        "ok": name != "bigbird",
                        "changed": {"ffn": ["mlp", "mlp:ratio=3.62"]} if name == "linear" else {},
                    },
                    "by_length": [{"seq_len": 2 * seq_len, "metric": tuned - 0.3 + noise, "metric_interval": None}],
                }
                cells.append(cell(name, seq_len=seq_len, seed=seed, metric=tuned + noise, **more))
        for name, (role, metric) in beside.items():
            attention = f"local:window={name.split()[-1]}" if role == "range" else "full"
            for seed in seeds:
                noise = 0.002 * ((seed * 5 + len(name)) % 3 - 1)
                cells.append(
                    cell(
                        attention,
                        seq_len=seq_len,
                        seed=seed,
                        metric=metric + noise,
                        role=role,
                        name=name,
                        id=f"{name}{seed}",
                    )
                )
    return cells
