"""Maps of whole models: exact where there are scores, labelled by their tokens, and drawn without harm."""

import functools
import json
import re
import xml.etree.ElementTree
from html import unescape

import jax
import numpy as np
import pytest
from browser import browsed
from report_rows import PAYLOAD, PAYLOADS
from stored_runs import stored

from xformers_lab.attention_maps import page, picture, reading, table
from xformers_lab.attention_maps.maps import AttentionMaps
from xformers_lab.cli import main
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.measure import maps as measured
from xformers_lab.model import build_model, build_task
from xformers_lab.report import offline
from xformers_lab.tasks import Batch
from xformers_lab.train import trained

T = 12


@functools.cache  # the programs of a model that is the same are compiled once
def model_of(task: str = "copy", **changes):
    sizes = {"seq_len": T, "dim": 16, "heads": 2, "layers": 2, "batch": 2, "position": "none"}
    config = edit(Config(), task=task, **(sizes | changes))
    task_ = build_task(config)
    return build_model(config, task_), task_, config


def made(weights: np.ndarray, tokens=None, *, name="full", causal=True, real=None, **more) -> AttentionMaps:
    """Maps of weights (L, N, T, T), without a model."""
    L, N, T = weights.shape[:3]
    tokens = tokens or [f"t{at}" for at in range(T)]
    real = np.ones(T, bool) if real is None else real
    about = {"implied": [False] * L, "norms": None, "part": "self", "layers": [*range(1, L + 1)]} | more
    heads = about.pop("heads", [*range(1, N + 1)])
    return AttentionMaps(
        weights.astype(np.float32), tokens, tokens, real, real, causal, name=name, heads=heads, **about
    )


def drawn(seed: int = 0, L: int = 2, N: int = 3, T: int = 5) -> np.ndarray:
    """Causal softmaxes (L, N, T, T)."""
    scores = np.random.default_rng(seed).normal(size=(L, N, T, T)) + np.where(np.tri(T, dtype=bool), 0, -np.inf)
    weights = np.exp(scores)
    return weights / weights.sum(-1, keepdims=True)


# ---- reading ----------------------------------------------------------------------------------------------------


TEXT = "1 2 3 4 5 6 7"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_a_text_has_the_weights_of_the_definition(dtype):
    """By queries and keys of the layer, of a text shorter than what the model was built for; and what heads add is
    what adds up to the layer's output."""
    model, task, _ = model_of(layers=1, dtype=dtype)
    found = reading.of_text(model, task, TEXT)
    assert found.weights.shape == (1, 2, 7, 7) and found.tokens == TEXT.split() and found.causal
    calls = []
    with measured.watched(lambda layer, call: calls.append((layer, call))):
        model(jax.numpy.array([task.encode(TEXT)]))
    ((layer, call),) = calls
    q, k, v = (np.asarray(y[0], np.float32) for y in (call.q, call.k, call.v))
    scores = np.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    wanted = np.asarray(jax.nn.softmax(np.where(np.tri(7, dtype=bool), scores, -np.inf), -1))
    # A program may keep more than 16 bits between two steps, which the same steps one by one do not.
    np.testing.assert_allclose(found.weights[0], wanted, atol=3e-6 if dtype == "float32" else 5e-3)
    assert not found.weights[..., ~np.tri(7, dtype=bool)].any() and found.figures.padding.tolist() == [[0, 0]]
    kernel = np.asarray(layer.out.kernel[...], np.float32).reshape(2, 8, 16)
    parts = np.einsum("nts,snh,nhd->ntd", wanted, v, kernel)
    assert found.norms is not None
    close = 1e-4 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found.norms[0], np.linalg.norm(parts, axis=-1), rtol=close)
    whole = np.asarray(layer.out(jax.numpy.einsum("nts,snh->tnh", wanted, v).reshape(7, 16)), np.float32)
    np.testing.assert_allclose(parts.sum(0), whole, atol=close)


def test_an_example_shows_its_padding():
    model, task, config = model_of("listops", model="encoder", layers=1, seq_len=24)
    batch = reading.example(config, task, "test", 3)
    valid = np.arange(24)[None] < 17
    (found,) = reading.of_example(model, task, Batch(batch.inputs, batch.targets, batch.weights, valid))
    assert found.real_keys.tolist() == valid[0].tolist() and not found.causal
    assert not found.weights[..., 17:].any() and found.figures.padding.tolist() == [[0, 0]]
    np.testing.assert_allclose(found.weights[:, :, :17].sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.seen, valid[0][:, None] & valid[0])


