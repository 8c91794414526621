"""How large configs are, for a terminal: one with its parts, several as a line each. See `train.sizes`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from xformers_lab.report import human
from xformers_lab.report.listing import print_listing

LAYERS = ("attention", "ffn")  # parts that every layer has
ATTENTION = "attention"
KEPT = "kept for backward"


def print_sizes(sizes: Mapping[str, Any], console: Console | None = None) -> None:
    """Parts of one config, then bytes, then how parameters lie on the devices where they are shared out."""
    console = console or Console()
    print_listing(by_part(sizes), console)
    console.print()
    print_listing(in_bytes(sizes), console)
    if why := sizes["decoding_bytes"].get("why_not"):
        console.print(f"it cannot decode: {human.plain(why)}", markup=False, highlight=False)
    if rows := on_devices(sizes):
        console.print()
        print_listing(rows, console)
        for line in about_layout(sizes):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def by_part(sizes: Mapping[str, Any]) -> list[dict]:
    """Parameters, FLOPs of a token and bytes that wait for the backward pass, a row for each part and one for all."""
    parameters, flops = sizes["parameters"], sizes["flops_per_token"]
    passes = {heading: flops[key] for key, heading in {"forward": "FLOPs/token", "training": "in training"}.items()}
    rows = []
    for part in [*parameters["parts"], "rest", "total"]:
        count = parameters["total"] if part == "total" else parameters["parts"].get(part)
        row = {"part": part, "parameters": human.NONE if count is None else f"{count:,}"}
        row |= {"share": _share(count, parameters["total"])}
        row["per layer"] = human.NONE if part not in LAYERS else human.count(count / sizes["layers"])
        for heading, counted in passes.items():
            value = None if counted is None else counted["total"] if part == "total" else counted["parts"].get(part)
            whole = None if counted is None else counted["total"]
            row |= {heading: human.count(value), f"{heading} share": _share(value, whole)}
        kept = sizes["kept_bytes"]
        size = kept["total"] if part == "total" else kept["parts"].get(part)
        row |= {KEPT: human.size(size), f"{KEPT} share": _share(size, kept["total"])}
        rows.append(row)
    return rows


def in_bytes(sizes: Mapping[str, Any]) -> list[dict]:
    """Bytes of training and of decoding. Attention has of what is kept for each parameter its share of them."""
    share = attention_share(sizes["parameters"])
    rows = []
    for what, each in (("training", sizes["training_bytes"]), ("decoding", sizes["decoding_bytes"])):
        for key, size in each.items():
            if key == "why_not" or (key in ("average", "other") and not size):
                continue
            for_parameters = key in ("parameters", "gradients", "optimizer", "average")
            of_attention = human.size(size * share) if for_parameters and share is not None else human.NONE
            rows.append({"bytes": f"{what}: {key}", "": human.size(size), "of them attention": of_attention})
    return rows


def on_devices(sizes: Mapping[str, Any]) -> list[dict]:
    """Parameters that are shared out, and how: `32/fsdp` is a dimension of 32 shared out over that axis."""
    rows = [row for row in sizes["layout"]["parameters"] if row["shared"]]
    size = lambda row: {"bytes": human.size(row["bytes"]), "on each device": human.size(row["bytes_per_device"])}
    return [{"parameter": row["parameter"], "shape": row["shape"], **size(row)} for row in rows]


def about_layout(sizes: Mapping[str, Any]) -> list[str]:
    """The axes, what is whole on every device, and what is not known for want of devices, a line each."""
    layout = sizes["layout"]
    axes = " x ".join(f"{axis} {size}" for axis, size in layout["axes"].items())
    whole = [row["parameter"] for row in layout["parameters"] if not row["shared"]]
    lines = [f"{layout['devices']} devices: {axes}"]
    lines += [f"whole on every device: {human.listing(whole)}"] if whole else []
    if layout["devices"] != layout["here"]:
        count = layout["here"]
        lines.append(f"activations are not known: here {'is 1 device' if count == 1 else f'are {count} devices'}")
    return lines


def line(sizes: Mapping[str, Any]) -> dict[str, str]:
    """One config among several."""
    flops, decoding = sizes["flops_per_token"], sizes["decoding_bytes"]
    row = {
        "parameters": f"{sizes['parameters']['total']:,}",
        "parameters: attention": _percent(attention_share(sizes["parameters"])),
    }
    for key, heading in {"forward": "FLOPs/token", "training": "in training"}.items():
        counted = flops[key]
        row[heading] = human.NONE if counted is None else human.count(counted["total"])
        row[f"{heading}: attention"] = human.NONE if counted is None else _percent(attention_share(counted))
    row |= {"training memory": human.size(sizes["training_bytes"]["total"])}
    row |= {"activations": human.size(sizes["training_bytes"]["activations"])}
    row |= {f"{KEPT}: attention": _percent(attention_share(sizes["kept_bytes"]))}
    return row | {"decoding keeps": human.size(decoding.get("cache"))}


def lines(cells: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]) -> list[dict]:
    """A line for each config: its keys, then its sizes or, where it has none, the `reason`."""
    return [
        {**keys, **(line(sizes) if "parameters" in sizes else {"parameters": human.NONE, "reason": sizes["reason"]})}
        for keys, sizes in cells
    ]


def attention_share(counted: Mapping[str, Any]) -> float | None:
    """What attention has of parameters, FLOPs or bytes, from 0 to 1; None of nothing."""
    return counted["parts"].get(ATTENTION, 0) / counted["total"] if counted["total"] else None


def _share(value: float | None, whole: float | None) -> str:
    return _percent(None if value is None or not whole else value / whole)


def _percent(share: float | None) -> str:
    return human.NONE if share is None else f"{100 * share:.1f} %"
