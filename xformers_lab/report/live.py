"""A run while it trains: its curves, how fast it is and when it will end, as text and as a page that reloads itself.

Read from metrics.jsonl as it grows, by any process: the run knows nothing of it. Needs no jax.
"""

import dataclasses
import html
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence

from xformers_lab import files
from xformers_lab.report import human, offline, plot, stored
from xformers_lab.report.braille import curve
from xformers_lab.train.tail import Tail

RECENT = 50  # steps that the speed is taken of
POINTS = 200  # of a curve: each is the mean of as many steps as it takes
EVERY = 2.0  # seconds between two looks
HEIGHT = 8  # lines of a curve in a terminal

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at one moment. step: the last one taken, 0 before the first; loss and validation: (step, value), the loss a
    mean over neighbouring steps; seconds: of a step, lately, None where none was timed."""

    run: stored.Run
    step: int
    loss: Points
    validation: Points
    seconds: float | None

    @property
    def total(self) -> int:
        return int(human.number(self.run.value("steps")) or 0)

    @property
    def running(self) -> bool:
        return self.run.status == stored.RUNNING

    def facts(self) -> list[tuple[str, str]]:
        """What is known beside the curves, in words."""
        facts = [("run", str(self.run.folder)), ("status", self.run.progress)]
        facts.append(("step", f"{self.step:,} of {self.total:,}"))
        if self.loss:
            facts.append(("loss", human.score(self.loss[-1][1])))
        if self.validation:
            facts.append(("validation", human.score(self.validation[-1][1])))
        batch, length = (human.number(self.run.value(key)) for key in ("batch", "seq_len"))
        if self.seconds and batch and length:
            facts.append(("speed", f"{human.count(batch * length / self.seconds)} tok/s"))
        if self.seconds and self.running:
            facts.append(("left", f"about {human.duration((self.total - self.step) * self.seconds)}"))
        return facts


def snapshot(folder: pathlib.Path, tail: Tail) -> Snapshot:
    """The run in a folder as it is now; raises UsageError where there is none."""
    run = stored.at(folder)
    lines = tail.lines()
    timed = [seconds for line in lines[-RECENT:] if (seconds := human.number(line.get("seconds")))]
    of = lambda key: [(line["step"], value) for line in lines if (value := human.number(line.get(key))) is not None]
    return Snapshot(
        run,
        lines[-1]["step"] if lines else 0,
        _thinned(of("loss")),
        of("validation_metric"),
        statistics.median(timed) if timed else None,
    )


def follow(folder: pathlib.Path, every: float = EVERY) -> Iterator[Snapshot]:
    """The run in a folder, again after every so many seconds until no process works in it: the last one is how it
    ended. Raises UsageError where there is none."""
    tail = Tail(folder)
    while (now := snapshot(folder, tail)).running:
        yield now
        time.sleep(every)
    yield now


def in_text(now: Snapshot, width: int) -> list[str]:
    """Lines of at most `width` columns."""
    lines = [human.plain(now.run.summary)[:width]]
    lines.append("  ".join(f"{name} {human.plain(words)}" for name, words in now.facts() if name != "run")[:width])
    for title, points in (("loss", now.loss), ("validation", now.validation)):
        if len(points) > 1:
            ys = [y for _, y in points]
            labels = [human.score(max(ys)), *[""] * (HEIGHT - 2), human.score(min(ys))]
            drawn = curve(points, now.total, max(10, width - 9), HEIGHT)
            lines += ["", title, *(f"{label:>7} {line}"[:width] for label, line in zip(labels, drawn, strict=True))]
    return lines


def write(now: Snapshot, path: pathlib.Path | str, every: float = EVERY) -> None:
    """Write the page, replaced as a whole; it reloads itself as long as the run goes on. Raises OSError where the file
    cannot be written."""
    files.replace_text(pathlib.Path(path), page(now, every))


def page(now: Snapshot, every: float = EVERY) -> str:
    """One offline HTML file."""
    style = (pathlib.Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    title, text = html.escape(now.run.summary), lambda words: html.escape(human.plain(words))
    again = f'<meta http-equiv="refresh" content="{max(1, round(every))}">' if now.running else ""
    facts = "".join(f"<dt>{text(name)}</dt><dd>{text(words)}</dd>" for name, words in now.facts())
    curves = (("Training loss", now.loss), ("Validation", now.validation))
    figures = "".join(
        f"<figure><figcaption><h3>{title}</h3></figcaption>{_drawn(title, points, now.total)}</figure>"
        for title, points in curves
        if len(points) > 1
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(offline.policy(style, []))}">\n'
        f'{again}<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{style}</style>\n'
        f"</head>\n<body>\n<header><h1>{title}</h1></header>\n<main>\n<section><dl>{facts}</dl></section>\n"
        f'<section class="charts">{figures}</section>\n</main>\n</body>\n</html>\n'
    )


def _drawn(title: str, points: Points, last: int) -> str:
    ys = [y for _, y in points]
    low, high = min(ys), max(ys)
    room = 0.05 * (high - low) or 0.1
    low, high = low - room, high + room
    y = plot.Axis("", low, high, [(mark, human.significant(mark)) for mark in plot.ticks(low, high)], grid=True)
    x = plot.Axis("steps", 0, last, [(mark, human.count(mark) if mark else "0") for mark in plot.ticks(0, last)])
    line = plot.Line(0, [x for x, _ in points], ys)
    return plot.svg(plot.Plot(x, y, [line]), plot.look([title]), title)


def _thinned(points: Sequence[tuple[int, float]]) -> Points:
    """At most POINTS means of neighbours, each at the last of its steps."""
    width = -(-len(points) // POINTS) or 1
    groups = [points[at : at + width] for at in range(0, len(points), width)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]
