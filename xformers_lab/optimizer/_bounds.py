"""What numbers options of optimizers may be."""

from xformers_lab.errors import Refused


def refuse_rates(**rates: float) -> None:
    """Raises Refused where a rate of an average is not from 0 to below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise Refused(f"{name} must be at least 0 and below 1, got {rate:g}")
