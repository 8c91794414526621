"""What mechanisms declare in class attributes: the catalogue says it, and no docstring decides it."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from xformers_lab import shelves, spec
from xformers_lab.attention import Attention, Complexity
from xformers_lab.attention._base.refusals import NO_MASK
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Refuses nearly everything, no causality, one way, keys alone; options that decide; nothing.
SOME = ("fnet", "csalr", "gla", "linformer", "full", "axial", "star")
CAPABILITIES = """
import json
from xformers_lab import shelves, spec
from xformers_lab.attention import why_not_decode

assert False, "python -OO drops this line"
facts = {}
for name in %r:
    kind = spec.entry("attention", name)
    facts[name] = [kind.__doc__, shelves._abilities(kind), dict(kind.refuses), why_not_decode(kind)]
print(json.dumps(facts))
"""


def built(choice: str) -> Attention:
    return spec.build("attention", choice, Size(16, dim=16, heads=2))


def without_docstrings(*words: str) -> str:
    done = subprocess.run([sys.executable, "-OO", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_capabilities_are_the_same_without_docstrings():
    from xformers_lab.attention import why_not_decode

    for name, (text, *rest) in json.loads(without_docstrings("-c", CAPABILITIES % (SOME,))).items():
        kind = spec.entry("attention", name)
        assert text is None
        assert rest == [shelves._abilities(kind), dict(kind.refuses), why_not_decode(kind)]


def test_the_catalogue_lists_mechanisms_without_docstrings():
    apart = ("title", "error")  # text, and what the kit found last
    rows = json.loads(without_docstrings("-m", "xformers_lab", "list", "attention", "--json"))
    plain = lambda row: {key: value for key, value in row.items() if key not in apart}
    assert [plain(row) for row in rows] == [plain(row) for row in shelves.shelf("attention")]
    assert {row["title"] for row in rows} == {""}


def test_a_page_without_docstrings_has_the_facts():
    page = json.loads(without_docstrings("-m", "xformers_lab", "show", "local", "--json"))
    assert page["about"].startswith(
        "Kind: sparse by position.\nTime O(T (window + tokens) H); memory O(S H); decoding "
    )
    assert {option["name"]: option["help"] for option in page["options"]} == {"window": "", "tokens": ""}


@pytest.mark.parametrize("name", spec.names("attention"))
def test_every_mechanism_of_the_shelf_declares_itself(name):
    kind = spec.entry("attention", name)
    assert kind.kind and kind.exact is not None and isinstance(kind.complexity, Complexity)
    assert kind.complexity.time.startswith("O(") and kind.complexity.memory.startswith("O(")
    assert bool(kind.complexity.decoding) or not shelves._abilities(kind)["decode"]
    # An attribute that an option of the same name hides would tell the lab of the option.
    layer = built(name)
    assert not {"kind", "exact", "accuracy", "complexity", "refuses"} & vars(layer).keys()


def test_a_page_puts_what_is_declared_between_formula_and_notes():
    paragraphs = shelves.page("fnet", ["seq_len=16"])["about"].split("\n\n")
    assert paragraphs[0].startswith("FNet, token mixing") and paragraphs[1].startswith("y = Re(F_T x F_D)")
    assert paragraphs[2].split("\n") == [
        "Kind: without attention.",
        "Time O(T D log(T D)), with no products of matrices; memory O(T D); decoding keeps nothing, there is none.",
        "Exact.",
        "Not causal: every output is a sum over all positions.",
        "Not cross: one sequence is transformed; there are no queries to another.",
        "No bias: it has no scores.",
        "Not packed: it mixes positions, and has no mask between documents.",
        "No attention map: its transform mixes channels as well as positions.",
    ]
    assert paragraphs[3].startswith("Padding is zeros to the transform")


def test_what_an_option_decides_is_refused_with_that_option_alone():
    assert "causal" not in built("reformer").refusals()
    assert built("reformer:across=chunk").refusals() == {
        "cross": "queries are the keys",
        "causal": "which tokens share a chunk depends on later ones",
        "documents": NO_MASK,
    }
    assert built("rfa").refusals().keys() == {"documents"}
    assert built("rfa:gate=learned").refusals().keys() == {"bidirectional", "documents"}
    page = shelves.page("reformer:across=chunk", ["seq_len=16"])
    assert "Not causal: which tokens share a chunk depends on later ones." in page["about"]
    assert not page["can"]["causal"] and not page["can"]["decode"]


def test_documents_are_kept_apart_by_what_says_so_and_by_no_subclass_that_computes_something_else():
    full = spec.entry("attention", "full")

    class Renamed(full):
        """The same."""

    class Mixing(full):
        """More than its base class computes."""

        def attend_heads(self, call):
            return super().attend_heads(call)

    class Forgetful(full):
        """Another head, which has no place for documents."""

        def attend(self, q, k, v, *, valid=None, causal, bias=None):
            return v

    assert full.accepts("documents") and Renamed.accepts("documents")
    assert not Mixing.accepts("documents") and not Forgetful.accepts("documents")
    refused = Forgetful(built("full").size, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, refused.size.length, refused.size.dim))
    with pytest.raises(Refused, match="forgetful cannot keep the documents of packed data apart"):
        refused(x, documents=jnp.zeros(x.shape[:2], jnp.int32))


def test_a_subclass_inherits_what_it_does_not_declare():
    class Narrow(spec.entry("attention", "gla")):
        """Gated linear attention (Yang et al., 2023), and less of it."""

        exact = False

    assert Narrow.refuses == spec.entry("attention", "gla").refuses and "bidirectional" in Narrow.refuses
    assert Narrow.kind == "linearised" and shelves._abilities(Narrow)["nature"] == "approximate"


@pytest.mark.parametrize(
    "body, message",
    [
        ("class Mine(Attention):\n    def attend(self, q, k, v, *, valid): ...", "its base class is OneHead"),
        (
            "class Mine(OneHead):\n    def __call__(self, x, memory=None, **options): ...",
            "say projects = False",
        ),
    ],
)
def test_a_class_whose_base_says_otherwise_is_refused(body, message):
    with pytest.raises(TypeError, match=message):
        exec(f"from xformers_lab.attention import Attention, OneHead\n{body}", {})
