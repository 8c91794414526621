"""From which length on do sparse and linear attention pay, in time and in memory?"""

import os
import pathlib

from xformers_lab.experiment import Claim, at_least, at_most, bench, reported, slope

CLAIM = Claim(
    says="Full attention costs the square of the length, windows and linear attention the length itself; a window that "
    "is a mask over all pairs saves nothing.",
    source="Tay et al., 2021, Long Range Arena (arXiv:2011.04006), table 2",
    literature="steps per second at 1K and 4K tokens: Transformer 8.1 and 1.4, Local 9.2 and 7.4, Linear 9.1 and 7.8",
    doubt="A masked window with an exponent near one: the measure would not see fake sparsity.",
    minutes=3,
)
LENGTHS = (512, 1024, 2048, 4096)
MASKED = f"{os.path.relpath(pathlib.Path(__file__).parent)}/own/masked_window.py:window=64"
LEAN = ("local:window=64", "linear", "linformer")
STUDIES = {
    "training": bench(
        f"attention=full,{MASKED},{','.join(LEAN)} seq_len={','.join(map(str, LENGTHS))} dim=64 heads=4 batch=1",
        rounds=7,
    )
}


def judge(tables):
    keys = lambda name, length: {"attention": name, "seq_len": length, "pass": "forward+backward"}
    seconds = lambda name, length: tables["training"].seconds(**keys(name, length))
    memory = lambda name, length: tables["training"].value("temp_bytes", **keys(name, length))
    exponent = lambda of, name: slope({length: of(name, length) for length in LENGTHS[1:]})
    return [
        at_least("full: exponent of time over 1K to 4K tokens", exponent(seconds, "full"), 1.5),
        at_least("masked window: the same", exponent(seconds, MASKED), 1.5),
        *(at_most(f"{name}: the same", exponent(seconds, name), 1.25) for name in LEAN),
        *(at_least(f"full over {name}: time at 4K", seconds("full", 4096) / seconds(name, 4096), 2) for name in LEAN),
        at_least("masked window over window: time at 4K", seconds(MASKED, 4096) / seconds(LEAN[0], 4096), 3),
        *(reported(f"{name}: exponent of memory", exponent(memory, name)) for name in ("full", *LEAN)),
    ]
