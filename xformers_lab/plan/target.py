"""What a plan is for: the words `topology=v5e:4x4` and `platform=cpu:8`, which are no part of any config. Needs no jax.

A TPU is named as libtpu names it, its generation and the sizes of its grid of chips. A CPU stands for as many devices
as are asked for. A GPU is not compiled for: only what its program is given and computes is told.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Literal

from xformers_lab import layouts, spec
from xformers_lab.doctor import peaks
from xformers_lab.errors import UsageError, nearest

Platform = Literal["tpu", "cpu", "gpu"]
PLATFORMS: tuple[Platform, ...] = ("tpu", "cpu", "gpu")
KEYS = ("topology", "platform")
EXAMPLE = "topology=v5e:2x2, platform=cpu:8, or platform=gpu:8"
LARGEST = 2**16  # chips; nobody has built more in one grid


@dataclasses.dataclass(frozen=True)
class Target:
    """name: "v5e:4x4", "cpu:8" or "cpu"; count: how many devices, None where the layout says; kind: what jax calls a
    device of it, None where that is not known."""

    platform: Platform
    name: str
    count: int | None = None
    kind: str | None = None

    def devices(self, layout: str) -> int:
        """How many devices a config of this layout has."""
        return layouts.devices_of(layout, 1) if self.count is None else self.count

    @property
    def peaks(self) -> peaks.Peaks | None:
        """What a device of it could do at most, where its maker says so."""
        return None if self.kind is None else peaks.published(self.kind)


def targets(topologies: Sequence[str], platforms: Sequence[str]) -> list[Target]:
    """What the values of the two words name; raises UsageError with the mend, also where libtpu is not installed."""
    if platforms in (["tpu"], ["TPU"]) and topologies:
        platforms = []
    if topologies and platforms:
        raise UsageError(
            f"topology={topologies[0]} names a TPU, and platform={platforms[0]} stands beside it: leave one out"
        )
    found = [*map(_topology, topologies), *map(_platform, platforms)]
    if not found:
        raise UsageError(f"plan for what? {EXAMPLE}")
    if topologies and importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"topology={topologies[0]}: the TPU's compiler, libtpu, is not installed: pip install 'xformers_lab[plan]'"
        )
    return list(dict.fromkeys(found))


def _topology(text: str) -> Target:
    name, colon, grid = text.partition(":")
    known, where = peaks.generations(), f"topology={text}"
    if name not in known:
        raise UsageError(f'{where}: no TPU "{name}": {nearest(name, known, "TPUs")}')
    if not colon or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", grid):
        raise UsageError(f"{where}: say how many chips stand along each side of the grid: topology={name}:2x2")
    chips = math.prod(map(int, grid.split("x")))
    if chips > LARGEST:
        raise UsageError(f"{where}: {chips:,} chips; at most {LARGEST:,}")
    return Target("tpu", text, chips * known[name].per_chip, known[name].kind)


def _platform(text: str) -> Target:
    name, colon, count = text.partition(":")
    where = f"platform={text}"
    if name not in PLATFORMS:
        raise UsageError(f'{where}: no platform "{name}": {nearest(name, PLATFORMS, "platforms")}')
    if name == "tpu":
        raise UsageError(f"{where}: say which one: topology=v5e:2x2 ({', '.join(peaks.generations())})")
    if not colon:
        return Target(name, name)
    devices = spec.coerce(count, int, where)
    if not 0 < devices <= LARGEST:
        raise UsageError(f"{where}: 1 to {LARGEST:,} devices")
    return Target(name, text, devices)
