"""Accelerators that the machine has, whether jax can use them or not, as its files and drivers tell. Needs no jax."""

import dataclasses
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Mapping

ROOT = pathlib.Path("/")
NVIDIA, GOOGLE = "0x10de", "0x1ae0"  # vendors on the PCI bus
# Of Google's devices on the PCI bus those that are TPUs; a network card of its cloud is another one.
TPUS = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "TPU7x",
}
# Variables that a TPU's host has.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME", "COLAB_TPU_ADDR")


@dataclasses.dataclass(frozen=True)
class Nvidia:
    """NVIDIA GPUs of the machine.

    names: of those that the driver knows, empty where nothing tells; driver: its version, None where none is loaded;
    capability: the least compute capability of them, None where nothing tells; reachable: whether this process can open
    them, which a container that was started without its GPUs cannot.
    """

    names: tuple[str, ...] = ()
    driver: tuple[int, ...] | None = None
    capability: float | None = None
    reachable: bool = True


def nvidia_smi() -> str | None:
    """What the driver's own tool says of each GPU, in lines of name, driver and compute capability; None where there is
    no such tool, or it fails."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def nvidia(root: pathlib.Path = ROOT, smi: Callable[[], str | None] = nvidia_smi) -> Nvidia | None:
    """The machine's NVIDIA GPUs by what `smi` answers, else by the files under `root`; None where there are none."""
    if told := _told(smi() or ""):
        return told
    reachable = any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl"))
    version = _read(root / "proc/driver/nvidia/version")
    if found := re.search(r"Kernel Module.*?\s(\d{3,}(?:\.\d+)+)", version):
        cards = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
        models = [re.search(r"^Model:\s*(.+?)\s*$", _read(card), re.M) for card in cards]
        names = tuple(model[1] for model in models if model)
        return Nvidia(names, _version(found[1]), reachable=reachable)
    # A display or a 3D controller; the same cards have a sound device too.
    displays = [device for device in _pci(root, NVIDIA) if _read(device / "class").startswith("0x03")]
    return Nvidia(reachable=reachable) if reachable or displays else None


def tpu(root: pathlib.Path = ROOT, environment: Mapping[str, str] = os.environ) -> str | None:
    """The machine's TPUs in words, with what tells of them; None where there are none."""
    chips = [name for device in _pci(root, GOOGLE) if (name := TPUS.get(_read(device / "device")))]
    if chips:
        return f"{len(chips)} x TPU {chips[0]}"
    if (root / "dev" / "accel0").exists():
        return "TPU (/dev/accel0)"
    variable = next((name for name in TPU_VARIABLES if environment.get(name)), None)
    return None if variable is None else f"TPU ({variable}={environment[variable]})"


def amd(root: pathlib.Path = ROOT) -> bool:
    """Whether the machine has an AMD GPU under the driver that ROCm uses: processors are among its nodes, without the
    units of a GPU."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return any(re.search(r"^simd_count [1-9]", _read(node), re.M) for node in nodes)


def _told(answer: str) -> Nvidia | None:
    """Lines of `nvidia_smi`: NVIDIA H200, 570.86.15, 9.0."""
    rows = [[part.strip() for part in line.rsplit(",", 2)] for line in answer.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    if not rows:
        return None
    capabilities = [float(capability) for *_, capability in rows if re.fullmatch(r"\d+\.\d+", capability)]
    return Nvidia(tuple(name for name, *_ in rows), _version(rows[0][1]), min(capabilities, default=None))


def _version(text: str) -> tuple[int, ...] | None:
    return tuple(map(int, text.split("."))) if re.fullmatch(r"\d+(\.\d+)*", text) else None


def _pci(root: pathlib.Path, vendor: str) -> list[pathlib.Path]:
    files = sorted((root / "sys/bus/pci/devices").glob("*/vendor"))
    return [file.parent for file in files if _read(file) == vendor]


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
