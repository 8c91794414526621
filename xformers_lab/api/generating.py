"""What a trained model writes behind prompts: what `Run.generate` gives and `xlab generate` prints."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from xformers_lab import generate
from xformers_lab.errors import UsageError
from xformers_lab.model import Model
from xformers_lab.tasks import Task

# What tokens are drawn by, and what they are searched by.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")
SEARCHING = ("length_penalty",)
# What the first layers draft by.
DRAFTING = ("draft", "ahead")


def texts(
    length: int,
    task: Task,
    model: Model,
    prompts: Sequence[str],
    *,
    new: int,
    beams: int | None = None,
    stop: Sequence[str] | None = None,
    called: Callable[[str], str] = str,
    on_token: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> list[dict[str, Any]]:
    """A row for each prompt: prompt, text, tokens, of a beam search the score, and of one that was drafted the figures
    of `generate.Drafted`.

    length: tokens that the model was built for; asked: those of DRAWING, SEARCHING and DRAFTING that the user gave,
    which messages have as called(name); on_token: see `generate.generate`. Raises UsageError.
    """
    refuse(beams, asked, called)
    drawing = {name: asked[name] for name in DRAWING if name in asked}
    seed = drawing.pop("seed", 0)
    sampling = generate.Sampling(**drawing)
    try:
        encoded = [task.encode(prompt) for prompt in prompts]
        stops = [task.encode(text) for text in stop or ()]
    except ValueError as error:
        raise UsageError(f"{called('prompt')} or {called('stop')}: {error}") from None
    for text, tokens in zip(stop or (), stops, strict=True):
        if len(tokens) != 1:
            raise UsageError(f"{called('stop')} {text}: it is {len(tokens)} tokens, one is wanted")
    ends = [*task.stop] if stop is None else [token for tokens in stops for token in tokens]
    begun, sources = generate.apart(model, encoded, begin=task.begin)
    common: dict[str, Any] = {"new": new, "length": length, "stop": ends}
    if beams is not None:
        common |= {"beams": beams} | {name: asked[name] for name in SEARCHING if name in asked}
        pairs = zip(begun, sources or [None] * len(begun), strict=True)
        found = [generate.beam_search(model, prompt, source=source, **common) for prompt, source in pairs]
        rows = [{"tokens": tokens, "score": score} for tokens, score in found]
    elif "draft" in asked:
        how = generate.Draft(asked["draft"], **{name: asked[name] for name in ("ahead",) if name in asked})
        rows = []
        for number, prompt in enumerate(begun):
            show = None if on_token is None else functools.partial(on_token, number)
            tokens, drafted = generate.speculate(model, prompt, draft=how, on_token=show, **common)
            rows.append({"tokens": tokens, **dataclasses.asdict(drafted)})
    else:
        common |= {"sources": sources or None, "sampling": sampling, "seed": seed}
        rows = [{"tokens": tokens} for tokens in generate.generate(model, begun, on_token=on_token, **common)]
    return [
        {"prompt": prompt, "text": task.decode(row["tokens"]), **row} for prompt, row in zip(prompts, rows, strict=True)
    ]


def drafted(rows: Sequence[dict[str, Any]]) -> str | None:
    """What became of the tokens that were drafted for all rows, in words; None where none were."""
    total = lambda name: sum(row.get(name, 0) for row in rows)
    if not (rounds := total("rounds")):
        return None
    share, each = total("accepted") / total("drafted"), 1 + total("accepted") / rounds
    return f"{each:.2f} tokens a round, {rounds} rounds: {share:.0%} of {total('drafted')} drafted tokens were accepted"


def refuse(beams: int | None, asked: dict[str, Any], called: Callable[[str], str]) -> None:
    """Raises UsageError at an option that does not go with a search, or with drawing."""
    of = lambda names: " ".join(called(name) for name in names if name in asked)
    if beams is not None and (drawn := of(DRAWING)):
        raise UsageError(f"{drawn}: beam search draws nothing; leave it out, or leave out {called('beams')}")
    drafting, greedy = of(DRAFTING), dict(asked).get("temperature") == 0
    if beams is not None and drafting:
        raise UsageError(f"{drafting}: a beam search drafts nothing; leave it out, or leave out {called('beams')}")
    if drafting and "draft" not in asked:
        raise UsageError(f"{drafting}: it is of drafted tokens; give {called('draft')}, or leave it out")
    if drafting and not greedy:
        raise UsageError(
            f"{drafting}: what is drafted is compared with the likeliest token, so nothing may be drawn: give "
            f"{called('temperature')} 0, or leave it out"
        )
    if beams is None and (searched := of(SEARCHING)):
        raise UsageError(f"{searched}: it is of beam search; give {called('beams')}, or leave it out")
