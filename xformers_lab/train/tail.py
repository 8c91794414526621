"""metrics.jsonl of a run that is under way, read as it grows. Needs no jax."""

import os
import pathlib

from xformers_lab.train import records


class Tail:
    """The lines of a run so far. Each look reads what was added, or, where the file was replaced as a resume does, all
    of it."""

    def __init__(self, run_dir: pathlib.Path):
        self.path = run_dir / "metrics.jsonl"
        self._lines: dict[int, dict] = {}
        self._file, self._rest = (0, 0), b""

    def lines(self) -> list[dict]:
        """In order of steps, each once; the latest where one stands twice."""
        try:
            with self.path.open("rb") as file:
                now = os.fstat(file.fileno())
                inode, at = self._file
                if now.st_ino != inode or now.st_size < at:
                    self._lines, self._rest, at = {}, b"", 0
                file.seek(at)
                *whole, self._rest = (self._rest + file.read()).split(b"\n")
                self._file = now.st_ino, file.tell()
        except OSError:  # it is not there yet, or not any more
            return list(self._lines.values())
        for text in whole:
            if (line := records.line_of(text.decode(errors="replace"))) is not None:
                self._lines[line["step"]] = line
        return [self._lines[step] for step in sorted(self._lines)]
