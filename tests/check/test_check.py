"""The kit passes every mechanism of the shelf, and reports on a mechanism whatever is wrong with it."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as draw
from mutants.right import Plain, subject
from rich.console import Console

from xformers_lab import shelves, spec
from xformers_lab.check import cache, costs, masks, run, values
from xformers_lab.check.run import PROPERTIES, check, examine
from xformers_lab.check.subject import Case, Subject, compare
from xformers_lab.config import Config, edit
from xformers_lab.errors import BrokenChoice, Refused, UsageError
from xformers_lab.model import check_config
from xformers_lab.report import pages


@pytest.mark.parametrize("name", kinds.one_of_each_kind(None, pytest.mark.brief, None))
def test_shelf_at_one_shape(name):
    """Value, no leak of the future or of padding, decoding: what decides, in seconds."""
    decisive = [values.equals_reference, masks.no_future, masks.no_padding, costs.decoding]
    assert examine(at_one_shape(name, gradients=False), decisive).failed == []


@pytest.mark.full
@pytest.mark.parametrize("name", kinds.one_of_each_kind(None, pytest.mark.slow, None))
def test_gradients_of_the_shelf_at_one_shape(name):
    """Gradients, and leaks as derivatives, of what has its whole kit in `make test-deep` alone."""
    derived = [values.same_gradients, masks.no_future, masks.no_padding]
    assert examine(at_one_shape(name, gradients=True), derived).failed == []


def at_one_shape(name: str, gradients: bool) -> Subject:
    resolved = spec.resolve("attention", name)
    return Subject(name, lambda size, small: run._fitted(name, resolved, size, small), brief=True, gradients=gradients)


@pytest.mark.full
@pytest.mark.parametrize("name", kinds.one_of_each_kind())
def test_shelf(name):
    """Every property at every shape; commands of other tests ask for the verdict."""
    report = check(name)
    cache.keep(name, report.to_dict())
    assert report.passed, report.failed
    assert len(report.skipped) < len(PROPERTIES) / 2


# With attend_heads of their own, with attend, and with neither.
@pytest.mark.parametrize("name", ["predictive", "star", "talking_heads", "local", "linformer", "fnet"])
def test_catalogue_knows_who_takes_a_bias(name):
    (row,) = (row for row in shelves.shelf("attention") if row["name"] == name)
    assert row["bias"] == subject(spec.entry("attention", name)).takes_bias


# Options under which a mechanism is another algorithm: what the bare name proves says nothing of them.
OTHER_FORMS = [
    "linear:features=cosformer:chunk=5",
    "longformer:window=3:tokens=3:where=marked",
    "streaming:logit=learned:sinks=0:window=5",
]
MORE_FORMS = [
    "axial:axis=row",
    "axial:shape=3x4x6",
    "bigbird:block=5:heads=own",
    "fixed:stride=6:summary=2:heads=own",
    "gaussian:kind=distance",
    "gaussian:kind=layer",
    "image_local:form=2d:block=3x2:memory=2x1",
    "linear:features=dpfp:nu=2:chunk=5",
    "linear:features=hedgehog:chunk=5",
    "linear:features=relu:chunk=5",
    "linear:features=softmax:chunk=5",
    "linear:features=taylor:chunk=5",
    "linformer:share=keyvalue:rank=5",
    "linformer:share=none:rank=5",
    "capsules:routing=simple",
    "etc:radius=3:tokens=4:where=marked",
    "longformer:dilation=2:window=3:tokens=2",
    "longformer:dilation=2:window=3:tokens=3:where=marked:projections=shared",
    "mca:pool=mean",
    "performer:kernel=relu:features=5:chunk=5",
    "performer:rows=independent:features=5:chunk=5",
    "poolingformer:pool=max:window=3:reach=12",
    "rfa:gate=learned:features=5:chunk=5",
    "routing:local=0.5:normalised=true:clusters=4:window=9",
    "rfa:kernel=arccos:features=5:chunk=5",
    "synthesizer:kind=factorised_dense",
    "synthesizer:kind=factorised_random",
    "synthesizer:kind=random",
    "synthesizer:beside=random:dot=true",
    "synthesizer:kind=factorised_dense:beside=factorised_random:dot=true",
]
PROOFS = [
    values.equals_reference,
    values.same_gradients,
    masks.no_future,
    masks.no_padding,
    masks.nothing_to_see,
    masks.marks_in_time,
    costs.decoding,
]


@pytest.mark.full
@pytest.mark.parametrize("choice", [*OTHER_FORMS, *(pytest.param(form, marks=pytest.mark.slow) for form in MORE_FORMS)])
def test_other_forms(choice):
    resolved = spec.resolve("attention", choice)
    subject = Subject(choice, lambda size, small: run._fitted(choice, resolved, size, False))
    assert examine(subject, PROOFS).failed == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*spec.names("attention"), "local:window=1", "strided:stride=1", "axial:axis=row", "axial:axis=column"]
)
def test_shelf_at_many_shapes(name):
    assert check(name, deep=True).failed == []


def agrees(name: str, T: int, S: int, causal: bool, seed: int) -> None:
    """attend gives what reference gives on T queries and S keys, at a model built for them, with padding drawn."""
    resolved = spec.resolve("attention", name)
    one = Subject(name, lambda size, small: run._fitted(name, resolved, size, small), length=S)
    assume(causal in one.modes)
    case = Case(T, S, causal, biased=one.takes_bias, batch=2)
    assume(not one.refusal(case))
    valid, key = jnp.asarray(np.random.default_rng(seed).random((2, S)) < 0.7), jax.random.key(1)
    both = jax.jit(lambda params, inputs, valid: [
        one.forward(params, inputs, valid, key, causal=causal, method=method) for method in ("attend", "reference")
    ])  # fmt: skip
    with jax.default_matmul_precision("highest"):
        fast, slow = both(one.own, one.inputs(case, seed), valid)
    compare(np.asarray(fast), np.asarray(slow), 2e-5, f"{name} ({case})", "")


SHAPES = {"T": draw.integers(1, 40), "S": draw.integers(1, 40), "causal": draw.booleans(), "seed": draw.integers(0, 99)}
# Finding a smaller example would compile for minutes.
SEARCH = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=12, derandomize=True, **SEARCH)
@given(name=draw.sampled_from(spec.names("attention")), **SHAPES)
@pytest.mark.full
def test_shelf_at_a_few_drawn_shapes(name, T, S, causal, seed):
    agrees(name, T, S, causal, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names("attention"))
@settings(max_examples=40, **SEARCH)
@given(**SHAPES)
def test_shelf_at_drawn_shapes(name, T, S, causal, seed):
    agrees(name, T, S, causal, seed)


def test_a_whole_report_of_a_broken_mechanism(tmp_path):
    """One fault, every property: those about it fail, the others are still run, and a crash is a failed property."""
    path = tmp_path / "crashes.py"
    path.write_text(
        "from xformers_lab.attention.full import Full\n\n\n"
        'class Crashes(Full):\n    """Full (Vaswani et al., 2017)."""\n\n'
        "    def attend(self, q, k, v, *, valid=None, causal, bias=None, documents=None):\n"
        "        return q + missing\n"
    )
    report = check(str(path))
    failed = {failure.property: failure.message for failure in report.failed}
    assert not report.passed and "signature" not in failed and "state_size" not in failed
    assert (
        "NameError: name 'missing' is not defined" in failed["equals_reference"]
        and "crashes.py:8" in failed["equals_reference"]
    )
    assert report.to_dict()["failed"][0] == {"property": report.failed[0].property, "message": report.failed[0].message}


def test_a_refusal_is_an_exception_of_its_own():
    """Any other ValueError is a mistake; its message says how to refuse."""

    class Refuses(Plain):
        def reference(self, q, k, v, *, valid, causal, bias=None):
            raise Refused(f"it never runs, not with {len(k)} keys")

    class Stumbles(Plain):
        def reference(self, q, k, v, *, valid, causal, bias=None):
            raise ValueError("nor does it say so")

    case = Case(67, 67, True)
    assert subject(Refuses).refusal(case) == "it never runs, not with 67 keys"
    stumbles = subject(Stumbles)
    assert stumbles.refusal(case) is None

    def runs(subject):
        subject.forward(subject.own, subject.inputs(case), None, None, causal=True, method="attend")

    (failure,) = run.examine(stumbles, [runs]).failed
    assert "nor does it say so" in failure.message and "raise xformers_lab.errors.Refused" in failure.message


def test_options_are_shrunk_or_dropped_to_fit():
    """Windows and chunks are small beside the kit's lengths; an option tied to another length stops nothing."""
    built: Any = lambda text, small=True: run._fitted(text, spec.resolve("attention", text), run.Size(67, 32, 4), small)
    assert built("local").window == 5
    assert built("local:window=3").window == 3
    assert built("axial:shape=4x4:axis=row").axis == "row"
    assert built("local", small=False).window == 128
    assert [skip.property for skip in run._left_out("axial:shape=4x4", spec.parse("axial:shape=4x4"))] == ["options"]
    assert run._left_out("local:window=3", spec.parse("local:window=3")) == []


