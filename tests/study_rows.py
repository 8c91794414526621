"""Rows of a study as it might have been run: variants tuned and matched, baselines and windows beside them."""

from report_rows import cell


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