def test_examples_are_those_of_an_evaluation():
    _, task, config = model_of()
    same = build_task(edit(config, batch=32, data_seed=0)).batch("test", 1)
    np.testing.assert_array_equal(reading.example(config, task, "test", 33).inputs[0], same.inputs[1])
    with pytest.raises(UsageError, match="example -1: the test split has examples 0 and on"):
        reading.example(config, task, "test", -1)


@pytest.mark.full
def test_an_encoder_decoder_has_three_parts():
    """Blanks that fill a source up get nothing; the target is what the model says."""
    model, task, _ = model_of(model="encoder_decoder", layers=1)
    S = model.source
    encoder, decoder, cross = reading.parts_of_text(model, task, " ".join(["3"] * (S + 3)))
    assert [one.part for one in (encoder, decoder, cross)] == ["encoder", "decoder", "cross"]
    assert encoder.weights.shape[2:] == (S, S) and not encoder.causal
    assert decoder.weights.shape[2:] == (3, 3) and decoder.causal
    assert cross.weights.shape[2:] == (3, S) and not cross.notes
    np.testing.assert_allclose(cross.weights.sum(-1), 1, atol=1e-5)
    assert not decoder.weights[..., ~np.tri(3, dtype=bool)].any()
    assert np.isnan(cross.distance).all() and np.isfinite(cross.entropy).all()
    assert reading.of_text(model, task, " ".join(["3"] * (S + 3))).part == "cross"
    with pytest.raises(UsageError, match="part=self: this model has encoder, decoder, cross"):
        reading.of_text(model, task, " ".join(["3"] * (S + 3)), part="self")


@pytest.fixture
def pairs(tmp_path):
    for name, count in (("train", 20), ("valid", 4), ("test", 5)):
        for language, word in (("de", "Hund"), ("en", "dog")):
            (tmp_path / f"{name}.{language}").write_text("".join(f"{word} {name[0]}{n}\n" for n in range(count)))
    return tmp_path


@pytest.mark.full
def test_a_source_is_filled_up_and_the_target_generated(pairs):
    model, task, _ = model_of(f"translate:path={pairs}", model="encoder_decoder", layers=1, seq_len=20)
    encoder, decoder, cross = reading.parts_of_text(model, task, "Hund")
    assert encoder.real_keys.tolist() == [True] * 4 + [False] * 6
    assert not encoder.weights[..., 4:].any() and not cross.weights[..., 4:].any()
    assert cross.notes and len(decoder.queries) >= 1 and cross.queries == decoder.queries
    np.testing.assert_allclose(cross.weights[..., :4].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text", "said"),
    [
        ({}, "1 x", 'text: "x" is no token'),
        ({}, " ", "text: it is empty"),
        ({}, "1 " * 13, "text: it has 13 tokens, and the model takes 12"),
        ({"model": "lstm", "position": "learned"}, "1 2 3", r"no layer of this model \(lstm\) gives a mean of values"),
        ({"depth": "universal"}, "1 2 3", "no map"),
        ({"task": "pathfinder", "model": "encoder", "seq_len": 1024}, "1 2 3", "look at an example"),
    ],
)
def test_what_has_no_map_is_refused_with_its_reason(changes, text, said):
    model, task, _ = model_of(**changes)
    with pytest.raises(UsageError, match=said):
        reading.of_text(model, task, text)


# ---- showing ----------------------------------------------------------------------------------------------------


def test_layers_and_heads_are_chosen_by_their_numbers():
    one = made(drawn(), norms=np.random.default_rng(1).random((2, 3, 5)))
    part = one.only([2], [3, 1])
    np.testing.assert_array_equal(part.weights, one.weights[1:, [2, 0]])
    assert (part.layers, part.heads) == ([2], [3, 1])
    np.testing.assert_array_equal(part.figures.output, one.figures.output[1:, [2, 0]])
    np.testing.assert_array_equal(part.entropy, one.entropy[1:, [2, 0]])
    with pytest.raises(UsageError, match="full: no head 4: it has heads 1 to 3"):
        one.only(None, [4])


def test_rows_say_the_figures_in_words():
    real = np.arange(5) < 4
    weights = np.zeros((1, 1, 5, 5))
    weights[..., 0] = 1
    one = made(weights, real=real)
    (row,) = table.texts(one, table.columns([one]))
    assert row == {
        "layer": "1", "head": "1", "bits": "0.00", "of uniform": "0.00", "distance": "2.0", "first token": "100 %",
        "itself": "0 %", "padding": "0 %", "dead": "looks at one token",
    }  # fmt: skip
    (told,) = table.heads(one)
    assert told["output"] is None and told["dead"] == "looks at one token" and json.dumps(told)
    whole = made(drawn())
    assert "padding" not in [column.key for column in table.columns([whole])]
    assert "total" in [column.key for column in table.columns([made(2 * drawn())])]
    assert table.share(0.001) == "< 1 %" and table.share(0) == "0 %"


