"""A self-test of a few seconds: what is there to compute on, how fast is it, and is it fit to measure anything?"""

import platform
import sys
import tempfile
from importlib import metadata

from xformers_lab import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def examine() -> list[dict]:
    """Findings as {what, found, ok}; a finding that is not ok says what to do. ok is None of what is no fault of the
    installation: other work on the machine, beside which nothing should be timed, or a device that a variable hides.
    Findings on rates have their numbers besides, as `measured`."""
    from xformers_lab.doctor import backends, kept_programs, memory, peaks, quiet, rates

    devices, failed = backends.start()
    ours = next(iter(devices.values()))
    device = ours[0]
    peak = peaks.this_processor() if device.platform == "cpu" else peaks.published(device.device_kind)
    versions = {
        "xformers_lab": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
        **backends.plugins(),
    }
    machine = [quiet.cores(), quiet.timer()]
    return [
        {"what": "python", "found": f"{platform.python_version()} at {sys.executable}", "ok": True},
        {"what": "packages", "found": ", ".join(f"{name} {each}" for name, each in versions.items()), "ok": True},
        *backends.examine(devices, failed),
        memory.examine(ours),
        kept_programs.examine(),
        *machine,
        *rates.examine(device, peak, all(finding["ok"] for finding in machine)),
        _repeats(),
    ]


def _repeats() -> dict:
    """The same tiny run twice must end in the same loss and metric, bit for bit."""
    from xformers_lab.config import Config, edit
    from xformers_lab.train import loop

    with tempfile.TemporaryDirectory() as folder:
        # Nothing but its steps and a score: most of its time on a new machine goes into compiling.
        tiny = edit(Config(), task="copy", seq_len=16, steps=6, batch=4, eval_batches=1, score="validation")
        tiny = edit(tiny, dim=16, layers=1, ffn="none")
        first = loop.run(edit(tiny, runs=f"{folder}/a"))
        second = loop.run(edit(tiny, runs=f"{folder}/b"))
    same = (first["loss"], first["metric"]) == (second["loss"], second["metric"])
    return {
        "what": "same seed, same result",
        "found": "bit for bit" if same else "NOT repeatable on this device",
        "ok": same,
    }
