"""The platform that a program is traced for, which is not always the one that this process runs on."""

import contextlib
from collections.abc import Iterator

import jax

# Of JAX's own, so that whatever it remembers of a traced function is of one platform.
_PLANNED = jax.make_user_context(None)


def platform() -> str:
    """That of this process, "cpu", "gpu" or "tpu", or within `planned_for` the one that is planned for."""
    return _PLANNED.value or jax.default_backend()


def elsewhere() -> bool:
    """Whether what is traced is only planned: what is here, memory or a kernel's library, says nothing of it."""
    return _PLANNED.value is not None


def nvidia() -> bool:
    """Whether programs are traced for an NVIDIA GPU that is here."""
    if elsewhere():
        return False
    device = jax.devices()[0]
    return device.platform == "gpu" and "nvidia" in device.device_kind.lower()


def capability() -> float | None:
    """The compute capability of the NVIDIA GPU that programs are traced for; None where none is here."""
    return float(jax.devices()[0].compute_capability) if nvidia() else None


@contextlib.contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Meanwhile programs are traced for a platform that need not be here; nothing may run."""
    with _PLANNED(name):
        yield
