"""What a row says of decoding, of the speed of evaluation, and of the seconds behind its curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task
from xformers_lab.train import decoding, loop, programs

pytestmark = pytest.mark.usefixtures("whole_ends")
FIGURES = ("prefill_seconds", "token_seconds", "eval_tokens_per_second")


def small(runs, **changes) -> Config:
    words = {"task": "copy", "seq_len": 17, "dim": 16, "layers": 2, "batch": 8, "steps": 4, "eval_batches": 1}
    return edit(Config(), runs=str(runs), **(words | changes))


@pytest.mark.full
def test_a_row_says_what_decoding_costs(tmp_path, monkeypatch):
    programs.forget()
    compiled, compile_ = [], programs.compile_decoder
    monkeypatch.setattr(programs, "compile_decoder", lambda *args: compiled.append(args) or compile_(*args))
    rows = [loop.run(small(tmp_path, **changes)) for changes in ({}, {"seed": 1, "lr": 0.1})]
    assert len(compiled) == 1
    for row in rows:
        # Keys and values of every layer in float32, and counts of tokens.
        assert 0 < row["state_bytes"] - 4 * 8 * 17 * 16 * 2 * 2 <= 64
        assert all(0 < row[name] < 60 for name in FIGURES[:2]) and row["eval_tokens_per_second"] > 0
        assert row["flops_per_token"] == row["flops"] / (8 * 17)
        seconds = [point[2] for point in row["curve"]]
        assert len(seconds) == 4 and seconds[0] > 0 and seconds == sorted(seconds)
        timed = row["seconds_median"]  # of steps 3 and 4; 1 and 2 count as much
        assert seconds[1] == pytest.approx(2 * timed) and seconds[3] == pytest.approx(4 * timed)
    programs.forget()


@pytest.mark.full
def test_what_cannot_decode_has_no_figures(tmp_path, caplog):
    row = loop.run(small(tmp_path, task="listops", seq_len=32, steps=2))
    assert [row[name] for name in decoding.FIGURES] == [None] * 3 and row["status"] == "ok"
    assert "could not be timed" not in caplog.text
    assert [point[2] for point in row["curve"]] == [None, None], "no step of two is timed"


def test_a_decoding_that_fails_is_said_and_costs_the_run_nothing(tmp_path, caplog):
    (tmp_path / "broken.py").write_text(
        "from xformers_lab.attention.full import Full\n"
        "class Broken(Full):\n"
        "    def decode_heads(self, cache, call):\n"
        "        raise RuntimeError('no such thing')\n"
        "    decode_heads_several = decode_heads\n"
    )
    row = loop.run(small(tmp_path, attention=str(tmp_path / "broken.py")))
    assert row["status"] == "ok" and row["metric"] is not None
    assert [row[name] for name in decoding.FIGURES] == [None] * 3
    assert "decoding could not be timed (RuntimeError: no such thing)" in caplog.text


@pytest.mark.parametrize("length", [1, 5, 64, 65, 67, 128, 129, 131])
def test_reading_in_parts_reads_every_token(length):
    """Into the very cache that token by token leaves."""
    config = edit(Config(), task="copy", seq_len=131, dim=8, layers=1, heads=1)
    model = build_model(config, build_task(config))
    cache = jax.eval_shape(lambda: decoding.read(model, model.init_cache(1, 131), length))
    assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(lambda x: x.shape, model.init_cache(1, 131))
    if length in (5, 67):
        read = jax.jit(lambda: decoding.read(model, model.init_cache(1, 131), length))()
        assert int(read["at"]) == length
        step = lambda cache, token: (model.step(cache, token)[1], None)
        one = jax.jit(lambda: jax.lax.scan(step, model.init_cache(1, 131), jnp.zeros((length, 1), jnp.int32))[0])()
        for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
