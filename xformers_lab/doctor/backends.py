"""Backends: what jax computes on here, what the machine has that it cannot use, and what to install for it."""

import functools
import importlib.metadata
import os
import sys
from collections.abc import Mapping

from xformers_lab.doctor import accelerators
from xformers_lab.doctor.accelerators import Nvidia
from xformers_lab.errors import said

# jax's names, the fastest first.
PLATFORMS = ("cuda", "rocm", "tpu", "cpu")
# What makes jax find a backend: packages of the extras and of jax's own.
PLUGINS = {
    "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "rocm": ("jax-rocm7-plugin",),
    "tpu": ("libtpu",),
}
# Extra -> the oldest driver and the least compute capability that its CUDA libraries take (jax's installation page).
CUDA = {"cuda13": (580, 7.5), "cuda12": (525, 5.2)}
# Variables that hide GPUs which are there, and their values that hide all of them.
HIDING = ("CUDA_VISIBLE_DEVICES", "JAX_CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
NOTHING = ("", "-1", "none", "void")


def start() -> tuple[dict[str, list], dict[str, str]]:
    """Start what jax has here; -> the devices of each platform, those that it computes on by default first, and why a
    platform failed that is installed.

    Where jax gives up over one that nobody asked for, the rest goes on with the CPU. RuntimeError where JAX_PLATFORMS
    asks for what is not here.
    """
    import jax

    failed = {}
    try:
        jax.devices()
    except Exception as error:
        if jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        failed = {platform: _first_line(error) for platform in PLATFORMS if f"'{platform}'" in str(error)}
        jax.config.update("jax_platforms", "cpu")
    devices = {}
    for platform in PLATFORMS:
        try:
            devices[platform] = jax.devices(platform)
        except Exception as error:  # an assertion or a RuntimeError, by the version
            if "failed to initialize" in str(error):
                failed.setdefault(platform, _first_line(error))
    default = jax.devices()
    named = next((platform for platform, several in devices.items() if default[0] in several), None)
    # Without a name it is a plugin for yet another kind of device.
    return {named or jax.default_backend(): default, **devices}, failed


def plugins() -> dict[str, str]:
    """The packages installed here that bring jax a backend, with their versions."""
    found = {}
    for name in (name for names in PLUGINS.values() for name in names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def examine(devices: Mapping[str, list], failed: Mapping[str, str]) -> list[dict]:
    """Findings on this machine's accelerators; devices, failed: as `start` gives them."""
    gpus, tpu, amd = accelerators.nvidia(), accelerators.tpu(), accelerators.amd()
    findings = [
        present({platform: [device.device_kind for device in several] for platform, several in devices.items()})
    ]
    installed = plugins()
    if gpus is not None and "cuda" not in devices:
        findings.append(idle_nvidia(gpus, installed, failed.get("cuda"), os.environ, sys.platform))
    if tpu is not None and "tpu" not in devices:
        findings.append(idle_tpu(tpu, installed, failed.get("tpu"), os.environ))
    if amd and "rocm" not in devices:
        findings.append(idle_amd(installed, failed.get("rocm")))
    if gpus is None and tpu is None and not amd and not set(devices) - {"cpu"}:
        findings.append({"what": "accelerators", "found": "no NVIDIA GPU, AMD GPU or TPU on this machine", "ok": True})
    return findings


def present(kinds: Mapping[str, list[str]]) -> dict:
    """Which platforms jax has, the one it computes on first, and which not; kinds: of the devices of each."""
    here = [
        f"{platform} ({len(each)} x {each[0]})" if platform != "cpu" or len(each) > 1 else "cpu"
        for platform, each in kinds.items()
        if each
    ]
    absent = [platform for platform in PLATFORMS if platform not in kinds]
    words = ", ".join(here) + (f"; not here: {', '.join(absent)}" if absent else "")
    return {"what": "backends", "found": words, "ok": True}


def idle_nvidia(
    gpus: Nvidia, installed: Mapping[str, str], failed: str | None, environment: Mapping[str, str], system: str
) -> dict:
    """The finding on NVIDIA GPUs that jax does not use: why, and the mend."""
    named = f"{len(gpus.names)} x {gpus.names[0]}" if gpus.names else "here"
    driver = ".".join(map(str, gpus.driver)) if gpus.driver else None
    told = named + (f", driver {driver}" if driver else "")
    finding = functools.partial(_idle, "NVIDIA GPU", told)
    if hidden := _kept_from("cuda", environment):
        return finding(hidden, None)
    if system == "win32":
        return finding("jax has no CUDA for Windows: use WSL2, and install xformers_lab[cuda13] there", None)
    if gpus.driver is None and not gpus.reachable:
        oldest = " or ".join(f"{version} or newer for [{extra}]" for extra, (version, _) in CUDA.items())
        return finding(f"no driver of NVIDIA's answers: install one ({oldest}), then run xlab doctor again", None)
    if not gpus.reachable:
        return finding("not for this process: start its container with the GPUs (docker run --gpus all)", None)
    extra = cuda_extra(gpus)
    if extra is None:
        least = CUDA["cuda12"]
        return finding(f"jax needs driver {least[0]} or newer and compute capability {least[1]} or more")
    package = f"jax-{extra}-plugin"
    if package in installed:
        return finding(_not_started(f"{package} {installed[package]}", extra, failed))
    others = [name for name in PLUGINS["cuda"] if name in installed]
    if others:  # of the other CUDA, for which this driver or GPU is no match
        return finding(f"{others[0]} does not fit it: pip uninstall {others[0]}, then {install(extra)}")
    return finding(f"this jax has no CUDA: {install(extra)}")


def idle_tpu(told: str, installed: Mapping[str, str], failed: str | None, environment: Mapping[str, str]) -> dict:
    """The finding on TPUs that jax does not use: why, and the mend."""
    finding = functools.partial(_idle, "TPU", told)
    if hidden := _kept_from("tpu", environment):
        return finding(hidden, None)
    if "libtpu" in installed:
        return finding(_not_started(f"libtpu {installed['libtpu']}", "tpu", failed))
    return finding(f"this jax has no TPU: {install('tpu')}")


def idle_amd(installed: Mapping[str, str], failed: str | None) -> dict:
    """The finding on AMD GPUs that jax does not use. No extra brings ROCm, and nothing here was tried on it."""
    plugin = PLUGINS["rocm"][0]
    if plugin in installed:
        words = f"{plugin} {installed[plugin]} did not start: {failed or 'jax says no reason'}"
    else:
        words = 'this jax has no ROCm: pip install "jax[rocm7-local]" (xformers_lab was not tested on it)'
    return _idle("AMD GPU", "here", words, None)


def cuda_extra(gpus: Nvidia) -> str | None:
    """The newest extra that the driver and the GPUs take; None where they take none."""
    driver = (gpus.driver or (0,))[0] or max(version for version, _ in CUDA.values())
    capability = gpus.capability or max(least for _, least in CUDA.values())
    fit = (extra for extra, (version, least) in CUDA.items() if driver >= version and capability >= least)
    return next(fit, None)


def install(extra: str) -> str:
    """The command that brings a backend."""
    return f"pip install 'xformers_lab[{extra}]'"


def _idle(what: str, told: str, words: str, ok: bool | None = False) -> dict:
    return {"what": what, "found": f"{told}, but {words}", "ok": ok}


def _not_started(package: str, extra: str, failed: str | None) -> str:
    return f"{package} did not start: {failed or 'jax says no reason'}; to install it anew: {install(extra)}"


def _kept_from(platform: str, environment: Mapping[str, str]) -> str | None:
    """Which variable keeps jax from a platform, in words."""
    asked = environment.get("JAX_PLATFORMS", "")
    names = {platform, "gpu"} if platform == "cuda" else {platform}
    if asked and not names & set(asked.split(",")):
        return f"JAX_PLATFORMS={asked} keeps jax from it: unset it to use it"
    hiding = [name for name in HIDING if environment.get(name) in NOTHING] if platform == "cuda" else []
    return f"{hiding[0]}={environment[hiding[0]]} hides it: unset it to use it" if hiding else None


def _first_line(error: BaseException) -> str:
    return (said(error).splitlines() or [type(error).__name__])[0]
