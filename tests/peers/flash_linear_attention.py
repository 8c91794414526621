"""fla-core: the plain loops beside its kernels.

Its modules import Triton, which the loops do not use and a CPU need not have: a file of loops is run by itself.
"""

# pyright: reportMissingImports=false

import importlib.metadata
import runpy

import torch

from peers._small import qkv


def _loops(operator: str) -> dict:
    """What the file of an operator's loops defines."""
    path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{operator}/naive.py")
    return runpy.run_path(str(path))


def linear_attn_naive() -> dict:
    run = _loops("linear_attn")["naive_recurrent_linear_attn"]
    case = qkv((2, 18, 4, 8), v_shape=(2, 18, 4, 12))
    case["q"], case["k"] = case["q"].abs(), case["k"].abs()  # the normaliser divides by a sum that must not be near 0
    q, k, v = case.values()
    return case | {"y": run(q, k, v)[0], "y_norm": run(q, k, v, normalize=True)[0]}


def gla_naive() -> dict:
    case = qkv((2, 18, 4, 8), v_shape=(2, 18, 4, 12))
    case["g"] = torch.nn.functional.logsigmoid(torch.randn(2, 18, 4, 8))
    return case | {"y": _loops("gla")["naive_recurrent_gla"](*case.values())[0]}


def delta_rule_naive() -> dict:
    case = qkv((2, 4, 18, 8), v_shape=(2, 4, 18, 12))
    case["k"] = torch.nn.functional.normalize(case["k"], dim=-1)
    case["beta"] = torch.rand(2, 4, 18)
    y, state = _loops("delta_rule")["delta_rule_recurrence"](*case.values())
    return case | {"y": y, "state": state}


def based_taylor_naive() -> dict:
    case = qkv((2, 4, 18, 6), v_shape=(2, 4, 18, 12))
    return case | {"y": _loops("based")["naive_parallel_based"](*case.values())}
