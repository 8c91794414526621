"""Pathfinder: are the two discs joined by a dashed line?"""

import math

import numpy as np

from xformers_lab.tasks import SPLITS, Batch, Setting, Split, Task, _presets
from xformers_lab.tasks._splits import generator, of_rows

# Pixels of a line are at most gap + 1 apart, those of two lines at least one more, counted along the longer axis.
DASH, GAP = 3, 1
# Long Range Arena's "hard" pictures by their side: dash, gap, dashes, distractors, distractor_dashes. Its gaps at 128
# pixels, Path-X, are 2 or 3, and its dashes at 32 are 2 long, at which lines this far apart do not fit.
PUBLISHED = {32: (1, 1, 14, 5, 4), 64: (5, 1, 14, 5, 4), 128: (5, 2, 14, 8, 4), 256: (5, 3, 14, 7, 4)}
# The least square that holds two lines of two dashes and what is to be kept free around them.
LEAST = 16
# Turns tried for each dash of a line (for its first dash alone, FIRST), and places for a line, before the picture is
# begun anew.
TURNS, FIRST, PLACES = 8, 3, 40
# The standard deviation of a turn between dashes, in radians.
BEND = 0.4


class Pathfinder(Task):
    """Pathfinder (Linsley et al., 2018, arXiv 1805.08315; as a sequence of pixels: Long Range Arena, Tay et al., 2020,
    arXiv 2011.04006, whose Pathfinder and Path-X are preset=lra at seq_len=1024 and at seq_len=16384).

    A square picture with two long dashed lines, shorter ones between them, and two discs: at both ends of one of the
    long lines (class 1), or at an end of each (class 0), so that what is drawn beside the discs tells nothing. No two
    lines come closer than the gaps within a line. Pictures are drawn as they are wanted, pixel by pixel, 0 or 1, row by
    row; seq_len is the number of pixels. Splits share no picture: the places of the two discs say which split a picture
    is of. The preset has the published numbers and sizes of lines, but dashes of 1 pixel in place of 2 at seq_len=1024,
    where lines that keep apart find no room else. Long Range Arena's pictures have smooth edges, in grey.

    Options:
        dashes: of a long line; none: a fifth of the side of the picture
        distractors: how many shorter lines there are; none: an eighth of the side
        distractor_dashes: of a shorter line; none: half as many as of a long one
        dash: pixels of a dash; none: 3
        gap: pixels between two dashes; none: 1
        preset: lra: the sizes of Long Range Arena at seq_len=1024, 4096, 16384 (Path-X) or 65536

    Metric: accuracy. Chance: 1 / 2.
    """

    target = "sequence"
    kinds = ("encoder", "decoder")
    vocab = outputs = 2
    chance = 0.5

    def __init__(
        self,
        setting: Setting,
        *,
        dashes: int | None = None,
        distractors: int | None = None,
        distractor_dashes: int | None = None,
        dash: int | None = None,
        gap: int | None = None,
        preset: _presets.Preset | None = None,
    ):
        super().__init__(setting)
        self.side = side = math.isqrt(setting.seq_len)
        if side**2 != setting.seq_len or side < LEAST:
            near = max(LEAST, side)
            raise ValueError(
                f"seq_len={setting.seq_len} is no square of {LEAST} pixels or more a side: use {near**2} or "
                f"{(near + 1) ** 2} (Long Range Arena: 1024, Path-X: 16384)"
            )
        if preset is not None:
            if side not in PUBLISHED:
                sizes = ", ".join(f"seq_len={size**2}" for size in PUBLISHED)
                raise ValueError(f"preset={preset} has pictures of {sizes} pixels, got seq_len={setting.seq_len}")
            given = {
                "dash": dash,
                "gap": gap,
                "dashes": dashes,
                "distractors": distractors,
                "distractor_dashes": distractor_dashes,
            }
            wanted = dict(zip(given, PUBLISHED[side], strict=True))
            sizes = _presets.published(preset, {name: (given[name], wanted[name]) for name in given})
            dash, gap, dashes, distractors, distractor_dashes = sizes.values()
        self.dash, self.gap = DASH if dash is None else dash, GAP if gap is None else gap
        self.dashes = side // 5 if dashes is None else dashes
        self.distractors = side // 8 if distractors is None else distractors
        self.shorter = max(1, self.dashes // 2) if distractor_dashes is None else distractor_dashes
        if self.dash < 1 or self.gap < 1 or self.shorter < 1:
            raise ValueError(
                f"dash={self.dash}, gap={self.gap} and distractor_dashes={self.shorter} draw no dashed line: use 1 or "
                "more of each"
            )
        # Room for each line and what is to be kept free around it, at a density at which drawing still succeeds.
        room = (2 * self.dashes + self.distractors * self.shorter) * (self.dash + self.gap) * (self.gap + 2)
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
            canvas = _Canvas(self.side, self.dash, self.gap, rng)
            first, second = canvas.line(self.dashes), canvas.line(self.dashes)
            if first is None or second is None:
                continue
            joined = [(line[0], line[-1]) for line in (first, second)]
            apart = [(a, b) for a in joined[0] for b in joined[1]]
            ends = rng.permutation(joined if label else apart)
            ends = ends[of_rows(np.sort(ends, 1) + 1) == SPLITS.index(split)]
            # Discs, which reach a pixel further than their lines, must not touch.
            rows, columns = np.abs(np.diff(np.divmod(ends, self.side), axis=2))[..., 0]
            ends = ends[np.maximum(rows, columns) > self.gap + 3]
            if len(ends) == 0:
                continue
            shorter = [canvas.line(self.shorter) for _ in range(self.distractors)]
            if None not in shorter:
                return canvas.drawn(ends[0].tolist()), label

    def decode(self, tokens: list[int]) -> str:
        """The picture as lines of text."""
        signs = "".join(".#"[token] for token in tokens)
        return "\n".join(signs[at : at + self.side] for at in range(0, len(signs), self.side))

    def answer_name(self, answer: int) -> str:
        return ("apart", "joined")[answer]

    def describe(self) -> dict:
        return {
            "source": "generated",
            "side": self.side,
            "dash": self.dash,
            "gap": self.gap,
            "dashes": self.dashes,
            "distractors": self.distractors,
            "distractor_dashes": self.shorter,
        }


class _Canvas:
    """Pixels of dashed lines, and where none may come any more. Plain bytes: a numpy call costs more than a dash."""

    def __init__(self, side: int, dash: int, gap: int, rng: np.random.Generator):
        self.side, self.dash, self.gap, self.apart, self.rng = side, dash, gap, gap + 2, rng
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
        """Whether a dash comes closer than `apart` to another line, or to these pixels of its own."""
        if any(self.taken[pixel] for pixel in dash):
            return True
        places = [divmod(pixel, self.side) for pixel in own]
        return any(
            abs(row - r) < self.apart and abs(column - c) < self.apart
            for row, column in (divmod(pixel, self.side) for pixel in dash)
            for r, c in places
        )

    def _dash(self, begin: tuple[float, float], heading: float) -> tuple[list[int] | None, tuple[float, float]]:
        """The pixels of a dash, None where it leaves the picture; and where the next one begins."""
        across, down = math.cos(heading), math.sin(heading)
        longest = max(abs(across), abs(down))
        across, down = across / longest, down / longest
        dash = []
        for step in range(self.dash):
            column, row = round(begin[0] + step * across), round(begin[1] + step * down)
            # A disc takes a pixel on each side.
            if not (1 <= column < self.side - 1 and 1 <= row < self.side - 1):
                return None, begin
            dash.append(row * self.side + column)
        return dash, (begin[0] + (self.dash + self.gap) * across, begin[1] + (self.dash + self.gap) * down)

    def _keep_free(self, pixel: int) -> None:
        """Marks what is too near to a pixel, which a disc may make one wider."""
        row, column = divmod(pixel, self.side)
        left, right = max(0, column - self.apart), min(self.side, column + self.apart + 1)
        for near in range(max(0, row - self.apart), min(self.side, row + self.apart + 1)):
            self.taken[near * self.side + left : near * self.side + right] = b"\1" * (right - left)
