"""Every choice passes the kit of its shelf, and each planted fault breaks the property that is about it."""

import importlib

import kinds
import pytest

from xformers_lab import spec
from xformers_lab.check import inside, run
from xformers_lab.check.kits import depth
from xformers_lab.check.tiny import Inside
from xformers_lab.cli import main
from xformers_lab.errors import UsageError

KITS = [shelf for shelf in run.kits() if shelf != "attention"]


CHOICES = [(shelf, name) for shelf in KITS for name in spec.names(shelf)]
INSIDE = [(shelf, name) for shelf, name in CHOICES if shelf != "optimizer"]


@pytest.mark.parametrize("shelf, name", kinds.every_third(INSIDE, pytest.mark.brief, None))
def test_shelf_in_brief(shelf, name):
    """No leak of the future or of padding, decoding: what decides, in seconds."""
    subject = importlib.import_module(f"xformers_lab.check.kits.{shelf}").subject(name)
    assert run.examine(subject, [inside.no_future, inside.no_padding, inside.decoding]).failed == []


@pytest.mark.full
@pytest.mark.parametrize("shelf, name", kinds.every_third(CHOICES))
def test_shelf(shelf, name):
    report = run.check(name, shelf)
    assert report.passed, [f"{failure}: {failure.message}" for failure in report.failed]


@pytest.mark.full
@pytest.mark.parametrize("name", kinds.every_third(spec.names("depth")))
def test_mechanisms_in_turn_decode_in_every_depth(name):
    """A last period that is not whole, where the depth allows that; one that has mechanisms of its own says so."""
    words = {"depth": name, "attention": "linear+full", "position": "rope"}
    try:
        hybrid = Inside("depth", name, words, layers=(3, 4))
    except UsageError as reason:
        assert "use attention=" in str(reason)
        return
    if hybrid.model.causal:
        inside.decoding(hybrid)


@pytest.mark.full
@pytest.mark.parametrize("choice", [
    "early_exit:threshold=0.2", "early_exit:exit=patience:patience=1", "universal:act=true", "feedback:segment=5",
    "mixture_of_depths:capacity=0.5", "hourglass:factor=3:shorten=linear:upsample=linear",
    "hierarchical:top=1:back=token:pool=attention:numbered=true", "hierarchical:top=1",
])  # fmt: skip
def test_options_that_make_another_program(choice):
    report = run.examine(depth.subject(choice), [inside.no_future, inside.no_padding, inside.decoding])
    assert report.passed and not report.skipped, report.failed


