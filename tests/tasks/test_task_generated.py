"""The generated tasks against their published definitions."""

import gzip
import time

import numpy as np
import pytest
from conftest import ROOT

from xformers_lab import spec
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Setting, _splits
from xformers_lab.tasks.listops import TOKENS, decode, encode, evaluate, expressions, length_probabilities

PUBLISHED = ROOT.parent / "shared" / "data" / "listops_spinn"


def build(text: str, length: int, batch: int = 64, seed: int = 0):
    return spec.build("task", text, Setting(length, batch, seed))


def test_splits_have_their_shares_and_do_not_follow_the_seed():
    rows = np.random.default_rng(5).integers(0, 50, (20_000, 12))
    shares = np.bincount(_splits.of_rows(rows), minlength=3) / len(rows)
    np.testing.assert_allclose(shares, list(_splits.SHARES.values()), atol=0.01)
    neighbours = np.arange(20_000)[:, None]
    np.testing.assert_allclose(np.bincount(_splits.of_rows(neighbours)) / 20_000, [0.8, 0.1, 0.1], atol=0.01)
    assert _splits.of_rows(np.array([[1, 2, 3]]))[0] == _splits.of_rows(np.array([[1, 2, 3, 0]]))[0]
    names = [_splits.of_bytes(f"file{number}.py".encode()) for number in range(2000)]
    assert abs(names.count("train") / 2000 - 0.8) < 0.04 and set(names) == set(SPLITS)


