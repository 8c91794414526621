"""Autoregressive decoding: greedy, sampling and beam search over a model's cache, one token at a time, or where the
first layers draft some, as many at a time as the others verify.

Prompts of different lengths share a batch: all start at position 0, and a sequence whose prompt has ended goes on with
its own tokens while the others still read theirs. So nothing is padded, and every mechanism decodes exactly what it
would compute on the whole sequence. What all prompts have is read many tokens at a time (`Model.step_several`), the
rest of the longer ones in as few calls. Sources of an encoder, which sees them whole, are filled up and masked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention._engine.softmax import MASKED
from xformers_lab.errors import UsageError
from xformers_lab.model import Model

# Tokens of a prompt that are read in one call.
AT_ONCE = 64
# The most new tokens that one call draws. Where somebody waits for each, the first calls draw 1, 2, 4, ...
IN_A_CALL = 32
# No token: the one that is drawn comes next.
NEW = -1
# The lowest temperature above 0: logits divided by less may overflow.
COOLEST = 1e-6
# Beyond these ((5 + n) / 6)^length_penalty may overflow.
STEEPEST = 100.0
LARGEST_SEED = 2**31 - 1
# Tokens that are drafted before they are verified.
MOST_AHEAD = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: logits are divided by temperature (0: the likeliest token, no chance), then only the
    top_k likeliest remain, then the fewest whose probabilities add up to top_p (Holtzman et al., 2020, arXiv
    1904.09751), then those with at least min_p times the likeliest one's probability (Nguyen et al., 2024, arXiv
    2407.01082)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not (self.temperature == 0 or COOLEST <= self.temperature < math.inf):
            raise UsageError(
                f"temperature={self.temperature:g}: 0, which takes the likeliest token, or a number from {COOLEST:g} on"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}: at least 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise UsageError(f"min_p={self.min_p}: at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class Draft:
    """How tokens are drafted: the first `layers` layers propose `ahead` tokens, and the others verify them in one call
    (self-speculative decoding: Elhoushi et al., 2024, arXiv 2404.16710, section 4.3)."""

    layers: int
    ahead: int = 4

    def __post_init__(self):
        if self.layers < 1:
            raise UsageError(f"draft={self.layers}: at least one layer")
        if not 1 <= self.ahead <= MOST_AHEAD:
            raise UsageError(f"ahead={self.ahead}: from 1 to {MOST_AHEAD} tokens")


@dataclasses.dataclass(frozen=True)
class Drafted:
    """rounds: how often drafted tokens were verified; drafted, accepted: how many those were, and how many of them the
    other layers would have said, too. Each round says one token more."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    new: int,
    length: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    at_once: int = AT_ONCE,
    in_a_call: int = IN_A_CALL,
) -> list[list[int]]:
    """Continue every prompt by up to `new` tokens -> the new tokens of each, a stop token included.

    sources: what an encoder reads for each prompt, the prompt being the target's beginning; a source may be shorter
    than those the model was trained with. Without them the first `model.source` tokens of a prompt are its source.
    length: positions the model was built for, which one with a memory may pass. on_token(prompt, token) is called as
    tokens come: behind each call, of which the first draws one token of the longest prompt, and every other twice as
    many as that before, up to in_a_call. at_once: tokens of a prompt that are read in one call. Neither changes a
    result: what is drawn depends on (seed, position, place in the batch) alone, and what a call draws behind a stop is
    thrown away. Raises UsageError where a prompt is empty or too long, and where the model cannot decode.
    """
    sampling = sampling or Sampling(temperature=0)
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"seed={seed}: a whole number from 0 to {LARGEST_SEED}")
    prompts, sources = apart(model, prompts, sources)
    _check(prompts, new, None if model.endless else length - model.source)
    graph, variables = nnx.split(model)
    shortest, longest = (pick(map(len, prompts)) for pick in (min, max))
    cache = _cache(model, len(prompts), longest + new, sources)
    # What all prompts have is read many tokens at a time, but for the last of it, which a token follows.
    at = (shortest - 1) // at_once * at_once
    for start in range(0, at, at_once):
        read = np.array([prompt[start : start + at_once] for prompt in prompts], np.int32)
        cache = _reader(graph)(variables, cache, read)
    steps = _sampled_steps(graph, sampling)
    prompt_tokens = np.full((longest + at_once, len(prompts)), NEW, np.int32)
    for row, prompt in enumerate(prompts):
        prompt_tokens[: len(prompt), row] = prompt
    tokens = prompt_tokens[at]
    texts: list[list[int]] = [[] for _ in prompts]
    done = np.zeros(len(prompts), bool)
    several = 1 if on_token is not None else in_a_call
    while not done.all():
        # To the end of the longest prompt, then several at a time, but none behind the last that is wanted.
        last = max(len(prompt) + new - 1 for prompt, over in zip(prompts, done, strict=True) if not over)
        if at < longest - 1:
            count = min(longest - at, at_once)
        else:
            count, several = min(several, last - at, at_once), min(2 * several, in_a_call)
        following = prompt_tokens[min(at + 1, longest) :][:at_once]
        drawn, tokens, cache = steps(variables, cache, tokens, following, count, seed, model.source + at)
        for drawn_at, of_rows in enumerate(np.asarray(drawn)[:count], at + 1):
            for row, prompt in enumerate(prompts):
                if drawn_at >= len(prompt) and not done[row]:
                    token = int(of_rows[row])
                    texts[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
                    done[row] = token in stop or len(texts[row]) == new
        at += count
    return texts


def speculate(
    model: Model,
    prompt: Sequence[int],
    *,
    draft: Draft,
    new: int,
    length: int,
    stop: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
    at_once: int = AT_ONCE,
    in_a_call: int = IN_A_CALL,
) -> tuple[list[int], Drafted]:
    """Continue one prompt as `generate` does at temperature 0, with tokens that the first layers draft -> the new
    tokens, and how many of them were drafted.

    A round drafts from the newest token on, has the other layers read what was drafted, and keeps it up to the first
    token that these would not have said, which they say in its place; a cache goes back to there. So the tokens are the
    greedy ones, but where the two likeliest are as likely as rounding can tell. Raises UsageError as `generate` does,
    and where the model cannot draft or a layer cannot go back.
    """
    _check([prompt], new, None if model.endless else length - model.source)
    graph, variables = nnx.split(model)
    cache = _cache(model, 1, len(prompt) + new, ())
    rounds = _drafted_rounds(graph, draft)
    try:
        model.check_draft(draft.layers)
        jax.eval_shape(rounds, variables, cache, np.zeros(1, np.int32), 1, 1)
    except ValueError as refusal:
        raise UsageError(f"draft={draft.layers}: {refusal}") from None
    steps, at = _sampled_steps(graph, Sampling(temperature=0)), (len(prompt) - 1) // at_once * at_once
    for start in range(0, at, at_once):
        cache = _reader(graph)(variables, cache, np.array([prompt[start : start + at_once]], np.int32))
    none = np.full((at_once, 1), NEW, np.int32)
    token, following, left = np.array(prompt[at : at + 1], np.int32), none.copy(), len(prompt) - 1 - at
    following[:left, 0] = prompt[at + 1 :]
    if left:
        _, token, cache = steps(variables, cache, token, following, left, 0, at)
    text: list[int] = []
    figures, several, last = Drafted(), 1 if on_token is not None else in_a_call, len(prompt) + new - 1
    while not (len(text) == new or (text and text[-1] in stop)):
        if (at := len(prompt) - 1 + len(text)) + draft.ahead <= last:
            said, count, ran, token, cache = rounds(variables, cache, token, several, last)
            said, ran, several = np.asarray(said)[: int(count)], int(ran), min(2 * several, in_a_call)
            more = ran, ran * draft.ahead, len(said) - ran
            figures = Drafted(*map(sum, zip(dataclasses.astuple(figures), more, strict=True)))
        else:  # the last ones, of which there are fewer than a round drafts
            count = min(new - len(text), at_once)
            said, token, cache = steps(variables, cache, token, none, count, 0, at)
            said = np.asarray(said)[:count, 0]
        for token_said in map(int, said):
            text.append(token_said)
            if on_token is not None:
                on_token(token_said)
            if token_said in stop or len(text) == new:
                break
    return text, figures


def beam_search(
    model: Model,
    prompt: Sequence[int],
    *,
    source: Sequence[int] | None = None,
    new: int,
    length: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    stop: Sequence[int] = (),
    at_once: int = AT_ONCE,
) -> tuple[list[int], float]:
    """The best continuation of one prompt by up to `new` tokens that `beams` parallel hypotheses find, and its score.

    The score is the sum of log probabilities over ((5 + n) / 6)^length_penalty for n tokens (Wu et al., 2016, arXiv
    1609.08144, equation 14). source: what an encoder reads, at_once: as for `generate`. Raises UsageError as that does.
    """
    if beams < 1:
        raise UsageError(f"beams={beams}: at least 1")
    if not abs(length_penalty) <= STEEPEST:
        raise UsageError(f"length_penalty={length_penalty:g}: a number between -{STEEPEST:g} and {STEEPEST:g}")
    (prompt,), sources = apart(model, [prompt], None if source is None else [source])
    _check([prompt], new, None if model.endless else length - model.source)
    graph, variables = nnx.split(model)
    step = _beam_step(graph)
    begun = (len(prompt) - 1) // at_once * at_once
    cache = _cache(model, beams, len(prompt) + new, [*sources] * beams)
    axes = _sample_axes(model, beams, len(prompt) + new)
    for start in range(0, begun, at_once):
        cache = _reader(graph)(
            variables, cache, np.tile(np.array(prompt[start : start + at_once], np.int32), (beams, 1))
        )
    # The rest of the prompt, or the one newest token of every beam, in one call.
    tokens, count = np.zeros((at_once, beams), np.int32), len(prompt) - begun
    tokens[:count] = np.array(prompt[begun:], np.int32)[:, None]
    # All beams are alike at first: only one may branch.
    totals, texts = np.where(np.arange(beams) == 0, 0.0, MASKED), [[] for _ in range(beams)]
    finished: list[tuple[float, list[int]]] = []
    penalty = lambda n: ((5 + n) / 6) ** length_penalty
    for n in range(1, new + 1):
        logs, cache = step(variables, cache, tokens, count)
        scores = totals[:, None] + np.asarray(logs, np.float64)
        # Every beam may stop once at every stop token: with so many more candidates as many as before go on.
        best = np.argsort(-scores, axis=None, kind="stable")[: (1 + len(set(stop))) * beams]
        rows, symbols = np.unravel_index(best, scores.shape)
        going = []
        for row, symbol in zip(rows, symbols, strict=True):
            text, score = [*texts[row], int(symbol)], scores[row, symbol]
            if symbol in stop or n == new:
                finished.append((score / penalty(n), text))
            elif len(going) < beams:
                going.append((score, row, text))
        # The best that a hypothesis can still reach adds nothing more to its sum.
        bound = max((score for score, _, _ in going), default=MASKED) / penalty(new if length_penalty > 0 else n)
        if not going or (len(finished) >= beams and max(finished)[0] >= bound):
            break
        while len(going) < beams:  # fewer symbols than beams: a copy that can never win
            going.append((MASKED, going[0][1], going[0][2]))
        totals, texts = np.array([score for score, _, _ in going]), [text for _, _, text in going]
        tokens[0], count = [text[-1] for text in texts], 1
        cache = _reorder(cache, axes, np.array([row for _, row, _ in going]))
    score, text = max(finished, key=lambda scored: scored[0])
    return text, float(score)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits (..., V) after temperature, top_k, top_p and min_p: what may not be drawn is hugely negative."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, MASKED, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, descending=True)
        p = jax.nn.softmax(ranked)
        needed = jnp.cumsum(p, -1) - p < sampling.top_p  # the likeliest one always is
        least = jnp.where(needed, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, MASKED, logits)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < least, MASKED, logits)
    return logits


