"""What a step takes at the least, by the published rates of a device: an estimate, for nothing has run.

A step takes at least its products at the peak rate of the matrix units, its bytes at the bandwidth of the memory, and
what devices exchange at that of their links; all three may go on at once, so that the longest of them is the least.
"""

from collections.abc import Sequence

from xformers_lab.doctor.peaks import Peaks

AGAIN = ("all-reduce",)  # what passes a device's links twice: partial sums, then their total


def estimate(
    peaks: Peaks | None, dtype: str, flops: float | None, moved: int, exchanged: Sequence[dict] | None, tokens: int
) -> dict | None:
    """compute_seconds, memory_seconds and exchange_seconds of one step, seconds, the longest of these, and
    tokens_per_second of all devices together; None where a rate or a count is not known.

    flops, moved: of one device; exchanged: its collectives, see `collectives.of`; tokens: of all devices. Moved are the
    arguments and results once and what is live within the step twice, written and read: it could not be less. A type
    that a TPU has no units for runs on those of bfloat16.
    """
    if peaks is None or flops is None or exchanged is None or peaks.bandwidth is None:
        return None
    rate = peaks.flops.get(dtype, peaks.flops.get("bfloat16"))
    crossing = sum(each["bytes"] * (1 + (each["kind"] in AGAIN)) for each in exchanged)
    if rate is None or (crossing and peaks.links is None):
        return None
    seconds = {"compute_seconds": flops / rate, "memory_seconds": moved / peaks.bandwidth}
    seconds["exchange_seconds"] = crossing / peaks.links if crossing and peaks.links else 0.0
    least = max(seconds.values())
    return seconds | {"seconds": least, "tokens_per_second": tokens / least}
