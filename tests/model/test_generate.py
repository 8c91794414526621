"""Generation: equal to recomputing the whole sequence for each token, honest draws, and clear refusals."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import generate as generation
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.generate import Sampling, beam_search, filtered, generate
from xformers_lab.model import Model, build_model, build_task
from xformers_lab.progress import growing

PROMPTS = [[3, 1, 2], [5], [0, 4, 4, 7, 1, 9]]
LONGER = [[3, 1, 2, 6, 6, 8, 2, 5, 4], [5, 1, 1, 3, 8], [0, 4, 4, 7, 1, 9, 2, 2, 1, 0, 6, 5, 3]]


@pytest.fixture(scope="module")
def model():
    config = edit(Config(), task="copy", attention="full+local:window=4+linear", layers=3, seq_len=24, dim=32, heads=4)
    return build_model(config, build_task(config))


@pytest.fixture(scope="module")
def whole(model):
    """whole(tokens) -> logits (24, V) of a text, filled up behind."""
    run = jax.jit(lambda tokens: model(tokens)[0][0])
    return lambda tokens: np.asarray(run(jnp.asarray([[*tokens] + [0] * (24 - len(tokens))], jnp.int32)))


@pytest.mark.full
@pytest.mark.parametrize("at_once, prompts", [(64, PROMPTS), (2, LONGER)])
def test_greedy_is_the_argmax_of_the_whole_sequence(model, whole, at_once, prompts):
    """For prompts of different lengths in one batch, however many of their tokens are read in one call."""
    generated = generate(model, prompts, new=8, length=24, at_once=at_once)
    for prompt, tokens in zip(prompts, generated, strict=True):
        greedy = whole([*prompt, *tokens])[len(prompt) - 1 :].argmax(-1)
        assert len(tokens) == 8 and tokens == greedy[:8].tolist()


@pytest.mark.full
def test_a_batch_is_what_each_prompt_gives_alone(model):
    together = generate(model, PROMPTS, new=6, length=24)
    assert together == [generate(model, [prompt], new=6, length=24)[0] for prompt in PROMPTS]


def test_stops_at_a_token_and_streams(model):
    free = generate(model, PROMPTS[:1], new=8, length=24)[0]
    stop = free[3]
    seen = []
    stopped = generate(
        model, PROMPTS[:1], new=8, length=24, stop=[stop], on_token=lambda row, t: seen.append((row, t))
    )[0]
    assert stopped == free[: free.index(stop) + 1]
    assert seen == [(0, token) for token in stopped]


@pytest.mark.full
def test_draws_follow_the_seed(model):
    draw = lambda seed, **how: generate(model, LONGER, new=8, length=24, sampling=Sampling(1.5), seed=seed, **how)
    first = draw(1)
    assert first != draw(2)
    assert first == draw(1, at_once=4)


@pytest.mark.parametrize("sampling", [None, Sampling(1.5)], ids=["greedy", "drawn"])
def test_however_many_tokens_a_call_draws(model, monkeypatch, sampling):
    """The same texts, streamed in the same order; a call draws twice as many as that before where they are streamed,
    and none behind the last that is wanted."""
    calls, seen, options = counted_calls(monkeypatch), [], {"new": 15, "length": 24, "sampling": sampling}
    stream = lambda row, token: seen.append((row, token))
    alone = generate(model, PROMPTS, **options, in_a_call=1, on_token=stream)
    assert len(calls) == 15
    calls.clear()
    first, seen = seen, []
    assert generate(model, PROMPTS, **options, on_token=stream) == alone and seen == first
    assert len(calls) == 5  # to the end of the longest prompt, then 1, 2, 4 and 7
    calls.clear()
    assert generate(model, PROMPTS, **options) == alone and len(calls) == 2
    stop = alone[0][4]
    kept = [text[: text.index(stop) + 1] if stop in text else text for text in alone]
    assert generate(model, PROMPTS, **options, stop=[stop], in_a_call=4) == kept


def counted_calls(monkeypatch) -> list[str]:
    """The names of the compiled functions that generation calls, as it calls them."""
    calls: list[str] = []
    for make in (generation._reader, generation._sampled_steps, generation._beam_step):
        counted = lambda *options, make=make: lambda *args: (calls.append(make.__name__), make(*options)(*args))[1]
        monkeypatch.setattr(generation, make.__name__, counted)
    return calls


@pytest.mark.full
def test_a_prompt_is_read_in_few_calls(model, monkeypatch):
    """Twenty tokens in parts of eight and the rest at once, then one call for all that are left; of beams one each."""
    calls = counted_calls(monkeypatch)
    prompt = LONGER[2] + LONGER[1] + [7, 7]
    generated = generate(model, [prompt, LONGER[2] + LONGER[1]], new=3, length=24, at_once=8)
    assert calls == ["_reader"] * 2 + ["_sampled_steps"] * 2
    calls.clear()
    assert beam_search(model, prompt, new=3, length=24, beams=1, at_once=8)[0] == generated[0]
    assert calls == ["_reader"] * 2 + ["_beam_step"] * 3


def test_draws_follow_the_probabilities(model, whole):
    """Over many drawn first tokens, frequencies are the filtered softmax."""
    sampling = Sampling(temperature=2.0, top_k=5)
    drawn = generate(model, [[3, 1, 2]] * 2000, new=1, length=24, sampling=sampling, seed=3)
    counts = np.bincount([tokens[0] for tokens in drawn], minlength=11) / 2000
    expected = np.asarray(jax.nn.softmax(filtered(whole([3, 1, 2])[2:3], sampling)))[0]
    assert (expected > 0).sum() == 5
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 2000))
    assert (counts[expected == 0] == 0).all()


def test_filters_keep_what_they_say():
    p = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    kept = lambda **options: (np.asarray(filtered(jnp.log(p)[None], Sampling(**options)))[0] > -1e20).sum()
    assert [kept(top_k=k) for k in (1, 3, 9)] == [1, 3, 5]
    assert [kept(top_p=x) for x in (0.01, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 2, 3, 5]
    assert [kept(min_p=x) for x in (0.0, 0.1, 0.25, 0.9)] == [5, 4, 3, 1]
    assert kept(top_k=4, top_p=0.6, min_p=0.4) == 2


@pytest.mark.parametrize("penalty", [pytest.param(0.0, marks=pytest.mark.full), 0.6])
def test_beam_search_with_many_beams_is_exhaustive(model, whole, penalty):
    """As many beams as there are prefixes: the best of all continuations of three tokens, with a stop token."""
    stop, prompt, V = 4, [3, 1, 2], 11
    log = lambda tokens: np.asarray(jax.nn.log_softmax(whole(tokens)[len(tokens) - 1]), np.float64)
    best, logs = (-np.inf, []), {}
    for text in itertools.product(range(V), repeat=2):
        total = 0.0
        for n, token in enumerate(text, 1):
            before = text[: n - 1]
            if before not in logs:
                logs[before] = log([*prompt, *before])
            total += logs[before][token]
            if token == stop or n == 2:
                best = max(best, (total / ((5 + n) / 6) ** penalty, list(text[:n])))
                break
    beam, score = beam_search(model, prompt, new=2, length=24, beams=V, length_penalty=penalty, stop=[stop])
    assert beam == best[1] and score == pytest.approx(best[0], abs=1e-4)


class Chain(Model):
    """The next token depends on the last one alone."""

    causal = True

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table))

    def init_cache(self, B: int, length: int):
        return {"seen": jnp.zeros((1, B))}

    def step(self, cache, tokens):
        return self.table[...][tokens], cache


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("V, stop", [(3, [0, 1]), (5, [0, 1, 2])])
def test_as_many_beams_go_on_however_many_stop(V, stop, seed):
    """Beams for every text that goes on, at likely stop tokens: the best of all texts."""
    table = np.random.default_rng(seed).standard_normal((V, V)).astype(np.float32)
    table[:, stop] += 1
    logs, best = np.asarray(jax.nn.log_softmax(table), np.float64), (-np.inf, [])
    for text in itertools.product(range(V), repeat=4):
        ends = [n for n, token in enumerate(text, 1) if token in stop or n == 4]
        total = sum(logs[a, b] for a, b in zip([V - 1, *text], text[: ends[0]], strict=False))
        best = max(best, (total / ((5 + ends[0]) / 6) ** 4, list(text[: ends[0]])))
    options = {"new": 4, "length": 9, "beams": (V - len(stop)) ** 3, "length_penalty": 4}
    beam, score = beam_search(Chain(table), [V - 1], **options, stop=stop)
    assert beam == best[1] and score == pytest.approx(best[0], abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"model": "bytenet:farthest=2"},
        {"attention": "poolingformer:window=3:reach=9:kernel=4:stride=2"},
        {"attention": "realformer"},
        {"attention": "local:window=4", "position": "conv"},
        {"model": "lstm"},
    ],
    ids=str,
)
def test_beams_take_what_they_remember_along(changes):
    """Whatever a cache looks like, hypotheses that change places score as the whole sequence does."""
    config = edit(Config(), task="copy", layers=2, seq_len=16, dim=16, heads=2, **changes)
    model = build_model(config, build_task(config))
    tokens, score = beam_search(model, [3, 1], new=6, length=16, beams=4, length_penalty=0)
    whole = jnp.asarray([[3, 1, *tokens]], jnp.int32)
    logs = np.asarray(jax.nn.log_softmax(model(whole)[0]))[0, 1:-1]
    assert score == pytest.approx(sum(logs[np.arange(6), tokens]), abs=1e-3)


def test_one_beam_is_greedy(model):
    tokens, score = beam_search(model, PROMPTS[0], new=6, length=24, beams=1)
    assert tokens == generate(model, PROMPTS[:1], new=6, length=24)[0] and score < 0


@pytest.mark.parametrize("given, message", [
    ({"prompts": [[]]}, "empty prompt"),
    ({"new": 0}, "at least one token"),
    ({"new": 30}, "at most 21 new ones fit"),
    ({"sampling": {"temperature": -1}}, "temperature=-1"),
    ({"sampling": {"top_k": 0}}, "top_k=0"),
    ({"sampling": {"top_p": 0}}, "top_p=0"),
    ({"sampling": {"min_p": 1}}, "min_p=1"),
    ({"sampling": {"temperature": float("nan")}}, "temperature=nan"),
    ({"sampling": {"temperature": float("inf")}}, "temperature=inf"),
    ({"sampling": {"temperature": 1e-40}}, "temperature=1e-40"),
    ({"seed": 2**31}, "seed=2147483648"),
    ({"seed": -1}, "seed=-1"),
])  # fmt: skip
def test_bad_requests(model, given, message):
    options = {"prompts": [[3, 1, 2]], "new": 4} | given
    with pytest.raises(UsageError, match=message):
        sampling = Sampling(**options.pop("sampling", {}))
        generate(model, options.pop("prompts"), length=24, sampling=sampling, **options)


@pytest.mark.parametrize("penalty", [float("nan"), float("inf"), -1e4])
def test_a_length_penalty_that_is_none(model, penalty):
    with pytest.raises(UsageError, match="length_penalty="):
        beam_search(model, [3, 1, 2], new=4, length=24, length_penalty=penalty)


def test_an_encoder_does_not_decode():
    config = edit(Config(), task="listops", seq_len=24, dim=32, heads=4)
    with pytest.raises(UsageError, match="encoder sees both sides"):
        generate(build_model(config, build_task(config)), [[1]], new=2, length=24)


def test_text_grows_by_whole_letters(capsys):
    add = growing("a", lambda tokens: bytes(tokens).decode(errors="replace"))
    for byte in "né!".encode():
        add(0, byte)
    assert capsys.readouterr().out == "ané!"


@pytest.mark.full
def test_command(capsys, tmp_path):
    tiny = [f"runs={tmp_path}", "dim=16", "batch=4", "steps=3", "eval_batches=1", "seq_len=16", "layers=1"]
    assert main(["train", "task=lm", *tiny]) == 0
    capsys.readouterr()
    last = ["generate", "last", "--runs", str(tmp_path)]
    assert main([*last, "--prompt", "def ", "--prompt", "x", "--new", "5", "--temperature", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["def ", "x"] and all(len(row["tokens"]) == 5 for row in rows)
    assert main([*last, "--prompt", "def ", "--new", "5", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main([*last, "--prompt", "def ", "--beams", "2", "--new", "4", "--stop", ":"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main([*last, "--prompt", "def ", "--new", "50"]) == 2
    assert "at most 12 new ones fit" in capsys.readouterr().err
    assert main([*last, "--prompt", "def ", "--stop", "::"]) == 2
    assert "2 tokens, one is wanted" in capsys.readouterr().err
    for flag in (["--temperature", "0.5"], ["--top-k", "3"], ["--top-p", "0.5"], ["--min-p", "0.1"], ["--seed", "0"]):
        assert main([*last, "--prompt", "def ", "--beams", "2", *flag]) == 2
        assert f"{flag[0]}: beam search draws nothing" in capsys.readouterr().err
    assert main([*last, "--prompt", "def ", "--length-penalty", "1"]) == 2
    assert "--length-penalty: it is of beam search" in capsys.readouterr().err
    stops = [word for byte in range(32, 127) if byte != ord(":") for word in (f"--stop={chr(byte)}",)]
    assert main([*last, "--prompt", "def ", "--new", "9", "--seed", "1", "--json", *stops]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert not any(32 <= token < 127 and token != ord(":") for token in row["tokens"][:-1])
