"""Here: one job at a time in the command's own worker, or with -j N so many side by side, each worker a process."""

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from xformers_lab.engines import Outcome, Setting, Told
from xformers_lab.supervise.process import Ended, Worker

# Several processes on one accelerator would each take most of its memory at once.
SIDE_BY_SIDE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Engine:
    """Jobs of one worker share what it compiled, so that a worker is kept for the next job."""

    where, remote = "", False

    def __init__(self, setting: Setting):
        self.setting, self.count = setting, 0
        self.waiting: list[tuple[str, Mapping[str, Any]]] = []  # what this thread does when it is asked for outcomes
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []
        self.busy: dict[str, Worker] = {}
        self.said: queue.SimpleQueue[tuple[str, dict] | Outcome] = queue.SimpleQueue()  # by threads

    def room(self) -> int:
        return (self.setting.jobs or 1) - len(self.waiting) - len(self.busy)

    def submit(self, payload: Mapping[str, Any]) -> str:
        self.count += 1
        handle = str(self.count)
        if self.setting.timed:
            self.waiting.append((handle, payload))
            return handle
        if not self.workers:  # the command's own worker would keep a device's memory
            self.setting.worker.rest()
        if not self.idle:
            self.idle.append(Worker(shown=False, hears=False, environment=SIDE_BY_SIDE))
            self.workers.append(self.idle[-1])
        worker = self.busy[handle] = self.idle.pop()
        threading.Thread(target=self._work, args=(worker, handle, payload), daemon=True).start()
        return handle

    def ended(self, seconds: float, told: Told) -> list[Outcome]:
        if self.waiting:
            return [_outcome(self.setting.worker, *self.waiting.pop(0), told)]
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                said = self.said.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(said, Outcome):
                worker = self.busy.pop(said.handle)
                if worker.stopped:  # by somebody else, and for good
                    self.workers.remove(worker)
                    worker.__exit__(None)
                else:
                    self.idle.append(worker)
                return [said]
            told(*said)
        return []

    def cancel(self, *, insisted: bool = False) -> None:
        for worker in self.workers:
            worker.stop(self.setting.worker.stopped, insisted=insisted)

    def close(self) -> None:
        for worker in self.busy.values():  # an error ends the command, which waits for none of them
            worker.stop(self.setting.worker.stopped, insisted=True)
        for worker in self.workers:
            worker.__exit__(None)

    def _work(self, worker: Worker, handle: str, payload: Mapping[str, Any]) -> None:
        try:
            self.said.put(_outcome(worker, handle, payload, lambda *said: self.said.put(said)))
        except BaseException as error:  # else nobody would hear of it
            self.said.put(Outcome(handle, lost=f"{type(error).__name__}: {error}"))


def _outcome(worker: Worker, handle: str, payload: Mapping[str, Any], told: Told) -> Outcome:
    heard = lambda message: told(handle, message)
    try:
        answer = worker.ask(payload["do"], heard, stall=payload["stall"], **payload["with"])
    except Ended as ended:
        return Outcome(handle, ended=ended.record)
    return Outcome(handle, answer=answer)