def test_queries_that_are_padding_are_not_drawn():
    real = np.arange(5) < 3
    one = made(np.full((1, 1, 5, 5), 0.2), causal=False, real=real)
    assert one.drawn[0, 0].any(-1).tolist() == real.tolist() and one.weights.all()


def test_maps_say_what_their_weights_are():
    kinds = [made(drawn(), implied=implied).kind for implied in ([False, False], [False, True], [True, True])]
    assert kinds[0] == "the weights of its scores" and kinds[2] == "effective weights, since it has no scores"
    assert kinds[1] == "effective weights in layer 2, since there are no scores"


def test_small_maps_keep_what_stands_out():
    weights, seen = np.zeros((7, 7)), np.tri(7, dtype=bool)
    weights[6, 3], weights[2, 1] = 0.5, -0.25
    less, ground = picture.small(weights, seen, 3)
    assert less.shape == (3, 3) and less.max() == 0.5 and less.min() == -0.25 and ground[0, 0] and not ground[0, 2]
    same, _ = picture.small(weights, seen, 9)
    np.testing.assert_array_equal(same, weights)


@pytest.mark.parametrize("payload", [*PAYLOADS, " \n\t", ""], ids=range(len(PAYLOADS) + 2))
def test_a_picture_is_well_formed_whatever_tokens_are(payload):
    one = made(drawn(L=1, N=2), [payload] * 5, name=payload)
    root = xml.etree.ElementTree.fromstring(one.svg())
    assert len([node for node in root.iter() if node.text == "layer 1, head 2"]) == 1
    assert {node.tag.rpartition("}")[2] for node in root.iter()} <= {"svg", "rect", "text", "g", "path"}
    shown = xml.etree.ElementTree.fromstring(one._repr_html_().replace("<!--", ""))
    assert shown.find("table") is not None and "script" not in {node.tag for node in shown.iter()}


def hostile() -> list[AttentionMaps]:
    """Every payload as a name, a note and a token."""
    runs = [
        made(drawn(at, L=1, N=1, T=3), [payload] * 3, name=payload, notes=[payload], implied=[at % 2 == 0])
        for at, payload in enumerate(PAYLOADS)
    ]
    return [*runs, made(-drawn(T=len(PAYLOADS)), list(PAYLOADS), name=PAYLOAD)]


def test_no_text_of_a_user_reaches_the_page_as_markup(tmp_path):
    path = page.write(hostile(), tmp_path / "m.html", title=PAYLOADS[4], command=PAYLOADS[6], refused=[PAYLOADS[:2]])
    text = path.read_text(encoding="utf-8")
    tags = set(re.findall(r"<\s*([a-zA-Z!]+)", text))
    assert not tags & {"img", "iframe", "link", "base", "form", "a", "textarea", "image", "foreignObject"}
    assert text.count("<script") == 1 and text.count("</script>") == 1 and text.count("<style") == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"<[^>]*\son[a-z]+\s*=", re.sub(r'"[^"]*"', '""', markup))
    assert all(unescape(text).count(payload) >= 6 for payload in PAYLOADS[:-1])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    parts = [*re.findall(r"<script>(.*?)</script>", text, re.S), *re.findall(r"<style>(.*?)</style>", text, re.S)]
    assert all(offline.digest(part) in policy for part in parts) and "unsafe" not in policy and "http" not in policy


DRIVER = """
(() => {
  const say = (name, value) => document.documentElement.setAttribute(`data-${name}`, value);
  const strip = document.querySelector(".strip");
  const read = () => [...document.querySelectorAll(".says")].map((one) => one.textContent).join("|");
  const press = (key) => strip.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  press("Home"); press("ArrowRight"); press("ArrowRight");
  say("third", read());
  document.querySelector("input[name=way][value=keys]").click();
  say("other", read());
  document.querySelector("input[name=way][value=queries]").click();
  [...document.querySelectorAll(".maps button")].at(-1).click();
  say("head", document.querySelector("input[name=head]:checked").value);
  say("unseen", String(strip.querySelectorAll(".unseen").length));
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  say("free", read());
  say("wide", String(document.documentElement.scrollWidth <= innerWidth));
})();
"""


