"""The solver of equal budgets: on formulas, and on what models of many kinds really cost, in shapes alone."""

import io

import pytest

from xformers_lab import config as configs
from xformers_lab.compare import figures, match
from xformers_lab.compare.match import Match, met, solve
from xformers_lab.compare.study import cells
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.supervise.worker import Tell

TELL = Tell(io.StringIO())
BASE = edit(Config(), task="copy", dim=32, layers=1, heads=2, batch=2, seq_len=32)


def solved(budget: str, reference: Config, **changes) -> tuple[Config, dict, float]:
    """The config that the solver made of the reference with changes, what it said, and the target."""
    target = figures.measure(TELL, configs.to_dict(reference), budget)
    variant = edit(reference, **changes)
    said = figures.solve(TELL, configs.to_dict(variant), budget, target)
    return edit(variant, **{key: after for key, (_, after) in said["changed"].items()}), said, target


@pytest.mark.parametrize(
    "changes", [{"ffn": "glu"}, {"ffn": "moe:experts=4"}, {"attention": "mamba2"}, {"kv_heads": 1}]
)
def test_parameters_are_met_by_the_width_of_the_ffn(changes):
    config, said, target = solved("params", BASE, **changes)
    assert met(said["reached"], target) and set(said["changed"]) <= {"ffn"}
    assert figures.measure(TELL, configs.to_dict(config), "params") == said["reached"]
    assert "experts=4" in config.model.ffn or "ffn" not in changes or changes["ffn"] == "glu"  # other options stay


@pytest.mark.parametrize("kind", ["lstm", "gru", "bag", "bytenet"])
def test_a_model_without_an_ffn_changes_its_own_width(kind):
    config, said, target = solved("params", edit(BASE, dim=64), model=kind)
    assert met(said["reached"], target) and set(said["changed"]) <= {"dim", "heads"} and said["changed"]
    assert figures.measure(TELL, configs.to_dict(config), "params") == said["reached"]


def test_an_attention_alone_changes_its_width_by_whole_heads():
    config, said, target = solved("params", edit(BASE, dim=64), ffn="none", position="rope")
    assert met(said["reached"], target) and set(said["changed"]) == {"dim"}
    assert config.model.dim % config.model.heads == 0 and config.model.dim > 64


@pytest.mark.full
@pytest.mark.parametrize("attention", ["linear", "local:window=4"])
def test_flops_are_met_exactly_as_a_run_counts_them(attention):
    config, said, target = solved("flops", BASE, attention=attention)
    assert met(said["reached"], target) and set(said["changed"]) == {"ffn"}
    assert figures.flops_per_token(config) == said["reached"]


def test_the_state_of_decoding_is_met_by_the_model():
    of_text = edit(BASE, task="lm", seq_len=64)
    keys_and_values = 2 * 64 * 32 * 4
    assert 0 <= figures.measure(TELL, configs.to_dict(of_text), "state") - keys_and_values < 64  # and some counters
    _, said, target = solved("state", of_text, kv_heads=1)
    assert met(said["reached"], target) and set(said["changed"]) <= {"dim", "kv_heads"} and said["changed"]
    with pytest.raises(UsageError, match="decode token by token"):
        figures.measure(TELL, configs.to_dict(edit(BASE, task="listops")), "state")


def test_what_cannot_be_met_keeps_the_nearest_and_says_so():
    # 32 x 32 matrices of attention alone cost more than the target: no feed-forward layer is small enough.
    found = solve(edit(BASE, dim=32), lambda config: 1000.0 * config.model.dim, 10.0)
    assert found.config.model.dim == 2 and not met(found.reached, 10.0)
    assert match.report("params", 10.0, found.reached, {})["ok"] is False


def test_what_is_near_enough_is_left_as_it_is():
    found = solve(BASE, lambda config: 102.0, 100.0)
    assert found.config == BASE and found.reached == 102.0
    refusing = solve(BASE, _refuse, 100.0)
    assert refusing.config == BASE and refusing.reached is None


def _refuse(config):
    raise UsageError("cannot be")


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_few_widths_are_looked_at(power):
    looked = []

    def figure(config):
        looked.append(config.model.dim)
        return 5000 + float(config.model.dim) ** power

    found = solve(edit(BASE, model="lstm", dim=100), figure, 5000 + 333**power, headed=False)
    assert found.config.model.dim in range(330, 337) and len(looked) <= 12


def test_the_reference_is_the_first_or_the_one_that_is_named():
    grid = cells(configs.sweep(["attention=full,linear,local:window=8"])[0])
    read = lambda text: Match.read(text).reference(grid, ["attention"]).config.model.attention  # type: ignore
    assert read("params") == "full" and read("flops:to=linear") == "linear"
    assert read("flops:to=(local:window=8)") == "local:window=8"
    with pytest.raises(UsageError, match="no variant has that value; there are full, linear"):
        read("params:to=axial")
    assert Match.read("none") is None
