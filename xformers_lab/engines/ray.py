"""The hosts of a Ray cluster that runs, by Ray Core: `--engine ray --address HOST:PORT`.

It starts no cluster and stops none, so nothing listens that did not before but the process that submits jobs, on the
address that the cluster knows this machine by. A cluster with RAY_AUTH_MODE=token wants the token here too, in
RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, where Ray reads it.
"""

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from xformers_lab.engines import Outcome, Setting, Told, _job
from xformers_lab.errors import LabError, RunFailed, UsageError
from xformers_lab.supervise.interrupt import handling
from xformers_lab.supervise.process import Ended, Worker

PACKAGE, EXTRA = "ray", "ray"
REACHED, CONNECTED = 10.0, 60.0  # seconds to answer at all, and for a connection to stand
ANSWER = 120.0  # seconds for the cluster to say anything, before it counts as gone
ALONE = 120.0  # seconds without a node, before it counts as gone
SIDE_BY_SIDE = {"CPU": 1.0, "GPU": 1.0}  # what one job of several on a host takes


class Engine:
    """Where jobs are timed, a job takes all processors and accelerators of a node, and no two are on one host, which
    may be several nodes.

    Options:
        address: HOST:PORT of the cluster's head; this machine is one of its nodes.
    """

    remote = True

    def __init__(self, setting: Setting, *, address: str | None = None):
        if address is None:
            raise UsageError(
                "--engine ray wants --address HOST:PORT of a Ray cluster that runs (RAY_AUTH_MODE=token ray start "
                "--head on one of its machines says it); for this machine alone --engine local -j N does"
            )
        self.setting, self.address = setting, address
        self.count, self.running, self.over = 0, {}, []  # handle -> host
        _refuse_unreachable(address)
        self.side = Worker(shown=False, hears=False)
        try:
            with handling(self.side.stop):
                self._heard(self.side.ask("engines._ray_side.connect", limit=CONNECTED, address=address))
        except LabError as error:
            self.side.__exit__(type(error))
            if self.side.stopped:
                raise
            raise UsageError(
                f"--address {address}: no connection to a Ray cluster there ({error}); is it its head, is this machine "
                "a node of it, with the same Ray, and has RAY_AUTH_TOKEN its token?"
            ) from None
        hosts = len({node["host"] for node in self.nodes})
        self.where = f"on {hosts} host{'s' * (hosts != 1)} of the Ray cluster at {address}"

    def room(self) -> int:
        limit = self.setting.jobs
        if self.setting.timed:
            return min(len(self._free()), (limit or len(self.nodes)) - len(self.running))
        assert limit is not None
        return limit - len(self.running) if self.nodes else 0

    def submit(self, payload: Mapping[str, Any]) -> str:
        self.count += 1
        handle = str(self.count)
        if self.setting.timed:
            host, node = next(iter(self._free().items()))
            taken = {"node": node["id"], "resources": {"CPU": node["CPU"], "GPU": node["GPU"]}}
        else:
            gpu = SIDE_BY_SIDE["GPU"] if any(node["GPU"] for node in self.nodes) else 0.0
            host, taken = "", {"node": None, "resources": {**SIDE_BY_SIDE, "GPU": gpu}}
        self._ask("submit", handle=handle, payload=json.dumps(payload), **taken)
        self.running[handle] = host
        return handle

    def ended(self, seconds: float, told: Told) -> list[Outcome]:
        self._heard(self._ask("wait", seconds=seconds))
        if not self.running:
            if time.monotonic() - self.seen > ALONE:
                raise RunFailed(f"the Ray cluster at {self.address} has had no node for {ALONE:.0f} s")
            if not self.nodes:
                time.sleep(seconds)
        over, self.over = self.over, []
        return over

    def cancel(self, *, insisted: bool = False) -> None:
        self._ask("cancel", insisted=insisted)

    def close(self) -> None:
        if self.running:  # which end with it, as Ray has it
            self.side.stop(0, insisted=True)
        self.side.__exit__(None)

    def _free(self) -> dict[str, dict[str, Any]]:
        """A node of every host that no job of this command is on."""
        return {node["host"]: node for node in self.nodes if node["host"] not in self.running.values()}

    def _ask(self, what: str, **arguments: Any) -> Any:
        """The answer of the process that talks to Ray; raises RunFailed where there is none."""
        try:
            return self.side.ask(f"engines._ray_side.{what}", limit=ANSWER, **arguments)
        except Ended as ended:
            raise RunFailed(f"the Ray cluster at {self.address} is gone: {ended.reason}") from None

    def _heard(self, state: Mapping[str, Any]) -> None:
        self.nodes = state["nodes"]
        if self.nodes:
            self.seen = time.monotonic()
        for one in state["ended"]:
            host = self.running.pop(one["handle"])
            if "lost" in one:
                self.over.append(Outcome(one["handle"], lost=one["lost"], host=host))
            else:
                self.over.append(_job.outcome(one["handle"], one["answer"]))


def _refuse_unreachable(address: str) -> None:
    """Raises UsageError where nothing answers at an address: Ray itself takes its time to say so."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"--address {address}: want HOST:PORT of the cluster's head, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--address {address}: nothing answers there ({reason}); is the cluster up (ray start --head says its "
            "address), and the port open?"
        ) from None
