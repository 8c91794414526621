"""What jax can use, what it cannot, and the command that mends it: on machines that are made up."""

import os
import subprocess
import sys
import types

import jax
import pytest

from xformers_lab.doctor import accelerators, backends
from xformers_lab.doctor.accelerators import Nvidia

H100 = Nvidia(("NVIDIA H100 PCIe",) * 2, (580, 65, 6), 9.0)
V100 = Nvidia(("Tesla V100-SXM2-16GB",), (580, 65, 6), 7.0)


def idle(gpus=H100, installed=(), failed=None, environment=(), system="linux"):
    told = backends.idle_nvidia(gpus, dict(installed), failed, dict(environment), system)
    return told["found"], told["ok"]


@pytest.mark.parametrize(
    ("driver", "capability", "extra"),
    [
        ((580, 65), 9.0, "cuda13"),
        ((580, 65), 7.0, "cuda12"),  # Volta: CUDA 13 has left it
        ((550, 54), 9.0, "cuda12"),
        ((525, 60), 5.2, "cuda12"),
        ((470, 82), 8.0, None),
        ((580, 65), 3.7, None),
        (None, None, "cuda13"),
    ],
)
def test_the_extra_goes_by_driver_and_gpu(driver, capability, extra):
    assert backends.cuda_extra(Nvidia(("X",), driver, capability)) == extra


def test_a_gpu_without_the_wheel_gets_its_command():
    words, ok = idle()
    assert words == (
        "2 x NVIDIA H100 PCIe, driver 580.65.6, but this jax has no CUDA: pip install 'xformers_lab[cuda13]'"
    )
    assert ok is False


def test_a_wheel_for_another_cuda_is_named():
    words, ok = idle(V100, {"jax-cuda13-plugin": "0.10.2"})
    assert "pip uninstall jax-cuda13-plugin, then pip install 'xformers_lab[cuda12]'" in words and ok is False


def test_a_plugin_that_failed_says_why():
    words, ok = idle(installed={"jax-cuda13-plugin": "0.10.2"}, failed="no cuDNN found")
    assert "jax-cuda13-plugin 0.10.2 did not start: no cuDNN found" in words and ok is False


def test_an_old_driver_needs_a_newer_one():
    words, ok = idle(Nvidia(("Tesla K80",), (470, 82), 3.7))
    assert "jax needs driver 525 or newer and compute capability 5.2 or more" in words and ok is False


@pytest.mark.parametrize(
    ("gpus", "environment", "system", "mend"),
    [
        (H100, {"JAX_PLATFORMS": "cpu"}, "linux", "JAX_PLATFORMS=cpu keeps jax from it"),
        (H100, {"CUDA_VISIBLE_DEVICES": ""}, "linux", "CUDA_VISIBLE_DEVICES= hides it"),
        (H100, {}, "win32", "use WSL2"),
        (Nvidia(reachable=False), {}, "linux", "install one (580 or newer for [cuda13] or 525 or newer for [cuda12])"),
        (Nvidia(("X",), (580, 65), reachable=False), {}, "linux", "docker run --gpus all"),
    ],
)
def test_what_is_no_fault_of_the_installation(gpus, environment, system, mend):
    words, ok = idle(gpus, environment=environment, system=system)
    assert mend in words and ok is None


@pytest.mark.parametrize("platforms", ["cuda", "gpu", "cuda,cpu"])
def test_a_platform_that_is_asked_for_is_not_kept_away(platforms):
    assert idle(environment={"JAX_PLATFORMS": platforms}) == idle()


def test_tpus_and_amd():
    told = lambda *arguments: tuple(backends.idle_tpu("1 x TPU v5e", *arguments).values())[1:]
    assert told({}, None, {}) == ("1 x TPU v5e, but this jax has no TPU: pip install 'xformers_lab[tpu]'", False)
    assert "libtpu 0.0.42 did not start: busy" in told({"libtpu": "0.0.42"}, "busy", {})[0]
    assert told({}, None, {"JAX_PLATFORMS": "cpu"})[1] is None
    assert "jax[rocm7-local]" in backends.idle_amd({}, None)["found"]
    assert "did not start: jax says no reason" in backends.idle_amd({"jax-rocm7-plugin": "0.10.2"}, None)["found"]


def test_present_and_absent_are_named():
    told = backends.present({"cuda": ["NVIDIA H200"] * 8, "cpu": ["cpu"]})
    assert told["found"] == "cuda (8 x NVIDIA H200), cpu; not here: rocm, tpu"


def machine(monkeypatch, gpus=None, tpu=None, amd=False):
    for name, value in (("nvidia", gpus), ("tpu", tpu), ("amd", amd)):
        monkeypatch.setattr(accelerators, name, lambda value=value: value)


def test_a_machine_with_nothing_else(monkeypatch):
    machine(monkeypatch)
    cpu = {"cpu": [types.SimpleNamespace(device_kind="cpu")]}
    assert [finding["what"] for finding in backends.examine(cpu, {})] == ["backends", "accelerators"]
    machine(monkeypatch, H100, "1 x TPU v5e", True)
    assert [f["what"] for f in backends.examine(cpu, {})] == ["backends", "NVIDIA GPU", "TPU", "AMD GPU"]
    used = cpu | {"cuda": [types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")]}
    machine(monkeypatch, H100)
    assert [f["what"] for f in backends.examine(used, {})] == ["backends"]


BROKEN = """
import jax
import jax.extend.backend

def broken():
    raise RuntimeError("no such library")

jax.extend.backend.register_backend_factory("rocm", broken, priority=300, fail_quietly=False)
from xformers_lab.doctor import backends
devices, failed = backends.start()
print(*devices, jax.numpy.ones(2).sum(), failed["rocm"])
"""


def test_a_plugin_that_breaks_jax_leaves_the_cpu():
    """jax gives up over a plugin that fails, though nobody asked for it: the rest of the self-test goes on."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert " 2.0 Unable to initialize backend 'rocm': no such library" in done.stdout


def test_this_machine_has_a_cpu():
    here, failed = backends.start()
    assert jax.devices() in here.values() and "cpu" not in failed
