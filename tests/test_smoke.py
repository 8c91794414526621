"""The whole way once, in a minute."""

import json

from xformers_lab.cli import main


def test_train_compare_bench_check(capsys, tmp_path):
    tiny = [f"runs={tmp_path}", "task=copy", "dim=16", "batch=4", "steps=3", "eval_batches=1", "seq_len=16"]
    assert main(["compare", *tiny, "attention=full,local:window=4,linear", "--no-baselines", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert (
        main(
            [
                "train",
                *tiny,
                "layout=pmap",
                "dtype=bfloat16",
                "position=rope",
                "norm=post:normaliser=rmsnorm",
                "ffn=glu",
            ]
        )
        == 0
    )
    assert main(["bench", "attention=linear", "seq_len=16", "--rounds", "1", "--no-check"]) == 0
    assert main(["check", "rezero"]) == 0
