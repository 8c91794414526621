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
