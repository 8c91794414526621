"""Results in words, as the terminal and the pages say them."""

from collections.abc import Mapping

from xformers_lab.experiment.result import Measurement, Result
from xformers_lab.record import BUSY
from xformers_lab.report import human

HOLDS = {True: "holds", False: "fails", None: "left open"}


def number(measurement: Measurement) -> str:
    """ "0.021 ± 0.004 (3)": mean, half of the 95 % interval, and how many trials it is of."""
    known = measurement.estimate
    if known is None:
        return "not measured"
    if known.half is None:
        return f"{_short(known.mean)} (one trial)"
    return _short(known.mean) + (f" ± {_short(known.half)}" if known.half else "") + f" (n={known.n})"


def rule(measurement: Measurement) -> str:
    """ "at most 0.02: holds"; "reported" where it decides nothing."""
    return f"{measurement.rule}: {HOLDS[measurement.holds]}" if measurement.rule else "reported"


def verdicts(results: Mapping[int, Result]) -> str:
    """ "reproduced; at scale 2 inconclusive": the verdict of every scale."""
    at = lambda scale: "" if scale == 1 else f"at scale {scale} "
    parts = [at(scale) + result.verdict for scale, result in results.items()]
    return "; ".join(parts) or "not run"


def minutes(result: Result) -> str:
    """How long it took."""
    return f"{result.minutes:.1f} min"


def missing(result: Result) -> list[str]:
    """What did not end, once each."""
    return list(dict.fromkeys(reason for each in result.measurements for reason in each.missing))


def pinned(result: Result, digest: str) -> str:
    """Where the thresholds are fixed: the commit of the experiment's file, and what speaks against it."""
    if result.digest != digest:
        return "The file of the experiment was changed since: this result is of an older one."
    if result.git is None:
        return "The file of the experiment was in no commit."
    commit = str(result.git.get("commit", ""))[:10]
    if result.git.get("dirty"):
        return f"The file of the experiment was changed since its last commit, {commit}, and not committed."
    return f"The rule is that of commit {commit}, unchanged since before the run."


def about(result: Result, digest: str) -> str:
    """What a reader has to know beside the numbers: seeds, machine, whether that was quiet, whose rule it is."""
    return " ".join(filter(None, [setting(result), quiet(result), pinned(result, digest)]))


def setting(result: Result) -> str:
    """Seeds, machine and versions in one line."""
    machine = ", ".join(f"{what} {value}" for what, value in result.machine.items())
    seeds = human.listing([str(seed) for seed in result.seeds])
    return f"Seeds {seeds}; {minutes(result)}; xformers_lab {result.version}; {machine}; {result.ended}."


def quiet(result: Result) -> str:
    """Whether the times are of a quiet machine; empty of a result that does not tell."""
    if result.times is None:
        return ""
    timed, busy, spread = (result.times[key] for key in ("timed", "busy", "spread"))
    if not busy:
        return f"Times are of a quiet machine: median over least time of equal work at most {spread:.2f}."
    many = f"{busy:g} of {timed:g} timed rows"
    return (
        f"Times are not of a quiet machine: median over least time of equal work above {BUSY} in {many}, up to "
        f"{spread:.2f}."
    )


def _short(value: float) -> str:
    return human.significant(value) if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"
