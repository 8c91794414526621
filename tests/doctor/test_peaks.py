"""Published peaks are whole, and those of a processor follow from its flags."""

import pytest

from xformers_lab.doctor import peaks

EPYC = """\
processor\t: {number}
vendor_id\t: {vendor}
cpu family\t: {family}
cpu MHz\t\t: 2500.000
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu sse2 {flags}
"""


def cpuinfo(flags, count=2, threads=1, vendor="AuthenticAMD", family=25):
    blocks = [
        EPYC.format(number=number, core=number // threads, flags=flags, vendor=vendor, family=family)
        for number in range(count)
    ]
    return "\n".join(blocks)


@pytest.mark.parametrize(
    ("flags", "vendor", "family", "cycle"),
    [
        ("avx2 fma", "GenuineIntel", 6, 32),
        ("avx2 fma avx512f", "GenuineIntel", 6, 64),
        ("avx2 fma avx512f", "AuthenticAMD", 25, 32),
        ("avx2 fma avx512f", "AuthenticAMD", 26, 64),
    ],
)
def test_a_processor_by_its_flags(flags, vendor, family, cycle):
    peak = peaks.processor(cpuinfo(flags, 2, 1, vendor, family), {0, 1})
    assert peak is not None and not peak.published
    assert peak.flops == {"float32": 2 * cycle * 2.5e9}
    assert peak.sources["float32"] == f"2 cores x {cycle} FLOPs a cycle x 2.50 GHz"


def test_bfloat16_in_a_processor():
    told = peaks.processor(cpuinfo("avx512f avx512_bf16"), {0})
    assert told is not None and told.flops == {"float32": 80e9, "bfloat16": 160e9}
    told = peaks.processor(cpuinfo("avx512f avx512_bf16 amx_bf16", vendor="GenuineIntel"), {0})
    assert told is not None and told.flops["bfloat16"] == 1024 * 2.5e9
    assert told.sources["bfloat16"] == "1 core x 1024 FLOPs a cycle x 2.50 GHz"


def test_threads_of_a_core_count_once_and_only_what_is_allowed():
    told = cpuinfo("avx2 fma", count=8, threads=2)
    for allowed, cores in ((range(8), 4), ({0, 1}, 1), ({1, 2}, 2)):
        peak = peaks.processor(told, allowed)
        assert peak is not None and peak.flops["float32"] == cores * 32 * 2.5e9


def test_the_highest_clock_counts_where_it_is_told():
    told = peaks.processor(cpuinfo("avx2 fma"), {0}, hertz=4e9)
    assert told is not None and told.flops["float32"] == 32 * 4e9


@pytest.mark.parametrize(
    "told",
    [
        "",
        "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n",
        cpuinfo("avx2 fma").replace("2500.000", "unknown"),
    ],
    ids=["empty", "arm", "no clock"],
)
def test_a_processor_that_does_not_tell(told):
    assert peaks.processor(told, {0}) is None


def test_the_published_ones():
    h100, h200 = peaks.published("NVIDIA H100 80GB HBM3"), peaks.published("NVIDIA H200")
    assert h100 is not None and h100 == h200 and h100.published and "white paper" in h100.sources["tf32"]
    assert h100.flops["float32"] < h100.flops["tf32"] < h100.flops["bfloat16"] == 989.4e12
    for kind in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40S", "cpu"):
        assert peaks.published(kind) is None  # a part of one, or another one
    turing = peaks.published("Tesla T4")
    assert turing is not None and set(turing.flops) == {"float32"}
    for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        tpu = peaks.published(kind)
        assert tpu is not None and set(tpu.flops) == {"bfloat16"}


def test_the_table_is_whole():
    for kind, peak in peaks._table().items():
        assert kind and peak.flops and all(peak.sources[name] for name in peak.flops)
        assert all(1e12 < flops < 1e16 for flops in peak.flops.values())
