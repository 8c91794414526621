"""Which charts a comparison has, from its rows: plots to draw, the choices a reader has, and the numbers in a table."""

from collections.abc import Iterable, Sequence

from xformers_lab.record import FIGURES, SPEED, Figure
from xformers_lab.report import crossover, human, rows
from xformers_lab.report.charts import curves, lengths, pareto, scaling, tuning
from xformers_lab.report.charts.parts import DIRECTIONS, Chart, Measure, Pane, Pick, capital, of_figure
from xformers_lab.report.plot import Look, look
from xformers_lab.report.scaling import Scaling

__all__ = ["Chart", "Pane", "Pick", "looks", "of_group"]

ROLES = ("variant", "baseline", "range")


def looks(cells: Sequence[dict], varied: Sequence[str], first: Iterable[str] = ()) -> list[Look]:
    """Colour and shape of each series on the whole page: variants first, in order of appearance, then baselines and
    windows, which are drawn hollow and dashed. first: what comes before them, the curves of a scaling study."""
    roles: dict[str, str] = dict.fromkeys(first, "variant")
    for row in cells:
        roles.setdefault(rows.series(row, varied), rows.role(row))
    ranked = sorted(roles, key=lambda name: ROLES.index(roles[name]))
    return look(ranked, [name for name in ranked if roles[name] != "variant"])


def of_group(
    group: rows.Group,
    names: Sequence[str],
    varied: Sequence[str],
    figures: Iterable[Figure] = FIGURES.values(),
    scalings: Sequence[Scaling] = (),
) -> list[Chart]:
    """Every chart that the rows of a group have numbers for: losses over sizes of a scaling study, the metric, what it
    costs, each of the figures that is charted (of the two that say how fast, the one of this kind of rows), and what
    training and tuning were like."""
    quality = _metric(group)
    direction = "higher is better" if group.better("metric") > 0 else "lower is better"
    charts: list[Chart | None] = [scaling.over_sizes(scalings, names)]
    charts += [] if group.bench else [pareto.against_cost(group, names, quality)]
    charts.append(lengths.by_length(group, names, quality, capital(quality.title), direction, group.guess))
    for figure in figures:
        if figure.chart and (figure.name == group.speed or figure.name not in SPEED.values()):
            title = _memory_title(group) if figure.name == "memory" else figure.chart
            marked = crossover.marks(group) if figure.name == group.speed else {}
            axis = of_figure(figure)
            charts.append(lengths.by_length(group, names, axis, title, DIRECTIONS[figure.better], None, marked))
    if not group.bench:
        charts += [
            lengths.beyond(group, names, varied, quality, direction),
            lengths.windows(group, names, quality, direction),
            *tuning.sensitivities(group, names, varied, quality),
            *curves.of_training(group, names, varied, quality.title),
        ]
    return [chart for chart in charts if chart is not None]


def _metric(group: rows.Group) -> Measure:
    name = human.plain(group.first("metric_name", "metric"))
    return Measure("metric", name, human.score)


def _memory_title(group: rows.Group) -> str:
    return "Peak memory" if any(row.get("peak_bytes") is not None for row in group.rows) else "Temporary memory"