# ---- mqar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(64, 8, 256), (33, 8, 18), (65, 4, 31)])
def test_mqar_is_zoologys_layout(length, pairs, vocab):
    batch = build(f"mqar:pairs={pairs}:vocab={vocab}", length).batch("train", 0)
    keys, values = batch.inputs[:, 0 : 2 * pairs : 2], batch.inputs[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < vocab // 2 <= values.min() and values.max() < vocab
    for row in range(64):
        assert len(set(keys[row])) == len(set(values[row])) == pairs
        queries = np.flatnonzero(batch.weights[row])
        assert sorted(batch.inputs[row, queries]) == sorted(keys[row])
        assert (queries >= 2 * pairs).all() and (queries % 2 == 0).all()
        pair = dict(zip(keys[row], values[row], strict=True))
        assert [pair[key] for key in batch.inputs[row, queries]] == list(batch.targets[row, queries])
        filler = np.ones(length, bool)
        filler[: 2 * pairs] = filler[queries] = False
        assert (batch.inputs[row, filler] == 0).all() and (batch.weights[row, filler] == 0).all()


def test_mqar_asks_by_the_published_power_law():
    batches = [build("mqar:pairs=4", 64, 512).batch("train", step) for step in range(8)]
    # The first key's place is the first draw, and so follows the law exactly.
    keys = np.concatenate([batch.inputs[:, :1] for batch in batches])
    places = np.concatenate(
        [
            (batch.inputs[:, 8:] == key[:, None]).argmax(1)
            for batch, key in zip(batches, [batch.inputs[:, 0] for batch in batches], strict=True)
        ]
    )
    assert len(keys) == len(places) == 4096 and (places % 2 == 0).all()
    law = np.arange(1, 29) ** (0.01 - 1.0)
    law /= law.sum()
    frequencies = np.bincount(places // 2, minlength=28) / len(places)
    assert np.abs(frequencies - law).max() < 4 * np.sqrt(law.max() / len(places))


def test_mqar_can_fill_with_random_tokens():
    plain, noisy = (build(f"mqar:random_non_queries={on}", 64).batch("train", 0) for on in ("false", "true"))
    np.testing.assert_array_equal(plain.targets, noisy.targets)
    np.testing.assert_array_equal(plain.inputs[plain.inputs > 0], noisy.inputs[plain.inputs > 0])
    assert (noisy.inputs[plain.inputs == 0] > 0).mean() > 0.9


# ---- copy, needle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 10, 63, 64])
def test_copy_fills_the_length(length):
    task = build("copy", length)
    batch = task.batch("train", 0)
    half = (length - 1) // 2
    assert (batch.inputs[:, 0] == 0).all() and (batch.inputs[:, half + 1] == 0).all()
    assert (np.delete(batch.inputs, [0, half + 1], axis=1) > 0).all(), "every position is used"
    scored = batch.weights > 0
    assert (scored.sum(1) == half).all()
    np.testing.assert_array_equal(batch.targets[scored].reshape(64, half), batch.inputs[:, 1 : half + 1])
    np.testing.assert_array_equal(batch.targets[:, :-1][scored[:, :-1]], batch.inputs[:, 1:][scored[:, :-1]])


ORDERS = {"copy": lambda string: string, "reverse": lambda string: string[::-1], "sort": np.sort}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("length", [23, 24])
def test_strings_of_mixed_lengths_are_answered_in_full_and_padded(name, length):
    """Every one of its own length, its answer behind it; padding is neither scored nor seen."""
    batch = build(f"{name}:shortest=3", length).batch("train", 0)
    sizes = batch.weights.sum(1).astype(int)
    assert sizes.min() == 3 and sizes.max() == 11
    for row, size in enumerate(sizes):
        ids, valid = batch.inputs[row], batch.valid[row]
        string, scored = ids[1 : size + 1], np.flatnonzero(batch.weights[row])
        assert (string > 0).all() and ids[0] == ids[size + 1] == 0
        np.testing.assert_array_equal(scored, np.arange(size + 1, 2 * size + 1))
        np.testing.assert_array_equal(batch.targets[row, scored], ORDERS[name](string))
        np.testing.assert_array_equal(batch.targets[row, :-1][valid[1:]], ids[1:][valid[1:]])
        assert (valid == (np.arange(length) < 2 * size + 2)).all() and (ids[~valid] == 0).all()


def test_lengths_of_training_are_uniform():
    task = build("reverse:shortest=3", 24, 1000)
    sizes = np.concatenate([task.batch("train", step).weights.sum(1) for step in range(10)]).astype(int)
    counts = np.bincount(sizes, minlength=12)[3:]
    assert counts.sum() == 10_000 and np.abs(counts - 10_000 / 9).max() < 5 * np.sqrt(10_000 / 9)


@pytest.mark.parametrize("name", ORDERS)
def test_what_is_scored_is_as_long_as_fits_however_training_draws(name):
    """So accuracy belongs to a length, and is of the same strings with lengths mixed or not."""
    for split in SPLITS[1:]:
        mixed, fixed = (build(text, 24).batch(split, 1) for text in (f"{name}:shortest=3", name))
        assert mixed.valid is None
        for each in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(getattr(mixed, each), getattr(fixed, each))


def test_a_short_string_of_training_is_in_no_other_split_at_its_own_length():
    inputs = build("copy:shortest=3", 24, 512).batch("train", 0).inputs
    strings = np.where(np.cumsum(inputs[:, 1:] == 0, 1) == 0, inputs[:, 1:], 0)
    assert (_splits.of_rows(strings) == SPLITS.index("train")).all()


@pytest.mark.parametrize("option, message", [
    ("shortest=0", "only 1 different strings of length 0 exist"),
    ("shortest=2", "only 100 different strings of length 2 exist.*use a greater shortest or more symbols"),
    ("shortest=12", "shortest=12, and strings of seq_len=24 have at most 11 symbols: use that or less"),
])  # fmt: skip
def test_lengths_that_cannot_be_mixed_are_refused(option, message):
    with pytest.raises(UsageError, match=message):
        build(f"copy:{option}", 24)


@pytest.mark.parametrize("distance", [1, 20])
def test_a_needles_distance_is_uniform(distance):
    task = build(f"needle:distance={distance}", 40, 1000)
    rows = np.concatenate([task.batch("train", step).inputs for step in range(10)])
    needles = (rows >= 1) & (rows <= 16)
    assert (needles.sum(1) == 1).all() and (rows[:, -1] == 0).all() and (rows[:, :-1] > 0).all()
    counts = np.bincount(39 - needles.argmax(1), minlength=40)
    assert (counts[:distance] == 0).all()
    expected = 10_000 / (40 - distance)
    assert np.abs(counts[distance:] - expected).max() < 5 * np.sqrt(expected)


# ---- listops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[MAX 4 [MIN 2 9 ] 0 ]", 4),
        ("[MED 1 4 ]", 2),
        ("[MED 9 1 5 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("[PM 7 8 ]", 6),
        ("( ( ( ( [MAX 1 ) 7 ) 2 ) ] )", 7),
        ("[FIRST 3 [LAST 1 2 ] ]", 3),
    ],
)
def test_evaluate(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["", "[MAX 1 2", "1 2", "]", "[MAX ]", "[AVG 1 2 ]", "[MAX x ]", "MAX 1 2 ]"])
def test_evaluate_refuses_what_is_no_expression(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


def test_evaluate_agrees_with_every_published_label():
    if not PUBLISHED.is_dir():
        pytest.skip("the published ListOps data are not here")
    checked = 0
    for file in sorted(PUBLISHED.glob("*.tsv.gz")):
        with gzip.open(file, "rt") as lines:
            for line in lines:
                label, expression = line.split("\t")
                assert evaluate(expression) == int(label), expression
                checked += 1
    assert checked >= 50_000


@pytest.mark.parametrize("length", [8, 64, 200])
def test_listops_labels_are_the_values_of_what_the_model_reads(length):
    task = build("listops", length)
    for split in SPLITS:
        batch = task.batch(split, 0)
        for ids, value in zip(batch.inputs, batch.targets, strict=True):
            assert evaluate(decode(ids)) == value


def test_listops_keeps_its_brackets():
    # The first release of Long Range Arena dropped them, and with them all structure.
    assert {"[MIN", "[MAX", "[MED", "[SM", "]"} < set(TOKENS)
    one, other = encode("[MAX 1 [MIN 2 3 ] ]"), encode("[MAX 1 [MIN 2 ] 3 ]")
    assert one != other and sorted(one) == sorted(other)
    assert evaluate(decode(np.array(one))) == 2 and evaluate(decode(np.array(other))) == 3
    inputs = build("listops", 64).batch("train", 0).inputs
    opened = np.isin(inputs, [TOKENS.index(token) for token in TOKENS if token.startswith("[")])
    depth = (opened.astype(int) - (inputs == TOKENS.index("]"))).cumsum(1)
    assert (depth[:, -1] == 0).all() and (depth >= 0).all()


@pytest.mark.parametrize(("length", "shortest"), [(16, 4), (64, 16), (64, 50), (512, 128)])
def test_listops_counts_every_token_and_cuts_none_off(length, shortest):
    # The generator of Long Range Arena did not count all tokens, and long expressions were cut off.
    batch = build(f"listops:min_length={shortest}", length).batch("train", 0)
    lengths = batch.valid.sum(1)
    assert shortest <= lengths.min() and lengths.max() <= length
    assert lengths.tolist() == [len(decode(ids).split()) for ids in batch.inputs]
    assert all((ids[size - 1] == TOKENS.index("]")) for ids, size in zip(batch.inputs, lengths, strict=True))
    assert lengths.std() > 0


@pytest.mark.parametrize(("depth", "arguments", "longest"), [(10, 10, 60), (3, 4, 40), (2, 10, 12)])
def test_listops_draws_from_the_published_grammar(depth, arguments, longest):
    # Against a draw written as the published recursion, and against the exact length distribution.
    rng = np.random.default_rng(3)

    def size(level: int) -> int:
        if level > 1 and (level >= depth or rng.random() > 0.25):
            return 1
        total = 2
        for _ in range(rng.integers(2, arguments + 1)):
            total += size(level + 1)
            if total > 300:
                break
        return total

    drawn = 4000
    recursive = (
        np.bincount([min(size(1), longest + 1) for _ in range(drawn)], minlength=longest + 2)[: longest + 1] / drawn
    )
    tokens, _ = expressions(rng, 5 * drawn, 1, longest, depth, arguments)
    fast = np.bincount((tokens > 0).sum(1), minlength=longest + 1) / (5 * drawn)
    exact = length_probabilities(longest, depth, arguments)
    spread = np.sqrt(exact.max() / drawn)
    assert np.abs(recursive - exact).max() < 4 * spread
    assert np.abs(fast - exact).max() < 4 * spread / np.sqrt(5)
    operators = np.bincount(tokens[tokens >= TOKENS.index("[MIN")])[TOKENS.index("[MIN") : TOKENS.index("]")]
    np.testing.assert_allclose(operators / operators.sum(), 0.25, atol=0.02)


# ---- speed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length", "limit"), [("mqar", 128, 3), ("copy", 128, 3), ("needle", 128, 3), ("listops", 512, 60)]
)
def test_batches_come_quickly(text, length, limit):
    task = build(text, length)
    seconds = []
    for step in range(30):
        start = time.perf_counter()
        task.batch("train", step)
        seconds.append(time.perf_counter() - start)
    assert 1000 * np.median(seconds) < limit, "milliseconds per batch of 64"
