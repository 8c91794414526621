"""Several processes train one run: what they compute, how they end when one of them does, who writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
from test_resume import STRIKE, arrays
from test_train import TASK, losses_of, tiny
from test_train_devices import COUNTING

from xformers_lab import config as configs
from xformers_lab.cli import main
from xformers_lab.config import Config, Place
from xformers_lab.cpu_threads import enough
from xformers_lab.errors import RunFailed, UsageError
from xformers_lab.train import checkpoint, hosts, loop, records, trained

SECONDS = 900  # in which any of these processes ends, on a busy machine too


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return taken.getsockname()[1]


def flags(devices: int) -> str:
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def begun(
    words: list[str],
    count: int = 2,
    devices: int = 2,
    strikes: tuple = (),
    launched: bool = False,
    only: Mapping[int, list[str]] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """`xlab WORDS` in so many processes that are one run, or in one by itself, each with so many devices; a strike is a
    signal that the process of that number sends itself, see STRIKE. launched: they are told by what SLURM sets; only:
    more words of the process of that number."""
    port, processes = free_port(), []
    for process in range(count):
        place = [f"coordinator=127.0.0.1:{port}", f"processes={count}", f"process={process}"]
        strike = dict(strikes).get(process, "")
        environment = os.environ | {"XLA_FLAGS": flags(devices), "STRIKE": strike}
        if count == 1 or launched:
            place = []
        if launched:
            step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": f"{count}", "SLURM_PROCID": f"{process}"}
            environment |= SLURM | step | {"SLURM_LOCALID": f"{process}", "JAX_COORDINATOR_PORT": f"{port}"}
        command = [sys.executable, "-m", "xformers_lab", *words, *place, *only.get(process, [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """The exit code of each process, what it printed, and what it said."""
    try:
        texts = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def spelled(config: Config) -> list[str]:
    keys = [key for key in configs.KEYS if configs.get(config, key) is not None]
    return [f"{key}={configs.spec.show(configs.get(config, key))}" for key in keys]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict:
    """A run with everything that could be lost, or be another thing in another process."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "uneven.py").write_text(TASK.replace("        rng = np", STRIKE + "        rng = np"))
    (folder / "counting.py").write_text(COUNTING)
    chosen = {"task": str(folder / "uneven.py"), "attention": str(folder / "counting.py"), "dropout": 0.1}
    return chosen | {"steps": 8, "save_every": 3, "eval_every": 4, "select": "best", "ema": 0.9, "layout": "fsdp"}


# ---- bad input, before jax starts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (["processes=2"], "coordinator= and process= missing"),
        (["process=1"], "coordinator= and processes= missing"),
        (["coordinator=node1:1234", "processes=2"], "process= missing"),
        (["coordinator=node1", "processes=2", "process=0"], "say HOST:PORT, such as node1:29500"),
        (["coordinator=node1:99999", "processes=2", "process=0"], "say HOST:PORT"),
        (["coordinator=node1:1234", "processes=2", "process=2"], "the last of processes=2 is process=1"),
        (["coordinator=node1:1234", "processes=2", "process=-1"], "at least 0"),
        (["coordinator=node1:1234", "processes=0", "process=0"], "at least 1"),
        (["coordinator=auto", "processes=2"], "leave them out"),
        (["coordinator="], "has no value"),
        (["proceses=2"], 'did you mean "processes"'),
    ],
)
@pytest.mark.parametrize("command", ["train", "resume", "eval"])
def test_words_that_name_no_place_are_refused(command, place, said, tmp_path, capsys):
    config = tiny("copy", tmp_path, name="run")
    configs.folder(config).mkdir(parents=True)
    records.write_json(configs.folder(config) / "config.json", configs.to_dict(config))
    what = spelled(config) if command == "train" else [str(configs.folder(config))]
    assert main([command, *what, *place]) == 2
    err = capsys.readouterr().err
    if command == "train" or "proceses" not in place[0]:  # resume and eval know few words at all
        assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["compare", "bench", "show", "signals"])
def test_other_commands_take_no_place(command, capsys):
    assert main([command, "processes=2"]) == 2
    err = capsys.readouterr().err
    assert "processes" in err and len(err.splitlines()) == 1


