"""What the machine has, told from planted files and from answers of the driver's tool."""

import pytest

from xformers_lab.doctor import accelerators
from xformers_lab.doctor.accelerators import Nvidia


def plant(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SILENT = lambda: None
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)\nGCC 12\n"
MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
CARD = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 0\n"


def test_the_drivers_tool_says_most(tmp_path):
    answer = "NVIDIA H200, 570.86.15, 9.0\nTesla T4, 570.86.15, 7.5\n"
    told = accelerators.nvidia(tmp_path, lambda: answer)
    assert told == Nvidia(("NVIDIA H200", "Tesla T4"), (570, 86, 15), 7.5)


@pytest.mark.parametrize(
    "answer", ["", "NVIDIA-SMI has failed because it couldn't communicate", "No devices were found\n"]
)
def test_an_answer_that_names_no_gpu_is_none(tmp_path, answer):
    assert accelerators.nvidia(tmp_path, lambda: answer) is None


def test_a_tool_that_does_not_say_what_a_card_can_do(tmp_path):
    assert accelerators.nvidia(tmp_path, lambda: "NVIDIA X, 470.1, [N/A]\n") == Nvidia(("NVIDIA X",), (470, 1), None)


@pytest.mark.parametrize(("text", "driver"), [(OPEN_MODULE, (570, 86, 15)), (MODULE, (550, 54, 15))])
def test_the_drivers_files_say_the_rest(tmp_path, text, driver):
    files = {"proc/driver/nvidia/version": text, "proc/driver/nvidia/gpus/0000:01:00.0/information": CARD}
    hidden = accelerators.nvidia(plant(tmp_path, files), SILENT)  # as in a container that was not given its GPUs
    assert hidden == Nvidia(("NVIDIA H100 80GB HBM3",), driver, reachable=False)
    opened = accelerators.nvidia(plant(tmp_path, {"dev/nvidia0": ""}), SILENT)
    assert opened == Nvidia(("NVIDIA H100 80GB HBM3",), driver)


def test_a_card_without_a_driver(tmp_path):
    slot = "sys/bus/pci/devices/0000:01:00."
    plant(tmp_path, {f"{slot}1/vendor": "0x10de\n", f"{slot}1/class": "0x040300\n"})
    assert accelerators.nvidia(tmp_path, SILENT) is None  # its sound device alone
    plant(tmp_path, {f"{slot}0/vendor": "0x10de\n", f"{slot}0/class": "0x030200\n"})
    assert accelerators.nvidia(tmp_path, SILENT) == Nvidia(reachable=False)


def test_tpus(tmp_path):
    slot = "sys/bus/pci/devices/0000:00:0"
    plant(tmp_path, {f"{slot}3/vendor": "0x1ae0\n", f"{slot}3/device": "0x0042\n"})
    assert accelerators.tpu(tmp_path, {}) is None  # the network card of Google's cloud
    assert accelerators.tpu(tmp_path, {"TPU_WORKER_ID": ""}) is None
    assert accelerators.tpu(tmp_path, {"TPU_NAME": "mine"}) == "TPU (TPU_NAME=mine)"
    plant(tmp_path, {"dev/accel0": ""})
    assert accelerators.tpu(tmp_path, {}) == "TPU (/dev/accel0)"
    for chip in (4, 5):
        plant(tmp_path, {f"{slot}{chip}/vendor": "0x1ae0\n", f"{slot}{chip}/device": "0x0063\n"})
    assert accelerators.tpu(tmp_path, {}) == "2 x TPU v5e"


def test_amd(tmp_path):
    nodes = "sys/class/kfd/kfd/topology/nodes"
    plant(tmp_path, {f"{nodes}/0/properties": "cpu_cores_count 8\nsimd_count 0\n"})
    assert not accelerators.amd(tmp_path)
    plant(tmp_path, {f"{nodes}/1/properties": "cpu_cores_count 0\nsimd_count 880\n"})
    assert accelerators.amd(tmp_path)
