"""What commands ask of XLA and of the C library on a CPU."""

import json
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from xformers_lab import cpu_speed, hardware

BLOCK = 64 << 20
# The second round of a block that the library keeps touches no new page.
FAULTS = f"""
import ctypes, json, resource
from xformers_lab import cpu_speed
kept = cpu_speed.keep_memory()
library = ctypes.CDLL(None)
library.malloc.restype = library.memset.restype = ctypes.c_void_p
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(ctypes.c_size_t({BLOCK}))
    library.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t({BLOCK}))
    library.free(ctypes.c_void_p(block))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, faults]))
"""


def run(program: str, **variables: str):
    """What a program prints, in an environment of these variables alone."""
    done = subprocess.run([sys.executable, "-c", program], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_that_is_given_back_is_kept():
    kept, faults = run(FAULTS)
    if not kept:
        pytest.skip("the C library is not glibc")
    pages = BLOCK // 4096
    assert faults[0] > pages / 600, faults  # at first there is none, however large a page is
    assert max(faults[1:]) < pages / 1000, faults


def test_a_users_own_variables_of_the_library_win():
    kept, faults = run(FAULTS, MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept and min(faults) > BLOCK / 4096 / 1000, faults


@pytest.mark.parametrize(
    "instructions, flags, becomes",
    [
        ("avx2 avx512f avx512_bf16", "", "--xla_cpu_prefer_vector_width=512"),
        ("avx512_bf16", "--xla_a=1", "--xla_a=1 --xla_cpu_prefer_vector_width=512"),
        ("avx512_bf16", "--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
        ("avx2 avx512f", "", None),
        ("", "--xla_a=1", "--xla_a=1"),
    ],
)
def test_xla_compiles_for_wide_vectors_where_they_pay(monkeypatch, instructions, flags, becomes):
    monkeypatch.setattr(hardware, "instructions", lambda: instructions)
    environment = {"XLA_FLAGS": flags} if flags else {}
    cpu_speed.wide_vectors(environment)
    assert environment.get("XLA_FLAGS") == becomes


def test_a_version_of_xla_that_was_not_tried_gets_no_flag(monkeypatch):
    monkeypatch.setattr(hardware, "instructions", lambda: "avx512_bf16")
    monkeypatch.setattr("jaxlib.version.__version__", "0.13.0")
    environment = {}
    cpu_speed.wide_vectors(environment)
    assert environment == {}


def test_the_newest_version_that_was_tried_is_the_newest_that_is_allowed():
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (jax,) = (pin for pin in pins if pin.startswith("jax>"))
    assert jax.endswith("<" + ".".join(map(str, cpu_speed.JAXLIB_BEFORE)))


def test_xla_knows_the_flag():
    asks = "import jax; print(jax.numpy.ones(2).sum())"
    assert run(asks, JAX_PLATFORMS="cpu", XLA_FLAGS=f"{cpu_speed.WIDE}=512") == 2