def test_a_place_is_no_part_of_a_run():
    words = ["task=copy", "coordinator=node1:1234", "processes=2", "process=1", "wait=5", "steps=3"]
    place, rest = configs.placed(words)
    assert place == Place("node1:1234", 2, 1, 5.0) and rest == ["task=copy", "steps=3"]
    keys = {"task": "copy", "processes": 2, "steps": 3}
    assert configs.placed([keys]) == (Place(processes=2), [{"task": "copy", "steps": 3}])
    assert not configs.PLACE.keys() & {*configs.KEYS, *configs.STUDY, *configs.DERIVED}


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a batch script, no step of it
        (MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
    ],
)
def test_a_launcher_is_heard(environment, joins):
    assert hosts.meant(Place(wait=9.0), environment) == Place(hosts.AUTO if joins else None, wait=9.0)
    assert hosts.meant(Place(processes=1), environment) == Place()  # each by itself
    here = Place("node1:1234", 2, 0)
    assert hosts.meant(here, environment) == here


def test_who_does_not_answer_is_not_waited_for_long():
    began = time.monotonic()
    with pytest.raises(UsageError, match="did not meet within 1 s; start all of them"):
        hosts.join(Place(f"127.0.0.1:{free_port()}", 2, 1, wait=1.0))
    assert time.monotonic() - began < 20
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"coordinator={at}: Address already in use"):
            hosts.join(Place(at, 2, 0))


def test_processes_share_the_threads_of_a_host():
    environment: dict = {}
    enough(1, environment)
    assert environment == {}
    enough(1, environment, processes=2)
    assert int(environment["PJRT_NPROC"]) >= 8


def test_errors_of_one_are_those_of_all(monkeypatch):
    """Two processes, of which the other one's words are given."""
    monkeypatch.setattr(hosts, "_here", hosts._Here(0, ("here", "there")))
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, ("UsageError", 2, "no such file")])
    with pytest.raises(UsageError, match="process 1 on there: no such file"):
        hosts.agreed(lambda: 5)
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, ("KeyError", 0, "'x'")])
    with pytest.raises(RunFailed, match="process 1 on there: KeyError: 'x'"):
        hosts.agreed(lambda: 5)
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, ("Damaged", 0, "a byte")])
    with pytest.raises(checkpoint.Damaged, match=r"^a byte$"):
        hosts.agreed(lambda: 5, checkpoint.Damaged)
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, None])
    assert hosts.agreed(lambda: 5) == hosts.of_first(lambda: 5) == 5
    of_both = iter([[None, None], ["from the first", None]])
    monkeypatch.setattr(hosts, "_here", hosts._Here(1, ("here", "there")))
    monkeypatch.setattr(hosts, "gathered", lambda value: next(of_both))
    assert hosts.of_first(lambda: pytest.fail("this is not the first")) == "from the first"


# ---- several processes -----------------------------------------------------------------------------------------------


# Joins once, and trains what it is told, each config in turn; what is refused is said.
PROGRAM = """
import json, sys
import jax
from xformers_lab.config import Config, Place, edit
from xformers_lab.errors import LabError
from xformers_lab.train import hosts, loop

place, cases = json.loads(sys.argv[1])
rows = []
with hosts.joined(Place(**place)):
    for case in cases:
        changes = case | case.pop("only", {}).get(str(hosts.process()), {})
        try:
            record = loop.run(edit(Config(), **changes))
            kept = ("status", "id", "loss", "metric", "curve", "devices", "processes", "hosts", "by_length")
            rows.append({key: record.get(key) for key in kept} | {"figures": record["token_seconds"]})
        except LabError as error:
            rows.append({"refused": str(error)})
    print(json.dumps(rows), flush=True)
"""


def run_all(cases: list[dict], count: int, devices: int) -> list[list[dict]]:
    """What PROGRAM prints in each of so many processes."""
    at, processes = f"127.0.0.1:{free_port()}", []
    for process in range(count):
        place = {"coordinator": at, "processes": count, "process": process} if count > 1 else {}
        command = [sys.executable, "-c", PROGRAM, json.dumps([place, cases])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags(devices)}, **pipes))
    answers = ended(processes)
    assert [code for code, _, _ in answers] == [0] * count, answers[-1][2][-3000:]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in answers]


