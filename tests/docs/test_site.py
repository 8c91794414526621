"""The site: every choice has its page and its place on the map, and nothing in it asks the network for anything."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

from xformers_lab import spec
from xformers_lab.attention import KINDS
from xformers_lab.experiment import variants

EXTRA = ("mkdocs", "material", "mkdocstrings")


@pytest.fixture
def module(monkeypatch):
    """module(name): a module of docs/site."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("plain", "shown"),
    [
        ("out_t = sum_s v_s", "out<sub>t</sub> = ∑<sub>s</sub> v<sub>s</sub>"),
        ("q_t . k_s / sqrt(H)", "q<sub>t</sub> · k<sub>s</sub> / √(H)"),
        ("S_(t-1) <- a^2, s <= t", "S<sub>t-1</sub> ← a<sup>2</sup>, s ≤ t"),
        ("k_t v_t^T", "k<sub>t</sub> v<sub>t</sub><sup>T</sup>"),
        ("phi(x)_i of lambda_init", "&phi;(x)<sub>i</sub> of &lambda;<sub>init</sub>"),
        ("the sum of low_rank_band", "the sum of low_rank_band"),
        ("position=learned <b>", "position=learned &lt;b&gt;"),
        (
            "`a_t <= b`, arXiv 1706.03762",
            '<code>a_t &lt;= b</code>, <a href="https://arxiv.org/abs/1706.03762">arXiv 1706.03762</a>',
        ),
    ],
)
def test_formulas(module, plain, shown):
    assert module("typeset").inline(plain) == shown


def test_docstrings_keep_every_word(module):
    """Formulas are printed otherwise, and nothing is lost on the way: not a line, and no tag of the docstring's own."""
    typeset = module("typeset")
    text = "Title <i>.\n\n    y = x_1    (B, T)\n    z = y\n\nOne\n    more.\nTwo.\n\nOptions:\n    width: of it"
    assert typeset.docstring(text) == (
        "<p>Title &lt;i&gt;.</p>\n\n"
        '<p class="equation lines">    y = x<sub>1</sub>    (B, T)\n    z = y</p>\n\n'
        "<p>One more.<br>Two.</p>"
    )


def test_every_shelf_and_kind_has_a_branch(module, monkeypatch):
    survey = module("survey")
    survey.check()
    monkeypatch.setattr(survey, "BRANCHES", [each for each in survey.BRANCHES if each.get("kind") != KINDS[3]])
    with pytest.raises(ValueError, match=f"no branch for {KINDS[3]}"):
        survey.check()


def test_a_page_says_what_the_file_says(module, monkeypatch):
    monkeypatch.setattr(module("choices").cache, "known", lambda name: None)
    page = module("choices").page("attention", "local")
    assert "Sliding-window attention" in page and "| `window` | `128` | keys seen on each side of a query" in page
    assert "| `no_future` | Under causality" in page and "knows no verdict" in page
    assert "| local w=128 causal N=4096 |" in page.partition("## Timings")[2]  # the case of benchmarks/results
    assert "sub>t</sub>" in page and "Options:" not in page


def test_a_page_has_the_rows_of_experiments(module, monkeypatch):
    claims = module("claims")
    of = lambda name, choice, mean: variants.Variant(
        "copy", "copy (chance 0.100)", name, 64, {"attention": choice}, "accuracy", mean, 0.01, 3, {"state_bytes": 2048}
    )
    known = [of("local|16", "local:window=16", 0.5), of("mixed", "full+local", 0.75), of("full", "full", 1.0)]
    monkeypatch.setattr(claims, "_variants", lambda: {"reach": known})
    section = claims.section("attention", "local")
    assert "[reach](../../results.md#reach), copy: copy (chance 0.100):" in section
    assert r"| local\|16 | 64 | 0.500 ± 0.010 | 3 | 2 KiB |" in section and "| mixed |" in section
    assert "| full |" not in section and not claims.section("norm", "local")
    assert "## In experiments" in module("choices")._experiments("attention", "full")


def test_a_verdict_stands_on_the_page(module, monkeypatch):
    verdict = {
        "passed": False,
        "error": 1e-6,
        "failed": [{"property": "no_future", "message": "leaks"}],
        "skipped": [{"property": "carried", "reason": "it carries nothing"}],
    }
    monkeypatch.setattr(module("choices").cache, "known", lambda name: verdict)
    page = module("choices").page("attention", "local")
    assert "**fails**, largest difference from the reference 1.0e-06" in page
    ends = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page.partition("## Conformance")[2], re.M))
    assert ends["no_future"] == "fails" and ends["no_padding"] == "holds"
    assert ends["carried"] == "does not apply: it carries nothing"


@pytest.mark.full
def test_what_is_drawn_is_what_moves(module):
    """Of a mechanism without a fixed pattern the picture is measured: a causal one leaves the upper triangle blank."""
    import numpy as np

    pictures = module("pictures")
    changes, causal = pictures._changes_of_layer("gla")
    assert causal and not np.triu(changes, 1).any() and (np.diag(changes) > 0).all()
    shades = pictures._shaded(changes)
    assert np.sum([seen for _, seen in shades], 0).max() == 1  # a square has one shade


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: pip install 'xformers_lab[docs]'")
    folder = tmp_path_factory.mktemp("site")
    of_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")  # without them it is what `make site` does
    environment = {key: value for key, value in os.environ.items() if key not in of_tests}
    environment |= {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_choice_has_its_page(site):
    for shelf in spec.SHELVES:
        assert {file.stem for file in (site / "choices" / shelf).glob("*.html")} == {"index", *spec.names(shelf)}
    map_page = (site / "survey.html").read_text()
    for shelf in set(spec.SHELVES) - {"task", "optimizer"}:
        for name in spec.names(shelf):
            assert f'href="choices/{shelf}/{name}.html"' in map_page


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_nothing_is_fetched(site):
    """What a page loads stands in the folder; a link that a reader may follow is no request. All Markdown is read."""
    loads = re.compile(r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?(?:src|data)=[\"']?([^\"'\s>]+)")
    links = re.compile(r"<link\b[^>]*>")
    for page in site.rglob("*.html"):
        text = page.read_text()
        found = loads.findall(text)
        found += [
            re.findall(r"href=[\"']?([^\"'\s>]+)", link)[0] for link in links.findall(text) if "canonical" not in link
        ]
        assert found, page
        for target in found:
            assert not re.match(r"(\w+:)?//", target), f"{page}: {target}"
            if not target.startswith("data:") and page.name != "404.html":
                assert (page.parent / target.partition("?")[0].partition("#")[0]).exists(), f"{page}: {target}"
        assert "```" not in text, f"{page}: a block that is not read as one"
        assert 'class="mermaid"' not in text, f"{page}: the theme fetches what draws such a diagram"
    for style in site.rglob("*.css"):
        text = style.read_text()
        assert not re.search(r"url\([\"']?(?:https?:)?//", text) and "@import" not in text, style


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_search_works_from_a_folder(site, tmp_path):
    """A browser finds a page of the folder without a server, and says in its console that nothing is missing."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync")
    flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", *quiet, "virtual-time-budget=20000")
    flags = (*flags, "host-resolver-rules=MAP * ~NOTFOUND", "enable-logging=stderr", "dump-dom")
    command = [chromium, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path}"]
    command += [f"{(site / 'survey.html').as_uri()}?q=nystromformer"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in seen.stderr, seen.stderr[-2000:]
    results = seen.stdout.partition("md-search-result__list")[2]
    assert "choices/attention/nystrom.html" in results
