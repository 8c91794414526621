"""Threads for simulated devices."""

import json
import os
import subprocess
import sys

import pytest

from xformers_lab import cpu_threads

# More collectives that wait for nobody than the devices have threads without `cpu_threads`.
INDEPENDENT = """
import json, os
import xformers_lab
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

def collectives(x):
    y = [jnp.sin(x @ x.T + i) @ x for i in range(16)]
    sums = [jax.lax.psum(part, "devices").sum() for part in y[::2]]
    turns = [jax.lax.ppermute(part, "devices", [(j, (j + 1) % 8) for j in range(8)]).sum() for part in y[1::2]]
    return jnp.stack(sums + turns)

mesh = Mesh(jax.devices(), ("devices",))
spread = PartitionSpec("devices")
program = jax.jit(jax.shard_map(collectives, mesh=mesh, in_specs=spread, out_specs=spread))
x = jnp.ones((8 * 32, 32))
for _ in range(50):
    y = program(x)
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
print(json.dumps([y.shape, threads]))
"""


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({}, 1),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, 8),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_force_host_platform_device_count=2"}, 2),
        ({"JAX_NUM_CPU_DEVICES": "4"}, 4),
        ({"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true", "JAX_NUM_CPU_DEVICES": "-1"}, 1),
    ],
)
def test_the_devices_are_those_that_xla_makes(variables, devices):
    assert cpu_threads.simulated(variables) == devices


def test_who_has_said_how_many_threads_keeps_them():
    variables = {"PJRT_NPROC": "3"}
    cpu_threads.enough(8, variables)
    assert variables == {"PJRT_NPROC": "3"}
    alone = {}
    cpu_threads.enough(1, alone)
    assert not alone


def test_devices_that_wait_for_each_other_have_threads_to_spare():
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"} | eight
    ran = subprocess.run(
        [sys.executable, "-c", INDEPENDENT], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    shape, threads = json.loads(ran.stdout)
    assert shape == [8 * 16]
    assert threads is None or threads > 8 * cpu_threads.PER_DEVICE
