"""Pictures of what the compared mechanisms look at, where a fixed pattern of positions says it."""

from collections.abc import Sequence

from xformers_lab import catalogue, drawing, sources, spec
from xformers_lab import config as configs
from xformers_lab.errors import LabError
from xformers_lab.nn.size import Size
from xformers_lab.report import human

# Pictures on one page; each has some kilobytes.
MOST = 24


def figures(cells: Sequence[dict]) -> list[dict]:
    """Name, note, side and path of a picture for each mechanism of the rows, at its shortest length there."""
    lengths: dict[tuple[str, bool], tuple[configs.Config, Sequence[int] | None]] = {}
    for row in cells:
        config = _config(row)
        if config is None or not _of_tokens(config):
            continue
        for name in spec.split(config.model.attention, "+"):
            key = name, _causal(config)
            if key not in lengths or config.seq_len < lengths[key][0].seq_len:
                lengths[key] = config, row.get("plane")
    drawn = (_figure(*kind, *where) for kind, where in lengths.items())
    return [figure for figure in drawn if figure][:MOST]


def _config(row: dict) -> configs.Config | None:
    """The config of a row; None where it has none, one of another version of the laboratory, or one that names code
    outside the package that this process has not imported: a page runs nobody's code for a picture."""
    try:
        if not sources.loaded(row["config"]):
            return None
        return configs.from_dict(row["config"])
    except (KeyError, TypeError, LabError):
        return None


def _causal(config: configs.Config) -> bool:
    """Whether its model sees only what stands before; without the task's data, which may be gone."""
    kind = config.model.model
    try:
        kind = spec.entry("task", spec.parse(config.task).name).kinds[0] if kind == "auto" else kind
        return spec.entry("model", spec.parse(kind).name).causal
    except (LabError, AttributeError):  # the file of a task or model is gone, or a model has no attention
        return kind != "encoder"


def _of_tokens(config: configs.Config) -> bool:
    """Whether its mechanisms see the length that the row names, and not patches of an image, say."""
    try:
        return spec.entry("model", spec.parse(config.model.model).name).of_tokens
    except (LabError, AttributeError):  # auto, or a file that is gone
        return True


def _figure(name: str, causal: bool, config: configs.Config, plane: Sequence[int] | None) -> dict | None:
    """plane: rows and columns where the positions are an image."""
    heads, grid = config.model.heads, None if plane is None else (plane[0], plane[1])
    try:
        mechanism = spec.build("attention", name, Size(config.seq_len, dim=heads, heads=heads, plane=grid))
    except LabError:
        return None
    seen = catalogue.sampled(mechanism, causal)
    if seen is None:
        return None
    n, words = len(seen[0]), "causal" if causal else "both sides"
    note = f"{words}, {config.seq_len:,} positions" + (f", {n} of them drawn" if n < config.seq_len else "")
    note += f", head 1 of {len(seen)}" if len(seen) > 1 else ""
    return {"name": human.plain(name), "note": note, "side": n, "path": drawing.path(seen[0])}
