"""A bench whose cells are measured in a worker: what ends the worker is a row, and the others go on."""

from collections.abc import Callable, Sequence

from xformers_lab.bench import rows
from xformers_lab.bench.rows import PASSES, Cell
from xformers_lab.config import Config, to_dict
from xformers_lab.supervise.process import Ended, Worker


def bench(
    configs: Sequence[Config],
    worker: Worker,
    *,
    rounds: int = 5,
    passes: Sequence[str] = PASSES[:2],
    check: bool = True,
    progress: Callable[[str], None],
) -> list[dict]:
    """The rows of `bench.bench`, each measured in the worker's process.

    A cell that hangs there ends as "stalled", one that crashes in native code as "failed", both with what it was doing;
    the other cells of its length are measured again without it, as interleaving wants it. After an interruption the
    rows measured so far come back, the rest as "interrupted".
    """
    cells = rows.blank(configs, passes, check)
    try:
        machine = worker.ask("bench.work.machine")
        for cell in cells:
            cell.row["machine"] = machine
        for start in range(0, len(cells), len(passes)):
            _look(cells[start : start + len(passes)], passes, worker)
        if check:
            _check([cell for cell in cells if cell.open], worker, progress)
        for length in sorted({cell.config.seq_len for cell in cells}):
            while ready := [cell for cell in cells if cell.open and cell.config.seq_len == length]:
                _measure(ready, rounds, worker, progress)
    except Ended as ended:
        if ended.status != "interrupted":
            raise
        rows.interrupted(cells)
    rows.exponents(cells)
    return [cell.row for cell in cells]


def _look(cells: Sequence[Cell], passes: Sequence[str], worker: Worker) -> None:
    """End the cells of one config where its mechanism cannot be built."""
    config = cells[0].config
    try:
        outcome = worker.ask("bench.work.look", stall=config.stall, config=to_dict(config), passes=list(passes))
    except Ended as ended:
        outcome = _outcome(ended)
    for cell in cells:
        cell.row.update(outcome)


def _check(cells: Sequence[Cell], worker: Worker, progress: Callable[[str], None]) -> None:
    """Refuse the cells whose mechanism does not pass its conformance check; each mechanism is checked once."""
    heard = lambda message: progress(message["doing"])
    for choice in dict.fromkeys(cell.config.model.attention for cell in cells):
        mine = [cell for cell in cells if cell.config.model.attention == choice]
        try:
            reason = worker.ask("bench.work.check", heard, stall=mine[0].config.stall, choice=choice)
        except Ended as ended:
            reason = ended.refusal(choice)
        for cell in mine if reason else ():
            cell.end("refused", reason)


def _measure(cells: Sequence[Cell], rounds: int, worker: Worker, progress: Callable[[str], None]) -> None:
    """Measure cells of one length until all have ended, or one of them ended the worker."""
    last = None

    def heard(message: dict) -> None:
        nonlocal last
        if "ended" in message:
            cells[message["ended"]].row.update(message["row"])
        elif message["doing"] != last:
            last = message["doing"]
            progress(last)

    pairs = [(to_dict(cell.config), cell.direction) for cell in cells]
    try:
        figures = worker.ask("bench.work.measure", heard, stall=cells[0].config.stall, cells=pairs, rounds=rounds)
    except Ended as ended:
        at = ended.clock.message.get("cell")
        outcome = _outcome(ended)
        for cell in cells if at is None else [cells[at]]:
            cell.row.update(outcome)
        return
    for cell, row in zip(cells, figures, strict=True):
        cell.row.update(row)


def _outcome(ended: Ended) -> dict:
    """What the row of a cell says that ended the worker; raises where a signal did."""
    if ended.status == "interrupted":
        raise ended
    return ended.record
