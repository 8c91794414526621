"""One environment for every test: CPU, no network, compilations kept between runs and shared by the workers."""

import collections
import gc
import importlib.metadata
import io
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs are shared by all checkouts of a user: most of the suite's time is the compiler's.
USER_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(USER_CACHE / "xformers_lab" / "tests"))
# The laboratory's own cache: tests write verdicts there.
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache" / "python{}.{}".format(*sys.version_info))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A test runs a program a few times on a few numbers, so that most of its time would be the compiler's: the cheapest
# machine code, here and in the processes that tests start. It is not what users run, for XLA fuses and vectorises less:
# tests/default_flags runs every choice without these flags.
CHEAP = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
CHEAP += ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    CHEAP += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(CHEAP))


# Tracing makes millions of small objects that live on in JAX's caches: to look through them as often as Python does by
# default takes a seventh of a test's time.
gc.set_threshold(100_000, 50, 100)


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "golden: reads another implementation's numbers, through the fixture `golden`")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
            if not item.get_closest_marker("slow"):
                item.add_marker("full")
    if part := os.environ.get("PART"):
        number, parts = map(int, part.split("/"))
        chosen = [item for item in items if not item.get_closest_marker("full") or part_of(item, parts) == number]
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen


def part_of(item, parts: int) -> int:
    """Which of so many parts of the tests marked full a test belongs to, the same on every machine; from 1 on."""
    return 1 + zlib.crc32(item.nodeid.encode()) % parts


def pytest_terminal_summary(terminalreporter) -> None:
    """Last, how many tests were skipped for want of what: a green run says what it did not look at."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real data and reference outputs beside the checkout; tests skip where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared here")
    return folder


@pytest.fixture
def golden(request):
    """golden(name) gives another implementation's numbers: {name: array}, and its hyper-parameters as "meta".

    They are read from ../shared/golden; with GOLDEN=live the implementation itself is run (tests/peers).
    """
    if os.environ.get("GOLDEN") == "live":
        return run_peer
    folder = request.getfixturevalue("shared") / "golden"

    def read(name: str) -> dict:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no ../shared/golden/{path.name} here")
        arrays = np.load(path)
        return {key: arrays[key] for key in arrays.files} | {"meta": json.loads(str(arrays["meta"]))}

    return read


def run_peer(name: str) -> dict:
    import peers

    try:
        return peers.live(name)
    except ImportError as missing:
        pytest.skip(f"GOLDEN=live: {missing}")


@pytest.fixture(scope="session", autouse=True)
def short_ends() -> Iterator[tuple]:
    """A run in this process ends without attention maps and without what decoding costs: to compile and time both takes
    longer than a tiny run itself. What is about them asks for `whole_ends`; processes that tests start have them."""
    from xformers_lab.train import decoding, example_maps

    whole = example_maps.LONGEST, decoding.figures
    example_maps.LONGEST, decoding.figures = 0, lambda *_: dict.fromkeys(decoding.FIGURES)
    yield whole
    example_maps.LONGEST, decoding.figures = whole


@pytest.fixture
def whole_ends(short_ends, monkeypatch) -> None:
    """Runs in this process end as users' do."""
    from xformers_lab.train import decoding, example_maps

    monkeypatch.setattr(example_maps, "LONGEST", short_ends[0])
    monkeypatch.setattr(decoding, "figures", short_ends[1])


@pytest.fixture
def inline(monkeypatch) -> None:
    """Commands do in this process what they ask a worker's to do: tests can then replace and listen to it."""
    # Here, since importing the package before XLA_FLAGS is set would be too early.
    from xformers_lab.supervise.process import Worker
    from xformers_lab.supervise.worker import Tell, perform

    def ask(self, what, heard=None, *, stall=None, limit=None, **arguments):
        return perform(what, Tell(io.StringIO()), **arguments)

    monkeypatch.setattr(Worker, "ask", ask)
