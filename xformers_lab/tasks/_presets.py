"""Options as a publication has them: what `preset=` sets, and what may stand beside it."""

from collections.abc import Mapping
from typing import Any, Literal

# Long Range Arena (Tay et al., 2020, arXiv 2011.04006).
Preset = Literal["lra"]


def published(preset: Preset, options: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The published value of each option, of which the pair is (as given, None where it is not; as published).

    Raises ValueError where an option was given another value.
    """
    for name, (given, wanted) in options.items():
        if given is not None and given != wanted:
            raise ValueError(f"{name}={given} beside preset={preset}, which has {name}={wanted}: leave one of them out")
    return {name: wanted for name, (_, wanted) in options.items()}


def check_length(preset: Preset, seq_len: int, least: int) -> None:
    """Raises ValueError where what was published does not fit into a sequence; where it leaves room, it is padded."""
    if seq_len < least:
        padded = 2 ** (least - 1).bit_length()
        raise ValueError(
            f"preset={preset} needs seq_len={least} or more, such as seq_len={padded}, which is padded; got "
            f"seq_len={seq_len}"
        )
