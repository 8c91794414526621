"""Several processes, on one host or many, that train one run: each takes the same steps, on all of their devices.

`join` has this process meet the others, before jax makes its devices. From then on process 0 alone writes to the folder
of the run, which all must see. What one of them finds there, or where one of them fails, the others hear of, so that
all do the same next. In a process by itself everything here is the plain call. Needs no jax before `join`.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from xformers_lab import cpu_threads
from xformers_lab.config import Place
from xformers_lab.errors import IntegrityError, RunFailed, UsageError
from xformers_lab.supervise.process import LOST

T = TypeVar("T")
MEETING, SILENCE = 300.0, 60.0  # seconds to wait for processes to come, and for a sign of life of one: see `Place.wait`
SEEING = 10.0  # seconds that a file of another host may take to show
LEAVING = 5.0  # seconds in which those that end for one reason end together, where it is an error
AUTO = "auto"
WAITING = "waiting for the other processes"
# What a launcher says of how many processes there are, and which this one is; jax reads the same variables.
LAUNCHERS = (
    ("SLURM", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"), "SLURM_NTASKS", "SLURM_PROCID"),
    ("Open MPI", ("OMPI_COMM_WORLD_LOCAL_RANK",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
TPU_HOSTS, TPU_HOST = "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"  # of a pod: their names with commas between, and which


class Lost(RunFailed):
    """Another process of the run ended, or went silent."""


@dataclasses.dataclass
class _Here:
    process: int = 0
    names: tuple[str, ...] = (socket.gethostname(),)  # the host of every process


_here = _Here()


def several() -> bool:
    """Whether other processes train the run too."""
    return len(_here.names) > 1


def process() -> int:
    """Which of them this one is."""
    return _here.process


def first() -> bool:
    """Whether this is the process that writes."""
    return _here.process == 0


def processes() -> int:
    """How many train the run."""
    return len(_here.names)


def machines() -> int:
    """On how many hosts."""
    return len(set(_here.names))


# ---- meeting and leaving -----------------------------------------------------------------------------------------


def meant(place: Place, environment: Mapping[str, str] = os.environ) -> Place:
    """Which process this is: as `place` says, or where it says nothing, as the launcher does that started it. What has
    neither is a process by itself, whose coordinator is None. Raises UsageError."""
    said = {key: value for key, value in dataclasses.asdict(place).items() if value is not None and key != "wait"}
    if place.processes == 1:
        return Place(wait=place.wait)
    if place.coordinator == AUTO:
        if len(said) > 1:
            raise UsageError("coordinator=auto: jax finds processes= and process= as well; leave them out")
        return place
    if not said:
        return dataclasses.replace(place, coordinator=AUTO) if _launched(environment) > 1 else place
    if missing := [key for key in ("coordinator", "processes", "process") if key not in said]:
        words = " ".join(f"{key}={value}" for key, value in said.items())
        raise UsageError(
            f"{words}: {' and '.join(f'{key}=' for key in missing)} missing; say coordinator=HOST:PORT processes=N "
            "process=0 to N-1, or nothing where SLURM, Open MPI or a TPU pod starts the processes"
        )
    assert place.coordinator is not None and place.processes is not None and place.process is not None
    host, _, port = place.coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"coordinator={place.coordinator}: say HOST:PORT, such as {host or 'node1'}:29500")
    if place.process >= place.processes:
        raise UsageError(
            f"process={place.process}: they count from 0, so the last of processes={place.processes} is "
            f"process={place.processes - 1}"
        )
    return place


def _launched(environment: Mapping[str, str]) -> int:
    """How many processes the launcher has started of which this one is, 1 where there is none."""
    number = lambda name: int(text) if (text := environment.get(name, "")).isdecimal() else 1
    for _, marks, count, which in LAUNCHERS:
        if all(name in environment for name in (*marks, count, which)):
            return number(count)
    hosts = environment.get(TPU_HOSTS, "").count(",") + 1
    return hosts if TPU_HOST in environment else 1


def join(place: Place) -> None:
    """Meet the other processes of a place as `meant` gives it, where there are any; jax must have made no device yet.

    Raises UsageError where the coordinator cannot be reached within `wait`, or its port is taken.
    """
    if place.coordinator is None:
        return
    meeting, silence = (limit if place.wait is None else place.wait for limit in (MEETING, SILENCE))
    ends = time.monotonic() + meeting
    told: dict[str, Any] = {}
    if place.coordinator != AUTO:
        told = {"coordinator_address": place.coordinator, "cluster_detection_method": "deactivate"}
        told |= {"num_processes": place.processes, "process_id": place.process}
        _reach(place, ends)
    cpu_threads.enough(cpu_threads.simulated(), processes=place.processes or 2)
    import jax

    # Signals are the lab's own to hear: see `Stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    left = max(1, round(ends - time.monotonic()))
    told |= {"heartbeat_timeout_seconds": max(1, round(silence)), "shutdown_timeout_seconds": max(1, round(meeting))}
    try:
        jax.distributed.initialize(**told, initialization_timeout=left)
    except Exception as error:  # jax knows no cluster here, or nobody came
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        if place.coordinator == AUTO:
            reason = f"coordinator=auto: jax finds no processes here ({reason}); say coordinator=HOST:PORT processes=N"
            raise UsageError(f"{reason} process=I") from None
        raise UsageError(f"{unmet(place)} ({reason})") from None
    _here.process = jax.process_index()
    if (devices := jax.local_device_count()) * jax.process_count() != jax.device_count():
        raise UsageError(f"process {_here.process} has {devices} devices, others have more or fewer; give all as many")
    _here.names = ("",) * jax.process_count()
    _here.names = tuple(gathered(socket.gethostname()))


def unmet(place: Place) -> str:
    """What to do where the processes of a place do not come together."""
    seconds = MEETING if place.wait is None else place.wait
    return (
        f"coordinator={place.coordinator}: the processes did not meet within {seconds:g} s; start all of them in that "
        f"time (wait= changes it), with the same coordinator= and processes=, and see that each reaches that port"
    )


def _reach(place: Place, ends: float) -> None:
    """Raises UsageError where nobody answers at the coordinator's address until then, or process 0 cannot answer there.

    jax would end the process without a word that tells why.
    """
    assert place.coordinator is not None
    host, _, port = place.coordinator.rpartition(":")
    host = host.strip("[]")
    if place.process == 0:
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", int(port)))
        except OSError as error:
            raise UsageError(f"coordinator={place.coordinator}: {error.strerror} at port {port}; use another") from None
        return
    reason = ""
    while (left := ends - time.monotonic()) > 0:
        try:
            socket.create_connection((host, int(port)), min(left, 5.0)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.2, left))
    raise UsageError(f"{unmet(place)} ({reason})")


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
    """Together with the other processes of a place, where there are any, while the `with` lasts; raises as `join`, and
    Lost where one of them ends or falls silent."""
    error: BaseException | None = None
    try:
        join(place)
        yield
    except BaseException as caught:
        error = caught
        if several() and type(caught).__name__ == "JaxRuntimeError":  # all else is caught where it may come from
            error = _lost(caught)
            raise error from caught
        raise
    finally:
        leave(error)


def leave(error: BaseException | None) -> None:
    """Part from the others, together with those that end as well; after an error for LEAVING seconds at most, since
    they may be waiting for this one."""
    if not several():
        return
    import jax

    if error is None:
        jax.distributed.shutdown()
        return
    if not isinstance(error, Lost):
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(LEAVING)
    # What jax does at exit would wait for those that are lost.
    atexit.register(os._exit, 1)


def _lost(error: BaseException) -> Lost:
    """What an exception of jax means among several processes: devices exchange numbers at every step."""
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return Lost(f"{LOST} ({reason})")


# ---- what one knows and all must -----------------------------------------------------------------------------------


def gathered(value: Any) -> list[Any]:
    """The values, as JSON has them, that all processes call this with."""
    if not several():
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array(len(text), np.int32)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]


def agreed(call: Callable[[], T], *kinds: type[Exception]) -> T:
    """call() in every process; what it raises in one of them is raised in all: a LabError as such, one of `kinds` too,
    any other exception as RunFailed."""
    if not several():
        return call()
    value, error = None, None
    try:
        value = call()
    except Exception as caught:
        error = caught
    told = None if error is None else (type(error).__name__, getattr(error, "exit_code", 0), str(error))
    answers = gathered(told)
    if error is not None:
        raise error
    for process, answer in enumerate(answers):
        if answer is not None:
            name, code, text = answer
            raise _as_told(process, name, code, text, kinds)
    return cast(T, value)


def of_first(call: Callable[[], T], *kinds: type[Exception]) -> T:
    """What call() gives in process 0, as JSON has it, in every process; errors as of `agreed`."""
    if not several():
        return call()
    return gathered(agreed(call if first() else lambda: None, *kinds))[0]


def _as_told(process: int, name: str, code: int, text: str, kinds: Sequence[type[Exception]]) -> Exception:
    """The exception of another process."""
    if kind := next((kind for kind in kinds if kind.__name__ == name), None):
        return kind(text)
    text = text if code else f"{name}: {text}"
    known = {kind.exit_code: kind for kind in (UsageError, RunFailed, IntegrityError)}
    return known.get(code, RunFailed)(f"process {process} on {_here.names[process]}: {text}")


@contextlib.contextmanager
def held_by_first(lock: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Process 0 holds a lock, for all of them."""
    with contextlib.ExitStack() as stack:
        of_first(lambda: stack.enter_context(lock))
        yield


