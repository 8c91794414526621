"""A run that takes more steps than it was begun with: `xlab resume RUN steps=2000`.

The longer run is another run, with an id and a folder of its own beside the first, and is bit for bit the one that was
begun with so many steps. It takes over the newest checkpoint and the lines of metrics up to it, and leaves the first as
it was. That can be where each step so far was taken at the learning rate that the longer run has there, so not with a
decay towards the last step, nor where the warm-up is a share of the steps. Of schedule=wsd the stable part can be made
longer, by what stopped before its cooldown.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
from xformers_lab.errors import IntegrityError, UsageError
from xformers_lab.train import hosts, records

EXTENDED = "extended.json"  # of the folder of a longer run: what it went on from
GROWING = ("steps", "warmup", "cooldown")
LABELS = ("name", "tags")
_TAKEN = ("env.json", "sources.json", "initialised.json")


def asked(config: Config, words: Sequence[str]) -> Config:
    """The config of a run with what words of `resume` say: steps, warmup and cooldown of a longer run, name and tags. A
    longer run has the tags of the first one too, and no name but its own. Raises UsageError at any other word."""
    changes = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.rpartition(".")[2]
        if not equals or key not in (*GROWING, *LABELS):
            raise UsageError(
                f'"{word}": resume takes steps= (with warmup= and cooldown=) for a longer run, name= and tags=; what '
                "else differs makes a run of its own, with xlab train"
            )
        changes[key] = configs.typed(key, configs.spec.bare(text), word)
    asked = edit(config, **changes)
    if configs.identity(asked) == configs.identity(config):
        return asked
    if asked.train.steps <= config.train.steps:
        raise UsageError(
            f"{' '.join(words)}: the run has steps={config.train.steps}; only more steps go on from it, and anything "
            "else is a run of its own, with xlab train"
        )
    tags = "+".join(filter(None, [config.tags, changes.get("tags")])) or None
    return edit(asked, name=changes.get("name"), tags=tags)


def folder(run_dir: pathlib.Path, config: Config) -> pathlib.Path:
    """Where the longer run of a run lives: beside it."""
    return (run_dir if run_dir.name else run_dir.absolute()).parent / configs.identity(config)


def begin(run_dir: pathlib.Path, first: Config, config: Config) -> pathlib.Path:
    """Have the folder of the longer run hold what the first one left, where it has not begun -> that folder, in which
    `loop.resume` goes on.

    Args:
        run_dir: the folder of the first run, whose config is `first`.
        config: that of the longer run, as `asked` gives it.

    Raises UsageError where the steps so far are not those that the longer run takes, IntegrityError where checkpoints
    or lines of metrics.jsonl are lost.
    """
    from xformers_lab.train import checkpoint, selection
    from xformers_lab.train.jobs import prepare
    from xformers_lab.train.state import rates_of

    target = folder(run_dir, config)
    if hosts.of_first(lambda: checkpoint.steps(target)):
        return target
    if (records.read_json(run_dir / "result.json") or {}).get("status") == "nan":
        raise UsageError(f"{run_dir}: it diverged, and so would a longer run of it")
    if not checkpoint.steps(run_dir):
        raise UsageError(f"{run_dir}: holds no checkpoint to go on from; train it with xlab resume {run_dir}")
    with hosts.held_by_first(records.locked(run_dir)):
        job = prepare(first, run_dir)
        kept, step = checkpoint.restore(run_dir, job.target(), job.about)
        state, best = selection.parted(kept)
        _refuse_other_rates(first, config, step)
        if best is not None and (at := int(best.step)) and not _validates(config, at):
            raise UsageError(f"steps={config.train.steps}: the best parameters are of step {at}, which {_UNSEEN}")
        if lost := records.missing(run_dir, step):
            raise IntegrityError(f"{run_dir / 'metrics.jsonl'}: the lines of steps {lost} are missing or damaged")
        lines = [_as_longer(line, config) for line in records.read(run_dir) if line["step"] <= step]
        with hosts.held_by_first(records.locked(target)):
            for name in _TAKEN:
                if hosts.first() and (run_dir / name).is_file():
                    shutil.copy(run_dir / name, target / name)
            records.write_json(target / "config.json", configs.to_dict(config))
            about = {"run": str(run_dir), "id": configs.identity(first), "step": step, "steps": first.train.steps}
            records.write_json(target / EXTENDED, about)
            records.write_lines(target, lines)
            state = dataclasses.replace(state, rates=rates_of(config.train))
            checkpoint.save(target, step, selection.kept(state, best), prepare(config, target).about)
    return target


_UNSEEN = "a run of so many steps does not validate; choose an eval_every that divides the steps of the first run"


def _refuse_other_rates(first: Config, config: Config, step: int) -> None:
    """Raises UsageError where one of the first `step` steps has another learning rate in the longer run."""
    import numpy as np

    from xformers_lab.train.optimizer import learning_rate

    rates = lambda config: np.asarray(learning_rate(config.train)(np.arange(step)))
    was, now = rates(first), rates(config)
    if not (other := np.flatnonzero(was != now)).size:
        return
    at, steps = int(other[0]), config.train.steps
    warm = round(first.train.warmup * first.train.steps) / steps
    same_warm = edit(config, warmup=float(f"{warm:.9g}"))
    stable = first.train.steps - round(first.train.cooldown * first.train.steps)
    if np.array_equal(was, rates(same_warm)):
        mend = f"say warmup={same_warm.train.warmup:g} too, for as many steps of warm-up as there were"
    elif config.train.schedule == "wsd" and step > stable:
        mend = (
            f"its cooldown began after step {stable}, and its newest checkpoint is of step {step}: begin one with more "
            "steps, which as long as it has not come to its cooldown goes on with other steps= and cooldown="
        )
    else:
        mend = (
            "only rates that do not go by the last step can go on, such as those of schedule=constant warmup=0, or of "
            "wsd before its cooldown"
        )
    raise UsageError(
        f"steps={steps}: step {at + 1} was taken at the learning rate {was[at]:.4g}, which would be {now[at]:.4g} in a "
        f"run of {steps} steps (schedule={config.train.schedule}, warmup={config.train.warmup:g}); {mend}"
    )


def _validates(config: Config, step: int) -> bool:
    from xformers_lab.train.log import due

    return due(step, config.train.eval_every, config.train.steps)


def _as_longer(line: dict, config: Config) -> dict:
    """A line of metrics as the longer run writes it: the last step of the first one was validated, whatever its
    number."""
    if _validates(config, line["step"]):
        return line
    return {key: value for key, value in line.items() if key not in ("validation_loss", "validation_metric")}
