"""Jobs of a SLURM cluster, by submitit: `--engine slurm:partition=gpu:minutes=120`, on a machine that has sbatch.

Jobs outlive the command: those of one that was killed go on, and the next one takes their results.
"""

import contextlib
import json
import pathlib
import secrets
import shutil
import time
from collections.abc import Mapping
from typing import Any, Literal

from xformers_lab.engines import Outcome, Setting, Told, _job
from xformers_lab.errors import RunFailed, UsageError

PACKAGE, EXTRA = "submitit", "slurm"
FOLDER = ".jobs"  # in the folder of runs: payloads, logs and answers
QUEUED = 64  # jobs that wait in SLURM's queue at once, where -j does not say
LOOK, ASK = 0.25, 30.0  # seconds between looks at answers, and between questions to SLURM, which it minds
LATE = 10.0  # seconds that an answer may take to be seen on a shared folder


class Engine:
    """Where jobs are timed, each has its node to itself (--exclusive).

    Options:
        partition: SLURM's partition.
        account: SLURM's account.
        constraint: what SLURM is told of the nodes to take, such as a kind of GPU: rows of different ones are not
            compared for speed.
        minutes: how long a cell may take; one that is ended goes on from its last checkpoint, up to three times.
        gpus: GPUs of a job.
        cpus: processors of a job.
        memory: gigabytes of a job.
        cluster: local runs jobs on this machine by submitit's own executor, one at a time where they are timed.
    """

    remote = True

    def __init__(
        self,
        setting: Setting,
        *,
        partition: str | None = None,
        account: str | None = None,
        constraint: str | None = None,
        minutes: int = 24 * 60,
        gpus: int | None = None,
        cpus: int | None = None,
        memory: int | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
    ):
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError("--engine slurm: no sbatch here; start it on a login node of the SLURM cluster")
        self.setting, self.cluster = setting, cluster
        self.parameters: dict[str, Any] = {"timeout_min": minutes, "name": "xlab"}
        self.parameters |= {"gpus_per_node": gpus} if gpus is not None else {}
        self.parameters |= {"cpus_per_task": cpus} if cpus is not None else {}
        self.parameters |= {"mem_gb": memory} if memory is not None else {}
        alone = True if setting.timed and cluster == "slurm" else None
        of_slurm = {"partition": partition, "account": account, "constraint": constraint, "exclusive": alone}
        self.parameters |= {f"slurm_{name}": value for name, value in of_slurm.items() if value is not None}
        self.where = "in SLURM's queue" if cluster == "slurm" else "here, as SLURM would run it"
        self.running: dict[str, tuple[Any, pathlib.Path]] = {}  # handle -> submitit's job, and where its answer will be
        self.asked, self.late = time.monotonic(), {}

    def room(self) -> int:
        alone = 1 if self.cluster == "local" and self.setting.timed else QUEUED
        return (self.setting.jobs or alone) - len(self.running)

    def submit(self, payload: Mapping[str, Any]) -> str:
        import submitit

        folder, handle = pathlib.Path(payload["runs"]) / FOLDER, secrets.token_hex(8)
        answer = folder / f"{handle}.json"
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
            executor.update_parameters(**self.parameters)
            job = executor.submit(_job.written, json.dumps(payload), str(answer))
        except Exception as error:  # sbatch refuses an account, a partition, ...
            lines = str(error).strip().splitlines()
            raise UsageError(f"--engine slurm: {lines[-1] if lines else type(error).__name__}") from None
        self.running[handle] = job, answer
        return handle

    def ended(self, seconds: float, told: Told) -> list[Outcome]:
        until = time.monotonic() + seconds
        while not (found := self._found()) and time.monotonic() < until:
            time.sleep(LOOK)
        return found

    def cancel(self, *, insisted: bool = False) -> None:
        for job, _ in self.running.values():
            with contextlib.suppress(Exception):  # it may have ended by now
                job.cancel(check=False)

    def close(self) -> None:
        if self.running:
            self.cancel()

    def _found(self) -> list[Outcome]:
        now = time.monotonic()
        ask = self.cluster == "local" or now - self.asked > ASK
        self.asked = now if ask else self.asked
        found = []
        for handle, (job, answer) in list(self.running.items()):
            outcome = self._outcome(handle, job, answer, ask)
            if outcome is not None:
                found.append(outcome)
                del self.running[handle]
        return found

    def _outcome(self, handle: str, job: Any, answer: pathlib.Path, ask: bool) -> Outcome | None:
        """What came of a job, by its own file: submitit's is a pickle, which is not read."""
        if answer.is_file():
            outcome = _job.outcome(handle, answer.read_text())
            for path in (answer, *answer.parent.glob(f"{job.job_id}_*")):
                path.unlink(missing_ok=True)
            return outcome
        try:
            over = job.done(force_check=True) if ask else job.paths.result_pickle.exists()
        except Exception as error:
            raise RunFailed(f"SLURM does not say how its jobs are ({type(error).__name__}: {error})") from None
        if not over or now_or(self.late, handle) < LATE:
            return None
        log = job.paths.stderr
        return Outcome(handle, lost=f"job {job.job_id} ended without an answer ({job.state}); {log} says more")


def now_or(late: dict[str, float], handle: str) -> float:
    """Seconds since a job was first seen to be over."""
    return time.monotonic() - late.setdefault(handle, time.monotonic())