@pytest.mark.full
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_are_one_with_all_their_devices(count, devices, tmp_path, words):
    plain = {"seq_len": 16, "dim": 16, "layers": 1, "batch": 8, "steps": 5, "eval_batches": 1, "dropout": 0.1}
    (tmp_path / "text.txt").write_text(" ".join(str(number * 7919 % 1009) for number in range(4000)))
    text, remembers = {"task": f"lm:path={tmp_path}/text.txt"}, {"memory": "xl:length=8", "position": "rope"}
    cases = [
        plain | {"task": words["task"], "layout": "data", "accumulate": 2, "test_len": "32", "position": "rope"},
        plain | text | remembers | {"layout": "fsdp"},
        plain | {"task": words["task"], "layout": "tensor:2+data"},
    ]
    cases = cases if count == 2 else cases[:1]  # four compile long on two cores
    placed = lambda name: [case | {"runs": str(tmp_path / name)} for case in cases]
    refused = [
        plain | {"task": "copy", "layout": "data:8", "runs": str(tmp_path / "refused")},
        plain | {"task": "copy", "layout": "pmap", "runs": str(tmp_path / "refused")},
        plain | {"task": "copy", "only": {"1": {"lr": 0.5}}, "runs": str(tmp_path / "refused")},
        plain | {"task": "copy", "only": {"1": {"runs": str(tmp_path / "apart")}}, "runs": str(tmp_path / "refused")},
    ]
    alone = run_all(placed("alone"), 1, 4)[0]
    first, *others = run_all(placed("both") + refused, count, devices)
    for one, row in zip(alone, first, strict=False):
        assert (row["id"], row["status"], row["devices"]) == (one["id"], "ok", 4)
        assert (one["processes"], one["hosts"], row["processes"], row["hosts"]) == (1, 1, count, 1)
        np.testing.assert_allclose(losses_of(row), losses_of(one), rtol=3e-6)
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5) and row["figures"] > 0
        if one["by_length"]:
            assert row["by_length"][0]["loss"] == pytest.approx(one["by_length"][0]["loss"], rel=1e-5)
    for other in others:
        for row, mirrored in zip(first[: len(alone)], other, strict=False):
            assert (row["id"], row["loss"]) == (mirrored["id"], mirrored["loss"])
    for rows in (first, *others):
        said = [row["refused"] for row in rows[len(alone) :]]
        assert "8 devices, and there are 4" in said[0]
        assert "layout=pmap is of the devices of one process" in said[1]
        assert "was given lr=0.5" in said[2] or "was given lr=0.003" in said[2]
        assert "not the folder that process 0 has" in said[3]


@pytest.mark.full
def test_processes_score_together(tmp_path):
    """Two give what one gives, and the first alone prints it; what differs between them is refused in both."""
    config = tiny("copy", tmp_path, layout="fsdp", position="rope", attention="local:window=4")
    loop.run(config)
    folder, words = configs.folder(config), ["seq_len=16,8", "attention.window=2", "--json"]
    (code, out, _), (other, silent, _) = ended(begun(["eval", str(folder), *words]))
    assert (code, other, silent) == (0, 0, "")
    alone = trained.evaluate_at(folder, [16, 8], {"attention.window": [2]})
    for one, row in zip(alone, json.loads(out), strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5) and row["metric"] == pytest.approx(one["metric"])
        assert {key: row[key] for key in ("id", "seq_len", "changed")} == {
            key: one[key] for key in ("id", "seq_len", "changed")
        }
    refused = ended(begun(["eval", str(folder)], only={1: ["--split", "validation"]}))
    assert [code for code, _, _ in refused] == [2, 2]
    for _, _, said in refused:
        assert "--split=validation" in said and "processes of one run take the same words" in said