def refuse_other_words(steering: Mapping[str, Any]) -> None:
    """Raises UsageError where processes were not given the same of all that decides which steps they take."""
    if not several():
        return
    ours = json.loads(json.dumps(steering))
    for process, theirs in enumerate(gathered(ours)):
        for key in ours:
            if theirs.get(key) != ours[key]:
                raise UsageError(
                    f"process {process} was given {key}={theirs.get(key)}, and process {_here.process} "
                    f"{key}={ours[key]}: processes of one run take the same words (processes=1: each runs by itself)"
                )


def refuse_other_folder(run_dir: pathlib.Path) -> None:
    """Raises UsageError where not all processes see the folder of the run that process 0 has locked."""
    if not several():
        return
    mark = run_dir / "owner.json"
    own = of_first(mark.read_text)

    def seen() -> None:
        ends = time.monotonic() + SEEING
        while not _reads(mark, own):
            if time.monotonic() > ends:
                raise UsageError(
                    f"{run_dir}: not the folder that process 0 has by this name; all processes need one that all see: "
                    "give runs= a folder on a file system that the hosts share"
                )
            time.sleep(0.2)

    agreed(seen)


def _reads(path: pathlib.Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == text
    return False


def refuse_unequal(tree: Any) -> None:
    """Raises UsageError where processes drew different first arrays, as other processors may: copies of one parameter
    would go on to differ, without a word."""
    if not several():
        return
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf).tobytes())
    drawn = gathered(digest.hexdigest())
    if other := [process for process, each in enumerate(drawn) if each != drawn[0]]:
        raise UsageError(
            f"process {other[0]} on {_here.names[other[0]]} draws other first parameters than process 0 on "
            f"{_here.names[0]}: give all processes the same kind of host, or begin with another run's, init=RUN"
        )


