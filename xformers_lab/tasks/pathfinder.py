"""Pathfinder: are the two discs joined by a dashed line?"""

import math

import numpy as np

from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task
from xformers_lab.tasks._splits import generator, of_rows

DASH, GAP = 3, 1
# Pixels of a line are at most LINK apart, those of two lines at least APART, counted along the longer axis.
LINK, APART = GAP + 1, 3
# The least square that holds two lines of two dashes and what is to be kept free around them.
LEAST = 16
# Turns tried for each dash of a line (for its first dash alone, FIRST), and places for a line, before the picture is
# begun anew.
TURNS, FIRST, PLACES = 8, 3, 40
# The standard deviation of a turn between dashes, in radians.
BEND = 0.4


class Pathfinder(Task):
    """Pathfinder (Linsley et al., 2018, arXiv 1805.08315; as a sequence of pixels: Long Range Arena, Tay et al., 2020,
    arXiv 2011.04006, whose Pathfinder and Path-X are seq_len=1024 and seq_len=16384).

    A square picture with two long dashed lines, shorter ones between them, and two discs: at both ends of one of the
    long lines (class 1), or at an end of each (class 0), so that what is drawn beside the discs tells nothing. No two
    lines come closer than the gaps within a line. Pictures are drawn as they are wanted, pixel by pixel, 0 or 1, row by
    row; seq_len is the number of pixels. Splits share no picture: the places of the two discs say which split a picture
    is of.

    Options:
        dashes: of a long line; none: a fifth of the side of the picture
        distractors: shorter lines, of half as many dashes; none: an eighth of the side

    Metric: accuracy. Chance: 1 / 2.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = outputs = 2
    chance = 0.5

    def __init__(self, setting: Setting, *, dashes: int | None = None, distractors: int | None = None):
        super().__init__(setting)
        self.side = side = math.isqrt(setting.seq_len)
        if side**2 != setting.seq_len or side < LEAST:
            near = max(LEAST, side)
            raise ValueError(
                f"seq_len={setting.seq_len} is no square of {LEAST} pixels or more a side: use {near**2} or "
                f"{(near + 1) ** 2} (Long Range Arena: 1024, Path-X: 16384)"
            )
        self.dashes = side // 5 if dashes is None else dashes
        self.distractors = side // 8 if distractors is None else distractors
        # Room for each line and what is to be kept free around it, at a density at which drawing still succeeds.
        room = (2 * self.dashes + self.distractors * max(1, self.dashes // 2)) * (DASH + GAP) * APART
        if self.dashes < 2 or self.distractors < 0 or room > side**2 / 2:
            raise ValueError(
                f"dashes={self.dashes} and distractors={self.distractors} do not fit a picture of {side} x {side}: use "
                f"2 dashes or more, and fewer where the picture is small"
            )
        self.image = (side, side)

    def batch(self, split: Split, step: int) -> Batch:
        rng = generator(self.setting.seed, split, step)
        pictures, labels = zip(*(self._picture(rng, split) for _ in range(self.setting.batch)), strict=True)
        count = len(labels)
        return Batch(np.stack(pictures), np.array(labels, np.int32), np.ones(count, np.float32))

    def _picture(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, int]:
        label = int(rng.integers(2))  # drawn once, so that classes are equal in every split
        while True:
            canvas = _Canvas(self.side, rng)
            first, second = canvas.line(self.dashes), canvas.line(self.dashes)
            if first is None or second is None:
                continue
            joined = [(line[0], line[-1]) for line in (first, second)]
            apart = [(a, b) for a in joined[0] for b in joined[1]]
            ends = rng.permutation(joined if label else apart)
            ends = ends[of_rows(np.sort(ends, 1) + 1) == SPLITS.index(split)]
            # Discs, which reach a pixel further than their lines, must not touch.
            rows, columns = np.abs(np.diff(np.divmod(ends, self.side), axis=2))[..., 0]
            ends = ends[np.maximum(rows, columns) > LINK + 2]
            if len(ends) == 0:
                continue
            shorter = [canvas.line(max(1, self.dashes // 2)) for _ in range(self.distractors)]
            if None not in shorter:
                return canvas.drawn(ends[0].tolist()), label

    def decode(self, tokens: list[int]) -> str:
        """The picture as lines of text."""
        signs = "".join(".#"[token] for token in tokens)
        return "\n".join(signs[at : at + self.side] for at in range(0, len(signs), self.side))

    def answer_name(self, answer: int) -> str:
        return ("apart", "joined")[answer]

    def describe(self) -> dict:
        return {"source": "generated", "side": self.side, "dashes": self.dashes, "distractors": self.distractors}


class _Canvas:
    """Pixels of dashed lines, and where none may come any more. Plain bytes: a numpy call costs more than a dash."""

    def __init__(self, side: int, rng: np.random.Generator):
        self.side, self.rng = side, rng
        self.pixels, self.taken = bytearray(side * side), bytearray(side * side)

    def line(self, dashes: int) -> list[int] | None:
        """The pixels of a new line from end to end; None where there is no room."""
        for across, down, heading in self.rng.random((PLACES, 3)).tolist():
            begin = 1 + across * (self.side - 3), 1 + down * (self.side - 3)
            if pixels := self._grown(begin, 2 * math.pi * heading, dashes):
                for pixel in pixels:
                    self.pixels[pixel] = 1
                    self._keep_free(pixel)
                return pixels
        return None

    def drawn(self, discs: list[int]) -> np.ndarray:
        """(side^2,) the picture, with a disc around each of these pixels."""
        picture = np.frombuffer(bytes(self.pixels), np.uint8).reshape(self.side, self.side).astype(np.int32)
        for disc in discs:
            row, column = divmod(disc, self.side)
            picture[row - 1 : row + 2, column - 1 : column + 2] = 1
        return picture.reshape(-1)

    def _grown(self, begin: tuple[float, float], heading: float, dashes: int) -> list[int] | None:
        """A line that bends after every dash and keeps away from all others, and from itself. Where it gets stuck, its
        last dashes are drawn anew."""
        line: list[tuple[list[int], float, tuple[float, float]]] = []
        turns = (self.rng.standard_normal(TURNS * dashes) * BEND).tolist()
        for tried, turn in enumerate(turns):
            if not line and tried >= FIRST:
                return None
            heading_now, begin_now = (line[-1][1], line[-1][2]) if line else (heading, begin)
            dash, end = self._dash(begin_now, heading_now + turn)
            if dash is None or self._crowded(dash, [pixel for pixels, *_ in line[:-1] for pixel in pixels]):
                # Not every failure takes a dash back: another turn may do.
                if turn > 0 and len(line) > 1:
                    line.pop()
                continue
            line.append((dash, heading_now + turn, end))
            if len(line) == dashes:
                return [pixel for pixels, *_ in line for pixel in pixels]
        return None

    def _crowded(self, dash: list[int], own: list[int]) -> bool:
        """Whether a dash comes closer than APART to another line, or to these pixels of its own."""
        if any(self.taken[pixel] for pixel in dash):
            return True
        places = [divmod(pixel, self.side) for pixel in own]
        return any(
            abs(row - r) < APART and abs(column - c) < APART
            for row, column in (divmod(pixel, self.side) for pixel in dash)
            for r, c in places
        )

    def _dash(self, begin: tuple[float, float], heading: float) -> tuple[list[int] | None, tuple[float, float]]:
        """The pixels of a dash, None where it leaves the picture; and where the next one begins."""
        across, down = math.cos(heading), math.sin(heading)
        longest = max(abs(across), abs(down))
        across, down = across / longest, down / longest
        dash = []
        for step in range(DASH):
            column, row = round(begin[0] + step * across), round(begin[1] + step * down)
            # A disc takes a pixel on each side.
            if not (1 <= column < self.side - 1 and 1 <= row < self.side - 1):
                return None, begin
            dash.append(row * self.side + column)
        return dash, (begin[0] + (DASH + GAP) * across, begin[1] + (DASH + GAP) * down)

    def _keep_free(self, pixel: int) -> None:
        """Marks what is too near to a pixel, which a disc may make one wider."""
        row, column = divmod(pixel, self.side)
        left, right = max(0, column - APART), min(self.side, column + APART + 1)
        for near in range(max(0, row - APART), min(self.side, row + APART + 1)):
            self.taken[near * self.side + left : near * self.side + right] = b"\1" * (right - left)
