"""`xl.plan`, and what `xlab plan` prints."""

import contextlib
from collections.abc import Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.api import arguments, supervised
from xformers_lab.errors import UsageError
from xformers_lab.plan import target
from xformers_lab.plan.target import Target


@arguments.documented()
def plan(
    *what: arguments.What,
    topology: str | Sequence[str] = (),
    platform: str | Sequence[str] = (),
    decode: bool = False,
    longest: bool = False,
    skip_impossible: bool = False,
    trust: bool = False,
    quiet: bool = False,
    **keys: Any,
) -> list[dict[str, Any]]:
    """What configs would cost on devices that need not be here, as `xlab plan` says: their programs are compiled for
    them, and nothing runs.

        rows = xl.plan(task="lm", attention=["full", "local"], seq_len=[4096, 16384], topology="v5e:2x2", layout="fsdp")
        rows = xl.plan(task="copy", seq_len=64, platform="cpu:4", layout="data:2+tensor:2")

    Args:
        what: As `xl.compare` takes it; every combination of the keys' values is a config.
        topology: TPUs by generation and grid of chips, "v5e:4x4"; needs the extra `plan`.
        platform: "cpu:8", this machine's CPU as so many devices, or "gpu:8", of which no more is told than what its
            program is given and computes; without a number as many as the layout has.
        decode: Plan decoding, of one sequence on one device, in place of training.
        longest: Search for the longest sequence that fits, from seq_len on.
        skip_impossible: Keep combinations that cannot be as refused rows.
        trust: Run code outside the package that an @file names.
        quiet: No progress on stderr.
        keys: Keys with their values; see `xl.compare`.

    Returns:
        A row for each target, config and program; `xformers_lab.plan.rows.plan` says what it holds.

    Raises:
        xformers_lab.errors.UsageError: A key or value is wrong, or cannot be on a target, which is found before
            anything compiles; or libtpu is not installed.
    """
    several = lambda names: [names] if isinstance(names, str) else list(names)
    found = target.targets(several(topology), several(platform))
    items = arguments.items(what, keys)
    how = {"decode": decode, "longest": longest, "skip_impossible": skip_impossible}
    rows, _, interrupted = planned(items, found, **how, trust=trust, quiet=quiet)
    supervised.pass_on(interrupted)
    return rows


def planned(
    items: Sequence[configs.Item],
    targets: Sequence[Target],
    *,
    decode: bool,
    longest: bool,
    skip_impossible: bool,
    trust: bool,
    quiet: bool = False,
    lines: bool = True,
) -> tuple[list[dict[str, Any]], list[str], int]:
    """The rows of a plan, the keys that vary, and the signal that ended it before its end, 0 for none. lines: say each
    cell where stderr is no terminal."""
    cells, varied = configs.sweep(items, trust=trust)
    if longest:
        _refuse_search(items, cells, targets)
    from xformers_lab import progress
    from xformers_lab.plan import devices, rows
    from xformers_lab.supervise import process

    most = max(each.devices(cell.train.layout) if each.platform == "cpu" else 1 for each in targets for cell in cells)
    telling = contextlib.nullcontext(lambda text: None) if quiet else progress.words(quiet=not lines)
    with process.Worker(notice=process.ENDS, environment=devices.environment(most)) as worker, telling as tell:
        made = rows.plan(
            targets,
            cells,
            varied,
            worker,
            programs=rows.DECODE if decode else (rows.TRAIN,),
            search=longest,
            skip_impossible=skip_impossible,
            progress=tell,
        )
    return made, varied, worker.stopped


def _refuse_search(items: Sequence[configs.Item], cells: Sequence[configs.Config], targets: Sequence[Target]) -> None:
    """Raises UsageError where the longest sequence that fits cannot be searched for."""
    if len(lengths := {cell.seq_len for cell in cells}) > 1:
        raise UsageError(f"longest: the search begins at one length, and seq_len= has {len(lengths)}: give the first")
    if any(isinstance(item, str) and item.startswith("tokens=") for item in items):
        raise UsageError("longest: the batch stays while the length grows, and tokens= ties them: say batch=")
    if any(each.platform == "gpu" for each in targets):
        raise UsageError("longest: nothing tells what fits on a GPU that is not here: name topology= or platform=cpu")
