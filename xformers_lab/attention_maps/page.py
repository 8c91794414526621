"""One offline HTML file: every head as a map and in numbers, and one head of all runs large, token by token.

It has the style and the strictness of the report (`report.html`): nothing is fetched, its policy names its one style
and its one script by their hashes, and text reaches it only escaped, by Jinja. Weights travel as 16-bit numbers in an
attribute; the script draws them, and without it the page still has every map and every number.
"""

import base64
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from xformers_lab import files
from xformers_lab.attention_maps import picture, table
from xformers_lab.attention_maps.maps import AttentionMaps
from xformers_lab.errors import UsageError
from xformers_lab.report import html, human, offline, plot

HERE = pathlib.Path(__file__).parent
# Weights of all maps of a page: 16 bits each, so that it has six megabytes at most.
MOST = 2**21
WHOLE = 32767
# Rows and columns of a small map.
SIDE = 32


def write(
    shown: Sequence[AttentionMaps],
    path: pathlib.Path | str,
    *,
    title: str = "Where the heads look",
    command: str = "",
    refused: Sequence[tuple[str, str]] = (),
) -> pathlib.Path:
    """Write maps as one HTML file, replaced as a whole; -> its path. refused: (run, reason) of what has no map.

    Raises UsageError where jinja2 is missing or there are too many weights, and OSError where it cannot be written.
    """
    page_template = offline.template(HERE)
    if (count := sum(one.weights.size for one in shown)) > MOST:
        raise UsageError(
            f"the page would hold {count:,} weights, at most {MOST:,} fit: choose --layers= and --heads=, or give a "
            "shorter text"
        )
    style = html.HERE.joinpath("page.css").read_text(encoding="utf-8") + _text("page.css")
    script, chosen = _text("page.js"), table.columns(shown)
    looks = plot.look([human.plain(one.title) for one in shown])
    texts = list(dict.fromkeys(tuple(side) for one in shown for side in (one.queries, one.keys)))
    page = page_template.render(
        title=human.plain(title),
        tally=_tally(shown),
        panels=[_panel(one, look, texts) for one, look in zip(shown, looks, strict=True)],
        layers=sorted({layer for one in shown for layer in one.layers}),
        heads=sorted({head for one in shown for head in one.heads}),
        chart=_chart(shown, looks),
        columns=chosen,
        head_rows=[
            {"panel": number, "look": look, "swatch": plot.swatch(look), "row": row}
            for number, (one, look) in enumerate(zip(shown, looks, strict=True))
            for row in table.texts(one, chosen)
        ],
        notes=list(dict.fromkeys(human.plain(note) for one in shown for note in one.notes)),
        refused=[(human.plain(name), human.plain(reason)) for name, reason in refused],
        negative=any((one.weights < 0).any() for one in shown),
        padded=any(not one.real_keys.all() for one in shown),
        means=table.MEANS,
        dead=table.DEAD,
        implied=table.IMPLIED if any(any(one.implied) for one in shown) else "",
        command=command,
        style=style,
        script=script,
        policy=offline.policy(style, [script]),
    )
    files.replace_text(pathlib.Path(path), page)
    return pathlib.Path(path)


def _tally(shown: Sequence[AttentionMaps]) -> str:
    """4 models, 24 heads, one text of 64 tokens."""
    texts = {tuple(one.queries) for one in shown if one.part != "cross"} or {tuple(shown[0].queries)}
    sizes = sorted({len(text) for text in texts})
    runs = len({one.name for one in shown})
    heads = sum(len(one.layers) * len(one.heads) for one in shown)
    models = f"{runs} models" if runs > 1 else human.plain(shown[0].name)
    tokens = " and ".join(f"{size:,}" for size in sizes[:3]) + (" and more" if len(sizes) > 3 else "")
    return f"{models}, {heads} heads, {'a text' if len(texts) == 1 else 'texts'} of {tokens} tokens"


def _panel(one: AttentionMaps, look: plot.Look, texts: Sequence[tuple[str, ...]]) -> dict:
    """What the template and the script have of one map. Texts that are the same have the same number."""
    most = max(1.0, float(np.abs(one.weights).max(initial=0)))
    numbers = np.rint(one.drawn * (WHOLE / most)).astype("<i2")
    data = {
        "layers": list(one.layers),
        "heads": list(one.heads),
        "scale": most / WHOLE,
        "causal": one.causal,
        "queries": texts.index(tuple(one.queries)),
        "keys": texts.index(tuple(one.keys)),
        "rows": one.real_queries.astype(int).tolist(),
        "columns": one.real_keys.astype(int).tolist(),
        "crosses": one.part == "cross",
        "documents": None if one.documents is None else one.documents.tolist(),
    }
    return {
        "title": human.plain(one.title),
        "swatch": plot.swatch(look),
        "note": one.kind,
        "summary": table.summary(one),
        "asking": _tokens(one.queries, one.real_queries),
        "asked": _tokens(one.keys, one.real_keys) if one.part == "cross" else [],
        "wide": any(len(token) > 1 for token in one.keys),
        "data": json.dumps(data),
        "weights": base64.b64encode(numbers.tobytes()).decode(),
        "maps": [
            [
                {
                    "layer": layer,
                    "head": head,
                    "dead": str(one.figures.reason[row, place]),
                    "drawn": _thumbnail(one, row, place),
                }
                for place, head in enumerate(one.heads)
            ]
            for row, layer in enumerate(one.layers)
        ],
    }


def _tokens(texts: Sequence[str], real: np.ndarray) -> list[tuple[str, str]]:
    """(text, its class) of every token: padding, a blank, or neither."""
    kinds = ["" if text.strip() else "blank" for text in texts]
    kinds = [kind if is_real else "pad" for kind, is_real in zip(kinds, real, strict=True)]
    return list(zip(map(picture.label, texts), kinds, strict=True))


def _thumbnail(one: AttentionMaps, row: int, place: int) -> str:
    weights, seen = picture.small(one.drawn[row, place], one.seen, SIDE)
    T, S = weights.shape
    return (
        f'<svg class="thumb" viewBox="0 0 {S} {T}" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'aria-hidden="true">{picture.paths(weights, seen)}</svg>'
    )


def _chart(shown: Sequence[AttentionMaps], looks: Sequence[plot.Look]) -> str:
    """Every head as a point: how far it looks, and how widely. Empty where no head has both."""
    dots = []
    for number, one in enumerate(shown):
        for row in table.heads(one):
            if row["distance"] is not None and row["relative"] is not None:
                words = f"{looks[number].name}\nlayer {row['layer']}, head {row['head']}"
                words += f"\n{row['distance']:.1f} tokens away\nentropy {row['relative']:.2f} of uniform"
                words += f"\ndead: {row['dead']}" if row["dead"] else ""
                dots.append(plot.Dot(number, row["distance"], row["relative"], words, cross=bool(row["dead"])))
    if not dots:
        return ""
    far = max(dot.x for dot in dots) * 1.08 or 1.0
    axis = lambda title, high, form: plot.Axis(
        title, 0.0, high, [(at, form(at)) for at in plot.ticks(0.0, high)], grid=True
    )
    drawn = plot.Plot(axis("distance, in tokens", far, lambda at: f"{at:g}"), axis("", 1.0, lambda at: f"{at:g}"), dots)
    return plot.svg(drawn, looks, "Every head: how far it looks, and how widely")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
