"""A worker without its process: what a test replaces, listens to, or would start hundreds of processes for."""

import io

import pytest

from xformers_lab.supervise.process import Worker
from xformers_lab.supervise.worker import Tell, perform


@pytest.fixture
def inline(monkeypatch) -> None:
    """Commands do here what they ask a worker's process to do."""

    def ask(self, what, heard=None, *, stall=None, limit=None, **arguments):
        return perform(what, Tell(io.StringIO()), **arguments)

    monkeypatch.setattr(Worker, "ask", ask)
