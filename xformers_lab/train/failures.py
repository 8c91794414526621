"""How a run of training ends where it has no result."""

from xformers_lab.errors import RunFailed

MEND = "try a smaller lr, clip=1, or dtype=float32"


class Diverged(RunFailed):
    """The loss of training stayed non-finite, or that of an evaluation was; `status` is what the run's row says,
    `record` that row."""

    status = "nan"
    record: dict


class OutOfMemory(RunFailed):
    """The device had no room for a step."""

    status = "oom"
