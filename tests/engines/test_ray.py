"""A real Ray cluster, a head and a second node on this machine: cells, kills, what cannot be reached, what is sent."""

import datetime
import itertools
import json
import os
import random
import signal
import socket
import time

import pytest
import sweeps

pytest.importorskip("ray", reason="needs the extra ray: make test-engines")

from ray_cluster import Cluster

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cluster():
    there = Cluster()
    try:
        there.start("second")
        yield there
    finally:
        there.close()


def on(cluster, *words):
    return [*words, "--engine", "ray", "--address", cluster.address]


def times(row):
    return [datetime.datetime.fromisoformat(row[key]) for key in ("started", "ended")]


def test_cells_are_those_of_one_machine_and_timed_ones_share_no_host(cluster, tmp_path):
    """Two nodes here are one host, so that its timed cells come one after the other."""
    words = ["attention=full,linear", "seed=0,1", "steps=20"]
    here = sweeps.rows(*words, f"runs={tmp_path}/here")
    there = sweeps.rows(*on(cluster, *words, f"runs={tmp_path}/there"), environment=cluster.environment)
    assert sweeps.parameters(tmp_path / "here") == sweeps.parameters(tmp_path / "there")
    for one, other in zip(here, there, strict=True):
        same = ("id", "status", "metric", "loss", "parameters", "flops", "attention", "seed", "device", "host")
        assert [one[key] for key in same] == [other[key] for key in same]
        assert other["host"] == socket.gethostname() and other["tokens_per_second"] > 0 and "untimed" not in other
    spans = sorted(map(times, there))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_killed_workers_lose_no_cell(cluster, tmp_path):
    """Ten times the process that Ray runs a cell in; its own child saves itself and lets go of the run."""
    running = sweeps.start(
        *on(cluster, "seed=0..7", "steps=400", "save_every=50", "-j", 2, f"runs={tmp_path}", "--json"),
        environment=cluster.environment,
    )
    draw, killed = random.Random(0), 0
    while running.poll() is None and killed < 10:
        time.sleep(draw.uniform(2.0, 5.0))
        pids = [pid for node in cluster.nodes for pid in cluster.processes(node, "ray::perform")]
        if pids:
            os.kill(draw.choice(pids), signal.SIGKILL)
            killed += 1
    out, err = running.communicate(timeout=900)
    rows = json.loads(out)
    assert killed == 10 and "it is tried again" in err and "Traceback" not in err
    for row in rows:
        assert row["status"] == "ok" or "lost 4 times" in row["reason"], row
    assert sum(row["status"] == "ok" for row in rows) >= 6
    assert running.returncode == (0 if all(row["status"] == "ok" for row in rows) else 5)


def test_a_killed_node_loses_no_cell(cluster, tmp_path):
    running = sweeps.start(
        *on(cluster, "seed=0..5", "steps=400", "save_every=50", "-j", 3, f"runs={tmp_path}", "--json"),
        environment=cluster.environment,
    )
    for kill in range(2):
        sweeps.until(lambda: cluster.processes("second", "ray::perform") or running.poll() is not None)
        time.sleep(2.0)
        assert cluster.kill("second", "raylet/raylet"), "there is no node to kill"
        time.sleep(2.0)
        while cluster.kill("second"):
            time.sleep(0.2)
        cluster.start("second")
        assert running.poll() is None, kill
    assert [row["status"] for row in sweeps.finished(running)] == ["ok"] * 6
    sweeps.once(tmp_path, 6)


def test_a_killed_command_is_gone_on_with(cluster, tmp_path):
    words = on(cluster, "seed=0..3", "steps=300", "save_every=50", "-j", 2, f"runs={tmp_path}")
    running = sweeps.start(*words, environment=cluster.environment)
    sweeps.until(lambda: sweeps.results(tmp_path))
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    before = sweeps.results(tmp_path)
    assert before
    rows = sweeps.rows(*words, environment=cluster.environment)
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert sweeps.results(tmp_path).items() >= before.items()
    sweeps.once(tmp_path, 4)


def test_an_interrupt_saves_what_runs(cluster, tmp_path):
    words = on(cluster, "seed=0..3", "steps=100000", "-j", 2, f"runs={tmp_path}", "--json")
    running = sweeps.start(*words, environment=cluster.environment)
    sweeps.until(lambda: sum(1 for path in tmp_path.glob("copy/*/metrics.jsonl") if path.read_text()) == 2)
    running.send_signal(signal.SIGINT)
    rows = sweeps.finished(running, 130)
    assert [row["status"] for row in rows] == ["interrupted"] * 4
    assert sum("saved at step" in row["reason"] for row in rows) == 2, [row["reason"] for row in rows]
    assert len(list(tmp_path.glob("copy/*/checkpoints/*/MANIFEST.json"))) == 2


def test_a_cluster_wants_its_token(cluster, tmp_path):
    wrong = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 32}
    running = sweeps.start(*on(cluster, "seed=0,1", "steps=2", f"runs={tmp_path}"), environment=wrong)
    began = time.monotonic()
    _, err = running.communicate(timeout=120)
    assert running.returncode == 2 and "Traceback" not in err and time.monotonic() - began < 100
    assert "has RAY_AUTH_TOKEN its token?" in err.splitlines()[-1] and not list(tmp_path.glob("copy/*"))


def test_nothing_that_is_no_cluster_is_waited_for_long(tmp_path):
    """Something listens, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        running = sweeps.start("seed=0,1", "steps=2", f"runs={tmp_path}", "--engine", "ray", "--address", address)
        began = time.monotonic()
        _, err = running.communicate(timeout=150)
    assert running.returncode == 2 and time.monotonic() - began < 100, err
    assert f"--address {address}: no connection to a Ray cluster there" in err.splitlines()[-1]
    assert not list(tmp_path.glob("copy/*"))