@functools.lru_cache(maxsize=8)
def _reader(graph):
    """read(variables, cache, tokens (B, at_once)) -> the new cache: all tokens of a prompt at once."""

    @functools.partial(jax.jit, donate_argnums=1)
    def read(variables, cache, tokens):
        return nnx.merge(graph, variables).step_several(cache, tokens)[1]

    return read


@functools.lru_cache(maxsize=8)
def _sampled_steps(graph, sampling: Sampling):
    """steps(variables, cache, tokens (B,), following (at_once, B), count, seed, at) -> what was drawn at each of
    `count` steps, (at_once, B), the tokens that come next, and the new cache.

    After step i comes following[i], or where that is NEW what was drawn.
    """

    def draw(logits, seed, at):
        if sampling.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), at), len(logits))
        return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(variables, cache, tokens, following, count, seed, at):
        def one(i, state):
            drawn, tokens, cache = state
            logits, cache = nnx.merge(graph, variables).step(cache, tokens)
            new = draw(logits, seed, at + i)
            return drawn.at[i].set(new), jnp.where(following[i] == NEW, new, following[i]), cache

        return jax.lax.fori_loop(0, count, one, (jnp.zeros_like(following), tokens, cache))

    return steps


@functools.lru_cache(maxsize=8)
def _drafted_rounds(graph, draft: Draft):
    """rounds(variables, cache, token (1,), most, last) -> tokens that were said, (some,), how many of them, in how many
    rounds, the last of them (1,), and the cache behind the one before it: up to `most` rounds, and no more than
    IN_A_CALL, of which none reads a token at a position behind `last`."""
    one_round = draft.ahead + 1

    @functools.partial(jax.jit, donate_argnums=1)
    def rounds(variables, cache, token, most, last):
        model = lambda: nnx.merge(graph, variables)

        def drafted(state, _):
            token, cache = state
            above, logits, cache = model().draft(cache, token, draft.layers)
            return (logits.argmax(-1).astype(jnp.int32), cache), (above, token)

        def one(state):
            said, count, ran, token, cache = state
            (_, after), (states, read) = jax.lax.scan(drafted, (token, cache), length=one_round)
            states, read = jnp.swapaxes(states, 0, 1), read.T
            logits, after = model().verify(after, states, read, draft.layers)
            answers = logits[0].argmax(-1).astype(jnp.int32)
            accepted = jnp.cumprod(read[0, 1:] == answers[:-1]).sum()
            said = jax.lax.dynamic_update_slice_in_dim(said, answers, count, 0)
            cache = model().rewound(cache, after, read, accepted + 1)
            return said, count + accepted + 1, ran + 1, answers[accepted][None], cache

        going = lambda state: (state[2] < jnp.minimum(most, IN_A_CALL)) & (state[4]["at"] + draft.ahead <= last)
        room = jnp.zeros(IN_A_CALL * one_round, jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        return jax.lax.while_loop(going, one, (room, zero, zero, token, cache))

    return rounds


@functools.lru_cache(maxsize=8)
def _beam_step(graph):
    """step(variables, cache, tokens (at_once, B), count) -> log probabilities (B, V) after the first `count` of the
    tokens, and the new cache."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(variables, cache, tokens, count):
        one = lambda i, state: nnx.merge(graph, variables).step(state[1], tokens[i])
        empty = jnp.zeros(jax.eval_shape(one, 0, (None, cache))[0].shape)
        logits, cache = jax.lax.fori_loop(0, count, one, (empty, cache))
        return jax.nn.log_softmax(logits), cache

    return step


def apart(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
    begin: Sequence[int] = (),
) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """What each target begins with, and what the encoder reads for it; no sources for a model without an encoder.

    begin: what a target begins with where a prompt is nothing but a source. Raises UsageError.
    """
    S = model.source
    if not S:
        if sources is not None:
            raise UsageError("this model reads no source apart: put it in front of the prompt")
        return prompts, []
    if sources is None:
        prompts, sources = [list(prompt[S:]) or begin for prompt in prompts], [prompt[:S] for prompt in prompts]
        if short := [source for source, prompt in zip(sources, prompts, strict=True) if source and not prompt]:
            raise UsageError(
                f"a prompt of {len(short[0])} tokens, of which the encoder reads the first {S}: "
                "give at least one more, with which the target begins"
            )
    elif len(sources) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts and {len(sources)} sources: one source for each prompt is wanted")
    for source in sources:
        if not 0 < len(source) <= S:
            raise UsageError(f"a source of {len(source)} tokens: the encoder reads 1 to {S}")
    return prompts, sources


def _cache(model: Model, B: int, length: int, sources: Sequence[Sequence[int]]):
    """A cache that only the sources are read into, every leaf an array of its own, so that each can be donated."""
    try:
        cache = model.init_cache(B, model.source + length)
        if sources:
            tokens, valid = np.zeros((2, B, model.source), np.int32)
            for row, source in enumerate(sources):
                tokens[row, : len(source)], valid[row, : len(source)] = source, 1
            cache = model.read(cache, jnp.asarray(tokens), jnp.asarray(valid > 0))
        jax.eval_shape(model.step, cache, jnp.zeros(B, jnp.int32))
    except ValueError as refusal:
        raise UsageError(str(refusal)) from None
    return jax.tree.map(jnp.array, cache)


def _sample_axes(model: Model, B: int, length: int):
    """Which axis of each leaf of a cache counts samples, -1 for none: the one that one more sample makes longer."""
    one, other = (jax.eval_shape(lambda B=B: model.init_cache(B, model.source + length)) for B in (B, B + 1))
    return jax.tree.map(lambda a, b: next((i for i in range(a.ndim) if a.shape[i] != b.shape[i]), -1), one, other)


def _reorder(cache, axes, rows: np.ndarray):
    """The cache of other hypotheses."""
    return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.take(leaf, rows, axis), cache, axes)


def _check(prompts: Sequence[Sequence[int]], new: int, length: int | None) -> None:
    """length: what prompt and new tokens must fit into, None where nothing ends."""
    if new < 1:
        raise UsageError(f"new={new}: at least one token")
    for prompt in prompts:
        if not len(prompt):
            raise UsageError("an empty prompt: give at least one token to continue")
        if length is not None and len(prompt) + new > length:
            most = max(length - len(prompt), 0)
            raise UsageError(
                f"a prompt of {len(prompt)} tokens and {new} new ones do not fit into the {length} positions that the "
                f"model was trained with: at most {most} new ones fit"
            )