# ---- arrays --------------------------------------------------------------------------------------------------------


def whole(tree: Any) -> Any:
    """A tree of arrays on the host, each whole, wherever its parts lie; all processes call it."""
    import jax

    if not several():
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def fetch(leaf: Any) -> Any:
        if _is_key(leaf):
            return jax.random.wrap_key_data(fetch(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def put(tree: Any, places: Any, **how: Any) -> Any:
    """A tree of arrays of the host, each whole, onto devices; this process brings what its own devices hold. how: as
    `jax.device_put` takes it."""
    import jax

    if not several():
        return jax.device_put(tree, places, **how)
    import numpy as np

    def one(leaf: Any, place: Any) -> Any:
        if _is_key(leaf):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), place), impl=jax.random.key_impl(leaf))
        array = np.asarray(leaf)
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        return jax.make_array_from_callback(array.shape, place, lambda part: array[part])

    return jax.tree.map(one, tree, places)


def _is_key(leaf: Any) -> bool:
    import jax

    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Stopping:
    """Called between steps: the number of the signal that asked any of the processes to stop, 0 for none, the same in
    all of them. It is what they had heard at the call before this one, so that none waits for a step that is still
    computed."""

    def __init__(self, heard: Callable[[], int]):
        self.heard, self.number, self.coming = heard, 0, None

    def __call__(self) -> int:
        if not several():
            return self.heard()
        if not self.number:
            coming, self.coming = self.coming, _largest(self.heard())
            self.number = 0 if coming is None else int(coming)
        return self.number


def _largest(number: int) -> Any:
    """The largest of the numbers of all processes, which is still to be computed."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    apart, together = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("all",), ()))
    numbers = jax.make_array_from_callback((mesh.size,), apart, lambda part: np.full(1, number, np.int32))
    return _most(together)(numbers)


@functools.cache
def _most(place: Any) -> Callable[[Any], Any]:
    import jax

    return jax.jit(lambda numbers: numbers.max(), out_shardings=place)