@pytest.mark.parametrize("error, expected", [("Refused", UsageError), ("ValueError", BrokenChoice)])
def test_what_the_users_own_file_raises(tmp_path, error, expected):
    """A refusal is bad input and says no more than its message; any other exception says where it comes from."""
    path = tmp_path / "own.py"
    path.write_text(
        "from xformers_lab.depth.fixed import Fixed\nfrom xformers_lab.errors import Refused\n\n\n"
        'class Own(Fixed):\n    """Fixed (Vaswani et al., 2017)."""\n\n'
        f'    def __call__(self, x, context, *, key=None):\n        raise {error}("not of such inputs")\n'
    )
    with pytest.raises(UsageError, match="not of such inputs") as caught:
        check_config(edit(Config(), task="copy", depth=str(path), seq_len=16, dim=8, heads=2))
    assert type(caught.value) is expected and ("own.py" in str(caught.value)) == (expected is BrokenChoice)


HEAD = '''
import jax
import jax.numpy as jnp
from xformers_lab.attention import Complexity, Cost, OneHead


class {name}(OneHead):
    """Softmax attention (Vaswani et al., 2017)."""

    kind = "full"
    complexity = Complexity("O(T S H)", "O(T S)")

    def cost(self, T, S):
        return Cost(flops=4 * T * S * self.size.head, memory=T * S, state=2 * S * self.size.head)

'''
ATTEND = """
    def attend(self, q, k, v, *, valid, causal, bias=None):
        T, S = len(q), len(k)
        scores = q @ k.T / q.shape[-1] ** 0.5 + 2 * jnp.sin(jnp.arange(S)) * {places}
        seen = jnp.arange(S) <= S - T + jnp.arange(T)[:, None] + {late}
        seen = valid & (seen | (not causal))
        return jax.nn.softmax(jnp.where(seen, scores, -1e30)) * seen @ v

"""
SLOW = "    reference = attend\n"


