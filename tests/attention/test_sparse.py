"""Patterns as a user writes and sees them: the words, the drawing, what is refused."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from xformers_lab import cli, drawing, spec
from xformers_lab.attention._engine.block_sparse.layout import layout
from xformers_lab.attention._engine.pattern import Band, Causal, Global, Residue
from xformers_lab.attention.sparse import WORDS, Local2D, Random, parsed
from xformers_lab.nn.size import Size

Q, K = np.arange(24)[:, None], np.arange(24)[None]
SEEN = {
    "all": Q == Q,
    "band(3)": abs(Q - K) <= 3,
    "blocks(5)": Q // 5 == K // 5,
    "near(4,2,1)": (Q // 4 - K // 4 <= 2) & (K // 4 - Q // 4 <= 1),
    "dilated(2,3)": (abs(Q - K) <= 6) & ((Q - K) % 3 == 0),
    "strided(7)": (Q - K) % 7 == 0,
    "fixed(6,2)": (Q // 6 == K // 6) | (K % 6 >= 4),
    "first(2)": (Q < 2) | (K < 2),
    "grid(6,1,2)": (abs(Q // 6 - K // 6) <= 1) & (abs(Q % 6 - K % 6) <= 2),
    "band(2)|first(1)&~strided(2)": (abs(Q - K) <= 2) | (((Q < 1) | (K < 1)) & ((Q - K) % 2 != 0)),
    "~(band(2)|first(1))": ~((abs(Q - K) <= 2) | (Q < 1) | (K < 1)),
}


@pytest.mark.parametrize("text", SEEN)
def test_words_mean_what_they_say(text):
    seen = np.broadcast_to(parsed(text, 24)(Q, K), (24, 24))
    np.testing.assert_array_equal(seen, np.broadcast_to(SEEN[text], (24, 24)))


def test_random_draws_as_many_runs_as_asked():
    seen = parsed("random(4,2,7)", 24)(Q, K)
    assert (seen.sum(1) == 8).all()
    assert (parsed("random(4,2,8)", 24)(Q, K) != seen).any()
    assert (parsed("random(4,9)", 24)(Q, K)).all()  # no more runs than there are


def test_every_word_is_tried():
    assert set(WORDS) - {"tree", "random"} <= {text.partition("(")[0] for text in SEEN}
    assert parsed("tree(2,3)", 24)(Q, K)[20].sum() < 24


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("bund(3)", 'did you mean "band"'),
        ("band(3", "cannot be read"),
        ("band(3.5)", "no whole number"),
        ("band(x)", "no whole number"),
        ("band(-1)", "no whole number"),
        ("band()", "takes 1 numbers, got 0"),
        ("band(1,2)", "takes 1 numbers, got 2"),
        ("random(4)", "takes 2 to 3 numbers"),
        ("blocks(0)", "at least 1"),
        ("near(0,1,1)", "at least 1"),
        ("grid(0,1,1)", "at least 1"),
        ("fixed(2,3)", "no more positions"),
        ("band(3)+first(1)", "no word of a pattern"),
        ("__import__(4)", "no word"),
        ("band(3).x", "no word of a pattern"),
        ("3", "no word of a pattern"),
        ("first(1) if all else all", "no word of a pattern"),
        ("(" * 300 + "all" + ")" * 300, "cannot be read"),
        ("bänd(3)", "words, numbers, brackets"),
    ],
)
def test_refused(capsys, pattern, says):
    assert cli.main(["show", f"sparse:pattern={pattern}"]) == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message


def test_is_the_mechanism_it_spells():
    size = Size(length=40, dim=16, heads=2)
    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 40, 2, 8)), jnp.float32) for i in range(3))
    pairs = [
        ("sparse:pattern=band(5)", "local:window=5"),
        ("sparse:pattern=dilated(3,4)", "dilated:window=3:dilation=4"),
    ]
    for (mine, other), causal in itertools.product(pairs, (True, False)):
        out, expected = (spec.build("attention", text, size).mix(q, k, v, causal=causal)[0] for text in (mine, other))
        np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("large", "same"),
    [
        ("tree(2,70)", "tree(2,5)"),
        ("tree(64,26)", "tree(64,1)"),
        ("dilated(2000000000,2)", "dilated(24,2)"),
        ("dilated(3,2000000000)", "blocks(1)"),
        ("strided(2147483647)", "blocks(1)"),
        ("band(2147483647)|first(2147483647)", "all"),
        ("near(2147483647,2147483647,2147483647)", "all"),
        ("grid(2147483647,2147483647,2)", "band(2)"),
    ],
)
def test_numbers_beyond_any_length_count_as_the_length(large, same):
    """As predicates, which run in int32, and as the layouts they are run by."""
    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 24, 1, 8)), jnp.float32) for i in range(3))
    of_large, of_same = (spec.build("attention", f"sparse:pattern={text}", length=24, dim=8) for text in (large, same))
    at = jnp.arange(24)
    for causal in (True, False):
        seen = lambda layer, causal=causal: layer.seen(causal)(at[:, None], at[None])
        np.testing.assert_array_equal(seen(of_large), seen(of_same))
    np.testing.assert_allclose(of_large.mix(q, k, v)[0], of_same.mix(q, k, v)[0], atol=1e-6)


def test_a_pattern_in_a_sweep_keeps_its_commas(capsys, inline):
    assert cli.main(["show", "attention=sparse:pattern=random(16,2)|band(4)", "--json"]) == 0
    assert '"sparse:pattern=random(16,2)|band(4)"' in capsys.readouterr().out


def test_drawing_is_the_pattern(tmp_path, capsys, inline):
    seen = drawing.sampled(Band(2) & Causal(), 12)
    np.testing.assert_array_equal(seen, (Q[:12] >= K[:, :12]) & (Q[:12] - K[:, :12] <= 2))
    inside = np.zeros((12, 12), bool)
    for rectangle in drawing.path(seen).split("M")[1:]:
        at, _, width = rectangle.partition("h")
        x, y = map(int, at.split())
        inside[y, x : x + int(width.partition("v")[0])] = True
    np.testing.assert_array_equal(inside, seen)
    file = tmp_path / "band.svg"
    assert cli.main(["show", "local:window=2", "seq_len=12", "--svg", str(file)]) == 0
    assert drawing.path(seen) in file.read_text()
    for words in (["linear"], ["attention=local"]):
        assert cli.main(["show", *words, "--svg", str(file)]) == 2
    assert cli.main(["show", "local", "--svg", str(tmp_path / "no" / "band.svg")]) == 2
    capsys.readouterr()


def test_long_sequences_are_sampled():
    seen = drawing.sampled(Band(100), 10_000)
    assert seen.shape == (64, 64) and seen.diagonal().all() and not seen[0, -1]


@pytest.mark.parametrize(
    "pattern",
    [
        Band(128),
        Band(128) & Causal(),
        Random(64, 3, 1 << 14),
        Band(64) | Global(1, queries=False),
        (Band(64) | Global(64) | Random(64, 3, 1 << 14)) & Causal(),
        Residue(1 << 14) & Causal(),
        Local2D(1 << 10, 4, 4),
    ],
    ids=["band", "causal band", "random", "global keys", "causal bigbird", "residue", "plane"],
)
def test_a_million_positions_need_no_square(pattern):
    """Layouts of a million positions hold as many blocks as are live: some for each row, not a row of all."""
    T, block = 1 << 20, 64
    groups = [group for part in layout(pattern, T, T, block, block) for group in part.groups]
    assert sum(len(group.rows) for group in groups) >= T // block
    assert sum(len(group.rows) * group.width for group in groups) < 24 * T // block
