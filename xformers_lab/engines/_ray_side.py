"""The process that talks to Ray: it may end with the cluster, print what it likes, and hang, and the command goes on.

Its functions are asked for by the command, one at a time (`supervise.worker`).
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

from xformers_lab.engines import _job
from xformers_lab.errors import UsageError, said
from xformers_lab.supervise.worker import Tell

WORDS = {
    "WorkerCrashedError": "its worker died",
    "NodeDiedError": "its node died",
    "LocalRayletDiedError": "its node died",
    "OutOfMemoryError": "Ray ended it for want of memory",
    "TaskCancelledError": "it was cancelled",
}
_RUNNING: dict[Any, str] = {}  # Ray's reference -> handle


def connect(tell: Tell, address: str) -> dict[str, Any]:
    """Join a cluster; -> what `wait` says of it, and whether it asks for a token."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    tell.doing("connecting to Ray")
    try:
        _ray().init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise UsageError((said(error).splitlines() or [type(error).__name__])[0]) from None
    return wait(tell, 0.0)


def submit(tell: Tell, handle: str, payload: str, node: str | None, resources: Mapping[str, float]) -> None:
    """Have a job run on a node, or on any one."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    there = strategies.NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD"
    # A lost one is tried again by who knows what it is for.
    task = (
        _ray()
        .remote(_job.perform)
        .options(max_retries=0, num_cpus=resources["CPU"], num_gpus=resources["GPU"], scheduling_strategy=there)
    )
    _RUNNING[task.remote(payload)] = handle


def wait(tell: Tell, seconds: float) -> dict[str, Any]:
    """{"ended": [{"handle", "answer" or "lost"}], "nodes": [{"id", "host", "CPU", "GPU"}]} after a wait of up to so
    many seconds for the first that ends."""
    ray, found = _ray(), []
    if _RUNNING:
        ready, _ = ray.wait(list(_RUNNING), num_returns=1, timeout=seconds)
        more, _ = ray.wait(list(_RUNNING), num_returns=len(_RUNNING), timeout=0)
        for reference in dict.fromkeys([*ready, *more]):
            found.append({"handle": _RUNNING.pop(reference), **_of(reference)})
    nodes = [
        {"id": node["NodeID"], "host": node["NodeManagerHostname"]}
        | {kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")  # a head may be told to do no work
    ]
    return {"ended": found, "nodes": nodes}


def cancel(tell: Tell, insisted: bool) -> None:
    """Have all jobs end, or end them at once if `insisted`."""
    for reference in _RUNNING:
        _ray().cancel(reference, force=insisted)


def _ray() -> Any:
    return importlib.import_module("ray")  # an extra; `import` might take the engine's file for it


def _of(reference: Any) -> dict[str, str]:
    try:
        return {"answer": _ray().get(reference)}
    except Exception as error:
        kind = type(error).__name__
        return {"lost": WORDS.get(kind) or f"{kind}: {(said(error).splitlines() or [''])[0]}"}
