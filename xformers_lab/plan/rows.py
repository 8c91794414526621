"""The rows of a plan. Needs no device: a command keeps them, and its worker compiles."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from xformers_lab.config import Config, edit, get, to_dict
from xformers_lab.errors import UsageError
from xformers_lab.plan.longest import longest
from xformers_lab.plan.target import Target
from xformers_lab.supervise.process import Ended, Worker

TRAIN, PREFILL, TOKEN = "train", "prefill", "token"
DECODE = (PREFILL, TOKEN)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One program of a config on a target, and the row that it becomes."""

    target: Target
    config: Config
    program: str
    row: dict

    @property
    def title(self) -> str:
        """What progress calls it."""
        program = "" if self.program == TRAIN else f", {self.program}"
        return f"{self.config.model.attention} at {self.config.seq_len} tokens for {self.target.name}{program}"

    def arguments(self, config: Config | None = None) -> dict:
        """What the worker's functions take, of this config or of another in its place."""
        config = self.config if config is None else config
        return {"target": dataclasses.asdict(self.target), "config": to_dict(config), "program": self.program}


def plan(
    targets: Sequence[Target],
    configs: Sequence[Config],
    varied: Sequence[str],
    worker: Worker,
    *,
    programs: Sequence[str] = (TRAIN,),
    search: bool = False,
    skip_impossible: bool = False,
    progress: Callable[[str], None] = lambda words: None,
) -> list[dict]:
    """A row for each target, config and program, compiled one after the other in the worker.

    A row has the keys that vary (attention and seq_len in any case), target, program ("train", one step of training;
    "prefill", reading a context of seq_len into a cache; "token", one more token behind it; the last two of one
    sequence on one device), status and reason, and config. Where it is "ok":

    * devices, axes (those of the layout with several devices) and memory, bytes of one device, as published or its
      share of this machine's; all bytes are of one device.
    * bytes: parameters, optimizer, cache, other (batch, averages, memories), activations (what is live within the step,
      gradients too), results (that take no argument's place), padding (of arguments, by the compiler), program, total.
      What is not known is not there.
    * fits: whether total is no more than memory and the compiler found room; None where nothing tells. why: why not.
    * flops_per_token and flops_per_device, shared out evenly; None where a kernel hides its inside.
    * kernel: what runs attention over a pattern of positions there; see `bench.cells.bench`.
    * collectives: see `collectives.of`; estimate: see `roofline.estimate`, None where there is none.
    * compile_seconds, or lower_seconds on a GPU, which nothing is compiled for.

    search: each config's seq_len is where the search for the longest one that fits begins. The row is of that length,
    and has longest and too_long, the shortest that was tried in vain, each None where there is none, and tried.

    Raises UsageError, before anything compiles, where a config cannot be on a target; with skip_impossible its row is
    "refused". After an interruption the rows so far come back, the rest as "interrupted".
    """
    keys = list(dict.fromkeys([*varied, "attention", "seq_len"]))
    cells = [
        Cell(target, config, program, {key: get(config, key) for key in keys} | _blank(target, config, program))
        for target, config, program in itertools.product(targets, configs, programs)
    ]
    try:
        progress(f"checking {len(cells)} program{'s' * (len(cells) > 1)}")
        for cell in cells:
            try:
                worker.ask("plan.work.look", stall=cell.config.stall, **cell.arguments())
            except UsageError as error:
                if not skip_impossible:
                    raise
                cell.row.update(status="refused", reason=str(error))
            except Ended as ended:
                _end(cell, ended)
        for cell in cells:
            if cell.row["status"] is None:
                (_search if search else _measure)(cell, worker, progress)
    except Ended as ended:
        if ended.status != "interrupted":
            raise
        for cell in cells:
            if cell.row["status"] is None:
                cell.row.update(status="interrupted", reason="interrupted before it was compiled")
    return [cell.row for cell in cells]


def _blank(target: Target, config: Config, program: str) -> dict:
    about = {"target": target.name, "program": program, "status": None}
    return {"kind": "plan"} | about | {"config": to_dict(config)}


def _measure(cell: Cell, worker: Worker, progress: Callable[[str], None]) -> None:
    progress(f"compiling {cell.title}")
    try:
        figures = worker.ask("plan.work.measure", stall=cell.config.stall, **cell.arguments())
    except Ended as ended:
        _end(cell, ended)
    except UsageError as error:
        cell.row.update(status="failed", reason=str(error))
    else:
        cell.row.update({"status": "ok", **figures})


def _search(cell: Cell, worker: Worker, progress: Callable[[str], None]) -> None:
    """Fill a row with the figures of the longest sequence that fits."""
    tried: dict[int, Cell] = {}

    def fits(length: int) -> bool | None:
        one = dataclasses.replace(cell, config=edit(cell.config, seq_len=length), row=dict(cell.row))
        tried[length] = one
        try:
            if length != cell.config.seq_len:
                worker.ask("plan.work.look", stall=cell.config.stall, **one.arguments())
        except UsageError as error:
            one.row.update(status="refused", reason=str(error))
        except Ended as ended:
            _end(one, ended)
        else:
            _measure(one, worker, progress)
        return one.row.get("fits") if one.row["status"] == "ok" else None

    found = longest(fits, cell.config.seq_len)
    shown = tried[found.fits or cell.config.seq_len]
    cell.row.update(shown.row, seq_len=shown.config.seq_len, config=to_dict(shown.config))
    cell.row.update(longest=found.fits, too_long=found.too_long, tried=sorted(tried))
    if found.stopped is not None and found.stopped != shown.config.seq_len:
        cell.row["why"] = f"{found.stopped} tokens could not be tried: {tried[found.stopped].row.get('reason')}"


def _end(cell: Cell, ended: Ended) -> None:
    """What the row of a cell says that ended the worker; raises where a signal did."""
    if ended.status == "interrupted":
        raise ended
    cell.row.update(ended.record)