@pytest.mark.full
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_where_a_token_looks(tmp_path, monkeypatch, width):
    read = page._text
    watch = "for (const name of ['alert', 'confirm', 'prompt']) window[name] = () => document.title = 'owned';"
    monkeypatch.setattr(page, "_text", lambda name: watch + read(name) + DRIVER if name == "page.js" else read(name))
    weights = np.tile(np.eye(4, k=-1) * 0.75 + np.eye(4) * 0.25, (1, 2, 1, 1))
    weights[..., 0, 0] = 1
    runs = [made(weights, [*"abcd"], name="one"), made(weights[:, :1], [*"abcd"], name="two"), *hostile()]
    path = page.write(runs, tmp_path / "m.html", title="harmless")
    seen = browsed(path, width)
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', seen[: seen.index("<head>")]))
    assert 'data-ready="yes"' in seen[:20000] and "<title>harmless</title>" in seen
    assert said["third"].split("|")[:2] == ["c (3) looks at75 %b (2)25 %c (3)"] * 2
    assert said["other"].split("|")[0] == "c (3) is looked at by75 %d (4)25 %c (3)"
    assert said["head"] == "3" and said["unseen"] == "0" and said["wide"] == "true"
    assert set(said["free"]) <= {"|"}


@pytest.mark.full
def test_without_its_script_the_page_has_every_map_and_number(tmp_path):
    path = page.write([made(drawn())], tmp_path / "m.html")
    text = re.sub(r"<script>.*</script>", "", path.read_text(), flags=re.S)
    assert (
        text.count('<svg class="thumb"') == 6
        and text.count("<tr data-layer") == 6
        and '<section id="look" hidden>' in text
    )


def test_a_page_with_too_many_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 100)
    with pytest.raises(UsageError, match="would hold 150 weights, at most 100 fit: choose --layers="):
        made(drawn()).page(tmp_path / "m.html")
    assert not (tmp_path / "m.html").exists()


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def xlab(tmp_path, capsys, monkeypatch):
    """xlab(words) runs maps on three stored runs, whose models are as they were drawn -> exit code, stdout, stderr."""
    runs = tmp_path / "runs"
    changes = {"a": {"attention": "full"}, "b": {"attention": "linear"}, "c": {"attention": "rwkv"}}
    for name, change in changes.items():
        stored(runs, name * 12, attention=change["attention"])

    def load(folder, *, trust=False):
        model, task, config = model_of(layers=1, **changes[folder.name[0]])
        return config, task, model

    monkeypatch.setattr(trained, "load", load)

    def run(words: str, *more: str):
        code = main(["maps", *words.split(), *more, "--runs", str(runs)])
        return code, *capsys.readouterr()

    return run


def test_a_command_compares_heads_of_runs(xlab, tmp_path):
    code, said, told = xlab(f"aaa bbb --report {tmp_path}/m.html --figures {tmp_path}/f", "--text", "1 2 3 4")
    lines = said.splitlines()
    assert code == 0 and lines[0].split()[:4] == ["run", "layer", "head", "bits"] and len(lines) == 5 + 5
    assert "full: 2 heads" in said and "effective weights, since there are no scores: linear" in said
    assert "dead: adds less than 0.1" in said and "figures: 4 files" in told
    page = (tmp_path / "m.html").read_text()
    assert page.count('<figure class="panel"') == 2 and "xlab maps aaa bbb" in page
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert names == ["maps_full.pdf", "maps_full.svg", "maps_linear.pdf", "maps_linear.svg"]
    assert (tmp_path / "f" / "maps_full.pdf").read_bytes().startswith(b"%PDF")


def test_json_has_a_row_for_each_head(xlab):
    code, said, _ = xlab("aaa --json --heads 2 --example 1")
    (row,) = json.loads(said)
    assert code == 0 and (row["run"], row["layer"], row["head"], row["part"]) == ("full", 1, 2, "self")
    assert row["entropy"] > 0 and row["padding"] == 0


def test_a_run_without_a_map_is_said_beside_the_others(xlab, tmp_path):
    code, said, told = xlab(f"aaa ccc --report {tmp_path}/m.html", "--text", "1 2 3 4")
    assert code == 5 and "cccccccccccc: rwkv has no map: every channel" in told and "full" in said
    assert "<strong>No map of rwkv:</strong> rwkv has no map: every channel" in (tmp_path / "m.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "maps of which run?"),
        ("ccc", "rwkv has no map: every channel has weights of its own"),
        ("aaa --text 1 --example 2", "--text and --example are two inputs"),
        ("aaa --text 1 --split test", "--text and --example are two inputs"),
        ("aaa --text x", '"x" is no token'),
        ("aaa --layers 2", "full: no layer 2: it has layers 1 to 1"),
        ("aaa --heads 0 --text 1", "heads"),
        ("aaa --heads x --text 1", "--heads x"),
        ("zzz --text 1", "no run in"),
    ],
)
def test_bad_words_end_with_one_message(xlab, words, said):
    code, out, told = xlab(words)
    assert code == 2 and said in told and "Traceback" not in told and not out and len(told.splitlines()) == 1