@pytest.mark.full
def test_killed_and_resumed(words, tmp_path):
    """One of two is killed: both end, and the two that go on end in the very bits of the two that nothing disturbed."""
    whole, config = (tiny(**words, runs=tmp_path / name) for name in ("whole", "killed"))
    folder = configs.folder(config)
    assert [code for code, _, _ in ended(begun(["train", *spelled(whole)]))] == [0, 0]
    (lost, _, survived), (killed, out, said) = ended(
        begun(["train", *spelled(config)], strikes=((1, f"{int(signal.SIGKILL)} train 6"),))
    )
    assert (lost, killed) == (3, 3) and out == ""
    assert "killed (signal 9) while training" in said and "another process of the run ended" in survived
    for text in (survived, said):
        assert f"go on with xlab resume {folder}" in text and "Traceback" not in text and "stack trace" not in text
    assert checkpoint.steps(folder) == [3]
    (code, out, _), (other, silent, _) = ended(begun(["resume", str(folder), "--json"]))
    assert (code, other, silent) == (0, 0, "")
    record, expected = json.loads(out), records.read_json(configs.folder(whole) / "result.json")
    assert expected is not None
    for key in ("id", "status", "loss", "metric", "validation", "steps", "processes"):
        assert record[key] == expected[key], key
    assert losses_of(record) == losses_of(expected)
    assert [line["step"] for line in records.read(folder)] == list(range(1, 9))
    assert not (folder / "owner.json").exists()
    saved, intact = arrays(config), arrays(whole)
    assert [name for name in saved if saved[name] != intact[name]] == []


@pytest.mark.full
def test_the_first_is_killed_and_a_locked_folder_is_refused(words, tmp_path):
    config = tiny(**words, runs=tmp_path)
    folder = configs.folder(config)
    answers = ended(begun(["train", *spelled(config)], strikes=((0, f"{int(signal.SIGKILL)} train 6"),)))
    assert [code for code, _, _ in answers] == [3, 3]
    assert "another process of the run ended" in answers[1][2] and "stack trace" not in answers[1][2]
    with records.locked(folder):
        answers = ended(begun(["resume", str(folder)]))
    assert [code for code, _, _ in answers] == [2, 2]
    for _, _, said in answers:
        assert f"process {os.getpid()} on" in said and "is running this" in said


@pytest.mark.full
def test_a_signal_to_one_stops_all_and_any_number_of_devices_goes_on(words, tmp_path):
    """From one device to two processes, to eight devices, and back to one."""
    whole, config = (tiny(**words, runs=tmp_path / name) for name in ("whole", "moved"))
    expected, folder = loop.run(whole), configs.folder(config)
    seen = []
    with pytest.raises(loop.Interrupted):
        loop.run(config, progress=lambda step, total, metrics: seen.append(step), stop=lambda: len(seen) >= 1)
    assert checkpoint.steps(folder)[-1] == 2
    strikes = ((1, f"{int(signal.SIGTERM)} train 3"),)
    struck = ended(begun(["resume", str(folder), "name=moved"], strikes=strikes, launched=True))
    assert [code for code, _, _ in struck] == [143, 143]
    at = {re.search(r"saved at step (\d+) of 8", said)[1] for _, _, said in struck}  # pyright: ignore
    assert len(at) == 1 and 3 <= int(*at) <= 7 and str(checkpoint.steps(folder)[-1]) in at
    one = ended(begun(["resume", str(folder)], count=1, devices=8, strikes=((0, f"{int(signal.SIGTERM)} train 7"),)))
    assert one[0][0] in (0, 143), one[0][2]
    record = loop.resume(folder)
    assert record["config"]["name"] == "moved"
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    np.testing.assert_allclose(losses_of(record), losses_of(expected), rtol=1e-5)
    assert [line["step"] for line in records.read(folder)] == list(range(1, 9))


@pytest.mark.full
def test_one_that_waits_for_others_says_so(words, tmp_path):
    began = time.monotonic()
    config = tiny(**words, runs=tmp_path)
    place = [f"coordinator=127.0.0.1:{free_port()}", "processes=2", "process=0", "wait=5"]
    (answer,) = ended(begun(["train", *spelled(config), *place], count=1))
    assert answer[0] == 3 and "the processes did not meet within 5 s" in answer[2]
    assert "stack trace" not in answer[2] and time.monotonic() - began < 90


@pytest.mark.full
def test_one_that_hangs_is_given_up(words, tmp_path):
    config = tiny(**words, runs=tmp_path, stall=60)
    answers = ended(begun(["train", *spelled(config), "wait=10"], strikes=((1, f"{int(signal.SIGSTOP)} train 6"),)))
    assert [code for code, _, _ in answers] == [3, 3]
    assert "another process of the run ended, or fell silent, while training" in answers[0][2]
    assert "no step for 60 s" in answers[1][2]
    assert not any("stack trace" in said or "Traceback" in said for _, _, said in answers)