def report_on(tmp_path, name: str, body: str, properties: list[str] | None = None) -> run.Report:
    """The kit's report on a file of one's own, of some properties alone."""
    path = tmp_path / f"{name.lower()}.py"
    path.write_text(HEAD.format(name=name) + body)
    if properties is None:
        return check(str(path))
    resolved = spec.resolve("attention", str(path))
    subject = Subject(str(path), lambda size, small: run._fitted(str(path), resolved, size, small))
    return examine(subject, [holds for holds in PROPERTIES if holds.__name__ in properties])


def printed(report: run.Report) -> str:
    file = io.StringIO()
    pages.print_checks([report.to_dict()], Console(file=file, width=1000))
    return file.getvalue()


def test_one_mistake_is_printed_once(tmp_path):
    body = "    def attend(self, q, k, v, *, valid, causal, bias=None):\n        return jnp.dot(q, k)\n\n"
    report = report_on(tmp_path, "Typo", body + SLOW)
    assert len(report.failed) > 10
    text = printed(report)
    assert text.count("TypeError") == 1 and text.count("typo.py:") == 1
    assert "; the same in " in text and " more" in text


def test_a_missing_method_is_one_failure(tmp_path):
    """What cannot be asked without it does not apply, and everything else is asked."""
    without = {"equals_reference", "same_gradients", "several_blocks", "shortest", "auxiliary"}
    report = report_on(tmp_path, "Alone", ATTEND.format(places=0, late=0), [*without, "signature", "no_padding"])
    assert [str(failure) for failure in report.failed] == ["signature"]
    assert "Alone must define reference" in report.failed[0].message
    assert {skip.property for skip in report.skipped} == without
    report = report_on(tmp_path, "Empty", "    pass\n")
    assert [str(failure) for failure in report.failed] == ["signature"] and len(report.skipped) == len(PROPERTIES) - 1
    assert "Empty must define attend" in report.failed[0].message


def test_a_leak_of_the_future_comes_first(tmp_path):
    named = ["signature", "end_aligned", "no_future", "decoding"]
    report = report_on(tmp_path, "Leaks", ATTEND.format(places=0, late=1) + SLOW, named)
    assert str(report.failed[0]) == "no_future"
    (decoding,) = (failure for failure in report.failed if failure.property == "decoding")
    assert "mend that first" in decoding.message


def test_what_depends_on_absolute_positions_is_told_what_to_declare(tmp_path):
    body = ATTEND.format(places=1, late=0) + SLOW
    (failure,) = report_on(tmp_path, "Placed", body, ["no_future", "decoding"]).failed
    assert failure.property == "decoding"
    for words in ("absolute positions", "Recurrent", 'refuses = {"decoding":'):
        assert words in failure.message
    declared = '    refuses = {"decoding": "it depends on absolute positions"}\n' + body
    report = report_on(tmp_path, "Declared", declared, ["decoding"])
    assert report.passed and "absolute positions" in report.skipped[0].reason
    assert "passes" in printed(report) and "not applicable: decoding (" in printed(report)


def test_an_exit_of_the_checked_file_is_a_failed_property(tmp_path):
    body = "    def attend(self, q, k, v, *, valid, causal, bias=None):\n        raise SystemExit(3)\n\n"
    report = report_on(tmp_path, "Exits", body + SLOW, ["equals_reference", "no_padding"])
    assert "SystemExit: 3" in report.failed[0].message and "exits.py:" in report.failed[0].message
