"""What a worker does for a bench: looks at configs, checks mechanisms, measures the cells of one length."""

from collections.abc import Sequence

from xformers_lab import config as configs
from xformers_lab.bench import cells as bench
from xformers_lab.bench.rows import Cell
from xformers_lab.measure import speed
from xformers_lab.supervise.worker import Tell


def machine(tell: Tell) -> dict[str, str]:
    """What measures."""
    return speed.machine()


def look(tell: Tell, config: dict, passes: Sequence[str]) -> dict:
    """What the rows of a config whose mechanism cannot be built say, {} where it can; raises UsageError where the
    config cannot be."""
    chosen = configs.from_dict(config)
    tell.doing(f"checking the config of {chosen.model.attention} at {chosen.seq_len} tokens")
    cells = [Cell(chosen, direction, {"status": None}) for direction in passes]
    bench.look(cells)
    return cells[0].row if not cells[0].open else {}


def check(tell: Tell, choice: str) -> str | None:
    """Why a mechanism's conformance check refuses it, None where it passes."""
    from xformers_lab.check import cache

    if cache.unproven(choice):
        tell.doing(f"checking {choice}")
    return cache.refusal(choice)


def measure(tell: Tell, cells: list[tuple[dict, str]], rounds: int) -> list[dict]:
    """The figures of cells (config, pass) of one length. A row that ends before the others goes out at once."""
    length = [Cell(configs.from_dict(config), direction, {"status": None}) for config, direction in cells]

    def doing(words: str, cell: Cell) -> None:
        tell.doing(words, cell=length.index(cell))

    def ended(cell: Cell) -> None:
        tell(ended=length.index(cell), row=cell.row)

    bench.measure(length, rounds, doing, ended)
    return [cell.row for cell in length]