HEAD = """
import dataclasses
import jax
import jax.numpy as jnp
from flax import nnx
from xformers_lab.ffn import Ffn
from xformers_lab.norm import Norm
from xformers_lab.position import Position
from xformers_lab.nn.aux_results import Aux
from xformers_lab.depth.fixed import Fixed
"""
# A feed-forward layer that reads the position before, and is right but for what stands behind it.
BEHIND = """
from xformers_lab.nn.token_shift import one_before
class Behind(Ffn):
    looks_back, documents_apart = True, True
    def __init__(self, size, *, rngs):
        self.dim, self.down = size.dim, nnx.Linear(size.dim, size.dim, rngs=rngs)
    def __call__(self, x, *, valid=None, key=None, documents=None):
        return self.down(one_before(x, valid=valid, documents=documents)), Aux()
    def init_cache(self, B, dtype=jnp.float32):
        return jnp.zeros((B, self.dim), dtype)
    def step(self, x, cache):
        return self.down(cache), x
"""
# The shelf and the property, and a class with a fault.
FAULTS = {
    "looks ahead": ("ffn", "no_future", """
class Fault(Ffn):
    def __init__(self, size, *, rngs):
        self.down = nnx.Linear(size.dim, size.dim, rngs=rngs)
    def __call__(self, x, *, valid=None, key=None):
        return self.down(x.max(1, keepdims=True) + 0 * x), Aux()
"""),
    "sums padding": ("ffn", "no_padding", """
class Fault(Ffn):
    def __init__(self, size, *, rngs):
        self.down = nnx.Linear(size.dim, size.dim, rngs=rngs)
    def __call__(self, x, *, valid=None, key=None):
        return self.down(jnp.cumsum(x, 1)), Aux()
"""),
    "says that documents are apart, and adds up over them": ("ffn", "documents_apart", """
class Fault(Ffn):
    documents_apart = True
    def __init__(self, size, *, rngs):
        self.down = nnx.Linear(size.dim, size.dim, rngs=rngs)
    def __call__(self, x, *, valid=None, key=None):
        return self.down(jnp.cumsum(x, 1)), Aux()
"""),
    "looks back and does not say so": ("ffn", "looks_back", BEHIND + """
class Fault(Behind):
    looks_back = False
"""),
    "says that it looks back, and does not": ("ffn", "looks_back", BEHIND + """
class Fault(Behind):
    def __call__(self, x, *, valid=None, key=None, documents=None):
        return self.down(x), Aux()
"""),
    "looks back over documents": ("ffn", "documents_apart", BEHIND + """
class Fault(Behind):
    documents_apart = True
    def __call__(self, x, *, valid=None, key=None, documents=None):
        return super().__call__(x, valid=valid)
"""),
    "looks back at padding": ("ffn", "no_padding", BEHIND + """
class Fault(Behind):
    def __call__(self, x, *, valid=None, key=None, documents=None):
        return super().__call__(x)
"""),
    "forgets the token before": ("ffn", "decoding", BEHIND + """
class Fault(Behind):
    def step(self, x, cache):
        return self.down(cache), cache
"""),
    "reads several tokens as if there were none before": ("ffn", "goes_on", BEHIND + """
class Fault(Behind):
    def step_several(self, x, cache):
        return self(x)[0], x[:, -1]
"""),
    "goes back to the newest token": ("ffn", "goes_on", BEHIND + """
class Fault(Behind):
    def rewound(self, before, after, taken, *, read):
        return after
"""),
    "goes by places and does not say so": ("position", "distances", """
class Fault(Position):
    def bias(self):
        return Score(jnp.ones(self.size.heads))
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
    slope: jax.Array
    def __call__(self, q_at, k_at):
        return self.slope * jnp.sin(q_at + 2.0 * k_at)
"""),
    "tells samples of one another": ("norm", "samples_apart", """
class Fault(Norm):
    def before(self, x, context):
        return x - x.mean(0, keepdims=True)
"""),
    "moves in evaluation": ("norm", "evaluation_keeps_state", """
class Fault(Norm):
    def __init__(self, size, *, rngs):
        self.seen = nnx.Variable(jnp.zeros(()))
    def after(self, x, y, context):
        self.seen[...] += 1
        return x + y
"""),
    "has a parameter that nothing uses": ("position", "trains", """
class Fault(Position):
    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(jnp.ones((size.length, size.dim)))
"""),
    "counts from the first row it is given": ("position", "decoding", """
class Fault(Position):
    def embed(self, x, at, *, valid=None):
        return x + (0.1 * jnp.arange(x.shape[1])[:, None] * jnp.arange(x.shape[2])).astype(x.dtype)
"""),
    "widens the type": ("position", "half_precision", """
class Fault(Position):
    def embed(self, x, at, *, valid=None):
        return x + 0.1 * at[:, None].astype("float32")
"""),
    "counts rows where it should look at positions": ("position", "from_indices", """
class Fault(Position):
    def bias(self):
        return Score(jnp.ones(self.size.heads))
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
    slope: jax.Array
    def __call__(self, q_at, k_at):
        return -self.slope * jnp.abs(jnp.arange(q_at.shape[-2])[:, None] - k_at)
"""),
    "marks embeddings and does not say so": ("position", "declared", """
class Fault(Position):
    def embed(self, x, at, *, valid=None):
        return x + (0.1 * jnp.sin(at)[:, None]).astype(x.dtype)
"""),
    "normalises the sum and does not say so": ("norm", "declared", """
class Fault(Norm):
    def after(self, x, y, context):
        return self.normalise(x + y, context)
"""),
    "says nothing of an option": ("depth", "documented", """
class Fault(Fixed):
    '''A depth (Somebody, 2026).'''
    def __init__(self, size, *, share: float = 0.5, make_block, period, rngs):
        super().__init__(size, make_block=make_block, period=period, rngs=rngs)
"""),
    "says nothing of what it spent": ("depth", "computation", """
class Fault(Fixed):
    def __call__(self, x, context, *, key=None):
        return super().__call__(x, context, key=key)[0], Aux()
"""),
    "draws from elsewhere than the key": ("position", "drawn", """
import numpy as np
class Fault(Position):
    embeds = True
    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.first = nnx.Variable(jnp.zeros(()))
    def drawn(self, key):
        other = nnx.clone(self)
        other.first[...] = np.random.default_rng().random()
        return other
    def embed(self, x, at, *, valid=None):
        return x + (0.1 * jnp.sin(at + self.first[...])[:, None]).astype(x.dtype)
"""),
    "keeps what it drew": ("position", "drawn", """
class Fault(Position):
    embeds = True
    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.first = nnx.Variable(jnp.zeros(()))
    def drawn(self, key):
        self.first[...] = jax.random.uniform(key)
        return self
    def embed(self, x, at, *, valid=None):
        return x + (0.1 * jnp.sin(at + self.first[...])[:, None]).astype(x.dtype)
"""),
    "adds waves as large as the tokens": ("position", "unit_size", """
class Fault(Position):
    embeds = True
    def embed(self, x, at, *, valid=None):
        waves = jnp.sin(at[:, None] / (1 + jnp.arange(x.shape[-1])))
        return x + (2**0.5 * waves).astype(x.dtype)
"""),
    "grows with the position": ("position", "unit_size", """
class Fault(Position):
    embeds = True
    def embed(self, x, at, *, valid=None):
        return x + (0.02 * at[:, None]).astype(x.dtype)
"""),
    "adds a vector that it draws small, and no more": ("position", "unit_size", """
from xformers_lab.nn.embedding import marked
class Fault(Position):
    embeds = True
    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size.length, size.dim)), decays=False)
    def embed(self, x, at, *, valid=None):
        return marked(x, self.table[at])
"""),
    "makes tokens larger": ("depth", "unit_size", """
class Fault(Fixed):
    def __call__(self, x, context, *, key=None):
        return super().__call__(50 * x, context, key=key)
"""),
    "adds to the tokens": ("depth", "unit_size", """
class Fault(Fixed):
    def __call__(self, x, context, *, key=None):
        return super().__call__(x + jnp.ones_like(x), context, key=key)
"""),
    "draws without a key": ("ffn", "computed_again", """
import numpy as np
class Fault(Ffn):
    def __init__(self, size, *, rngs):
        self.down = nnx.Linear(size.dim, size.dim, rngs=rngs)
    def __call__(self, x, *, valid=None, key=None):
        share = jax.pure_callback(lambda: np.float32(np.random.rand()), jax.ShapeDtypeStruct((), "float32"))
        return (share * self.down(x)).astype(x.dtype), Aux()
"""),
    "keeps all that its layers gave": ("depth", "computes_again", """
from xformers_lab.depth import Depth
class Fault(Depth):
    def __init__(self, size, *, make_block, period, rngs):
        self.blocks = nnx.List(make_block(index, rngs) for index in range(size.layers))
    def __call__(self, x, context, *, key=None):
        for block in self.blocks:
            x, _, aux = block(x, {}, context, key=key)
        return x, aux
"""),
    "has gains that decay": ("depth", "matrices_decay", """
class Fault(Fixed):
    def __init__(self, size, *, make_block, period, rngs):
        super().__init__(size, make_block=make_block, period=period, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((size.heads, size.head)))
    def __call__(self, x, context, *, key=None):
        x, aux = super().__call__(x, context, key=key)
        return x * self.scale[...].reshape(-1).astype(x.dtype), aux
"""),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", kinds.every_third(spec.names("depth")))
def test_a_layer_that_looks_back_goes_on_in_every_depth(name):
    """What it keeps stands beside attention's cache; or the depth refuses it."""
    words = {"depth": name, "ffn": "rwkv", "position": "rope"}
    if name in ("feedback", "binary_partition"):
        with pytest.raises(UsageError, match="ffn=rwkv looks back"):
            Inside("depth", name, words, layers=(3, 4))
        return
    properties = [inside.no_future, inside.no_padding, inside.documents_apart, inside.decoding, inside.trains]
    report = run.examine(Inside("depth", name, words, layers=(3, 4), both=True), properties)
    assert report.failed == []
    if name not in ("distilling", "funnel", "mask_decoder", "retrospective"):  # encoders' own
        assert "decoding" not in {skip.property for skip in report.skipped}


@pytest.mark.full
def test_a_layer_that_looks_back_and_is_right_passes(tmp_path):
    path = tmp_path / "behind.py"
    path.write_text(HEAD + BEHIND)
    kit = importlib.import_module("xformers_lab.check.kits.ffn")
    properties = [
        inside.no_future,
        inside.no_padding,
        inside.documents_apart,
        inside.decoding,
        kit.looks_back,
        kit.goes_on,
    ]
    report = run.examine(kit.subject(str(path)), properties)
    assert report.passed and not report.skipped, report.failed


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_its_property(tmp_path, fault):
    shelf, property, source = FAULTS[fault]
    path = tmp_path / "fault.py"
    path.write_text(HEAD + source)
    kit = importlib.import_module(f"xformers_lab.check.kits.{shelf}")
    (holds,) = [one for one in kit.PROPERTIES if one.__name__ == property]
    report = run.examine(kit.subject(str(path)), [holds])
    assert [failure.property for failure in report.failed] == [property] and "Error" not in report.failed[0].message


def test_a_mistake_is_a_failure_and_a_refusal_too(tmp_path):
    """With its reason or line; where one of two models refuses, the other is looked at."""
    path = tmp_path / "crashes.py"
    path.write_text(HEAD + "class Crashes(Ffn):\n    def __init__(self, size, *, rngs):\n        missing()\n")
    report = run.check(str(path), "ffn")
    assert not report.passed and "NameError: name 'missing'" in report.failed[0].message
    both = Inside("position", "conv:width=4", {"position": "conv:width=4"}, both=True)
    assert [model.causal for model in both.models] == [True] and "odd" in str(both.refusals["encoder"])
    report = run.check("funnel:blocks=9", "depth")
    assert not report.passed and "are no funnel" in report.failed[0].message


@pytest.mark.parametrize("text, found", [
    ("rezero", ("norm", "rezero")),
    ("depth/fixed", ("depth", "fixed")),
    ("position/xl:base=100", ("position", "xl:base=100")),
    ("position=xl:base=100", ("position", "xl:base=100")),
    ("xformers_lab.depth.universal:act=true", ("depth", "xformers_lab.depth.universal:act=true")),
])  # fmt: skip
def test_a_choice_finds_its_shelf(text, found):
    assert spec.home(text) == found


def test_a_file_says_by_its_class_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm").mkdir()
    for name in ("mine.py", "norm/mine.py"):
        (tmp_path / name).write_text(HEAD + "class Mine(Fixed):\n    pass\n")
        assert spec.home(name) == ("depth", name)
    assert spec.home("depth/mine.py") == ("depth", "mine.py")
    (tmp_path / "plain.py").write_text("def plain(size):\n    pass\n")
    with pytest.raises(UsageError, match=r"normaliser/plain\.py"):
        spec.home("plain.py")


@pytest.mark.parametrize("word, message", [
    ("fixed", "write attention/fixed or depth/fixed"),
    ("rezro", 'did you mean "rezero"'),
    ("norm/rezro", 'did you mean "rezero"'),
    ("model/lstm", 'shelf "model" has no kit; there are kits of attention, depth, ffn'),
    ("nowhere/mine.py", "no file"),
])  # fmt: skip
def test_what_cannot_be_checked_is_one_clear_message(capsys, word, message):
    assert main(["check", word]) == 2
    assert message in capsys.readouterr().err


def test_check_from_the_command_line(capsys, monkeypatch, inline):
    """One choice, or a whole shelf by its name."""
    checked = []

    def check(name, shelf, *, deep, doing):
        checked.append((shelf, name))
        return run.Report(name, name != "dyt", [], [], 0.0)

    monkeypatch.setattr(run, "check", check)
    assert main(["check", "rezero", "--json"]) == 0
    assert '"passed": true' in capsys.readouterr().out
    assert main(["check", "normaliser"]) == 1
    assert checked == [("norm", "rezero"), *(("normaliser", name) for name in spec.names("normaliser"))]
