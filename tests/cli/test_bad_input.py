"""Bad input: exit code 2, one message that names the place and the mend, no traceback, and nothing compiled."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import typing

import jax
import pytest

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.cli import main
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task
from xformers_lab.nn.size import Size

pytestmark = pytest.mark.usefixtures("inline")  # a process each would take minutes
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILED.append(event) if "backend_compile" in event else None  # pyright: ignore
)


def refused(capsys, *arguments) -> str:
    """Run a command that must be refused; -> its message."""
    before = len(COMPILED)
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as error:  # argparse's own refusal
        code = error.code
    output = capsys.readouterr()
    assert code == 2, output.err
    assert "Traceback" not in output.err + output.out
    assert output.out == ""
    assert 0 < len(output.err.strip().splitlines()) <= 15
    assert len(COMPILED) == before, "something compiled before the refusal"
    return output.err


def typos(word: str) -> list[str]:
    """Two spellings a hurried hand makes: neighbours swapped, a letter lost."""
    middle = len(word) // 2
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    lost = word[:middle] + word[middle + 1 :]
    return [typo for typo in (swapped, lost) if typo != word]


MISSPELT_KEYS = [(typo, key) for key in configs.KEYS if len(key) > 3 for typo in typos(key) if typo not in configs.KEYS]


@pytest.mark.parametrize("typo, key", MISSPELT_KEYS)
def test_misspelt_key(capsys, typo, key):
    message = refused(capsys, "train", f"{typo}=1")
    assert typo in message
    assert f'"{key}"' in message.partition("(")[0]


MISSPELT_NAMES = [
    (shelf, typo, name)
    for shelf in ("attention", "position", "norm", "ffn", "task", "model", "depth")
    for name in spec.names(shelf)
    if len(name) > 3
    for typo in typos(name)
    if typo not in spec.names(shelf)
]


@pytest.mark.parametrize("shelf, typo, name", MISSPELT_NAMES)
def test_misspelt_name(capsys, shelf, typo, name):
    message = refused(capsys, "train", f"{shelf}={typo}")
    assert f'did you mean "{name}"' in message


@pytest.mark.parametrize("word, hint", [
    ("memory=feedback", "depth has feedback: depth=feedback"),
    ("memory=memformer", "depth has memformer: depth=memformer"),
    ("depth=compressive", "memory has compressive: memory=compressive"),
    ("attention=rope", "position has rope: position=rope"),
    ("attention=lstm", "model has lstm: model=lstm"),
    ("norm=rmsnorm", "normaliser has rmsnorm: norm=NAME:normaliser=rmsnorm"),
    ("depth=xl", "position has xl: position=xl; memory has xl: memory=xl"),
])  # fmt: skip
def test_a_name_of_another_shelf(capsys, word, hint):
    shelf, name = word.split("=")
    message = refused(capsys, "train", word)
    assert f"there is no {shelf} called {name}; {hint}" in message


MISSPELT_OPTIONS = [
    (shelf, name, typo, option)
    for shelf in ("attention", "position", "norm", "ffn", "task")
    for name in spec.names(shelf)
    for option in spec.options(spec.entry(shelf, name))
    if len(option) > 3
    for typo in typos(option)[:1]
]


@pytest.mark.parametrize("shelf, name, typo, option", MISSPELT_OPTIONS)
def test_misspelt_option(capsys, shelf, name, typo, option):
    message = refused(capsys, "train", f"{shelf}={name}:{typo}=1")
    assert typo in message and f'did you mean "{option}"' in message


NUMBERS = [key for key, (_, _, kind) in configs.LEAVES.items() if kind in (int, float)]


@pytest.mark.parametrize("key, value", list(itertools.product(NUMBERS, ["lots", "nan", "-3", "1.5.2"])))
def test_wrong_number(capsys, key, value):
    assert key in refused(capsys, "train", f"{key}={value}")


IMPOSSIBLE = {
    "heads do not divide dim": (["dim=64", "heads=5"], "dim=64 is not divisible by heads=5"),
    "kv_heads do not divide heads": (["heads=4", "kv_heads=3"], "kv_heads=3"),
    "axial shape": (["attention=axial:shape=7x9", "seq_len=64"], "8x8"),
    "axial shape in three": (["attention=axial:shape=4x4x5", "seq_len=64"], "8x8"),
    "no window": (["attention=local:window=0"], "window must be at least 1"),
    "no stride": (["attention=strided:stride=0"], "stride must be at least 1"),
    "no chunk": (["attention=linear:chunk=0"], "chunk must be at least 1"),
    "answers in sight": (["task=lm", "model=encoder"], "use model=decoder"),
    "rope on odd heads": (["position=rope", "dim=6", "heads=2"], "odd"),
    "uneven accumulation": (["batch=8", "accumulate=3"], "not divisible by accumulate=3"),
    "dropout of everything": (["dropout=1"], "below 1"),
    "unknown dtype": (["dtype=float16"], "float32"),
    "unknown normaliser": (["norm=pre:normaliser=rmsnom"], 'did you mean "rmsnorm"'),
    "option of a choice within a choice": (["norm=pre:normaliser=(powernorm:deca=0.5)"], 'did you mean "decay"'),
    "open bracket": (["norm=pre:normaliser=(powernorm:decay=0.5"], "brackets"),
    "no hidden channel": (["ffn=mlp:ratio=0"], "no hidden channel"),
    "option twice": (["attention=local:window=4:window=5"], "given twice"),
    "option without value": (["attention=local:window"], "option=value"),
    "empty choice": (["attention=:window=3"], "starts with a name"),
    "empty place in a cycle": (["attention=full+"], "starts with a name"),
    "sweep where one is wanted": (["seed=0,1"], "use compare or bench"),
    "no value": (["seed="], "no value"),
    "no equals sign": (["local"], "not key=value"),
    "backward range": (["seq_len=64..32"], "empty or endless"),
    "endless range": (["seq_len=1..8:x1"], "empty or endless"),
    "wrong section": (["trian.lr=3"], "did you mean"),
    "no such file of a mechanism": (["attention=./nowhere.py"], "no file"),
    "no such module": (["attention=no_such_package.mine"], "no_such_package"),
    "no such data": (["task=lm:path=/no/such/file"], "/no/such/file"),
    "hub while offline": (["task=text:hub=stanfordnlp/imdb"], "offline"),
    "too short a sequence": (["task=mqar:pairs=64", "seq_len=16"], "seq_len"),
    "home of nobody": (["attention=~nosuchuser/x.py"], "~nosuchuser/x.py"),
    "file in the home of nobody": (["@~nosuchuser/x.toml"], "~nosuchuser/x.toml"),
    "name longer than any file's": (["@" + "x" * 300], "is no path"),
    "mechanism with a name longer than any file's": ([f"attention=./{'x' * 300}.py"], "is no path"),
    "no Python file": (["attention=/dev/null/x", "seq_len=8"], "no file"),
    "seed beyond 32 bits": (["seed=4294967296"], "seed must be below 4,294,967,296"),
    "more tokens than any layer is run on": (["seq_len=268435455"], "seq_len must be below"),
    "more layers than any model has": (["layers=65535"], "layers must be below"),
    "more layers than can be written out": (["model=lstm", "task=copy", "layers=65"], "at most 64"),
    "expressions of a million tokens": (["task=listops", "seq_len=1048576", "batch=1"], "at most 10,000,000"),
    "more activations than memory": (["task=copy", "batch=1e7", "seq_len=4e6"], "activations"),
    "more logits than memory": (["task=copy:symbols=1000000", "batch=1e5", "seq_len=64"], "activations"),
    "more parameters than memory": (["task=copy", "layers=2048", "dim=32768"], "parameters"),
    "size beyond every array": (["dim=3e6"], "dim must be below 1,048,576"),
    "grid beyond all bounds": (["seed=0..9999", "dim=1..9999"], "99,990,000 cells"),
    "comma of a path": (["task=lm:path=/tmp/a,b.txt"], "put it in brackets"),
    "colon of a path": (["task=lm:path=/tmp/run:1/x.txt"], "put it in brackets"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible(capsys, tmp_path, case):
    words, expected = IMPOSSIBLE[case]
    assert expected in refused(capsys, "train", f"runs={tmp_path}", *words)
    assert list(tmp_path.iterdir()) == []


def test_causal_on_a_mechanism_that_cannot(capsys, tmp_path):
    (tmp_path / "pooled.py").write_text(
        '"""Mean of values."""\nfrom xformers_lab.attention import OneHead\n\n\n'
        'class Pooled(OneHead):\n    refuses = {"causal": "the mean runs over every position"}\n\n'
        "    def attend(self, q, k, v, *, valid):\n        return v.mean(0)[None] + 0 * q\n"
    )
    message = refused(capsys, "train", "task=copy", f"attention={tmp_path}/pooled.py")
    assert "cannot be causal: the mean runs over every position" in message


@pytest.mark.parametrize("source, expected", [("import no_such_thing\n", "no_such_thing"), ("exit(3)\n", "SystemExit")])
def test_mechanism_that_does_not_import(capsys, tmp_path, source, expected):
    path = tmp_path / "broken.py"
    path.write_text(source)
    message = refused(capsys, "train", f"attention={path}")
    assert expected in message and "broken.py:1" in message
    assert not [name for name in sys.modules if name.endswith("_broken")]


LEAVES_BY = """
from xformers_lab.attention.full import Full


class Leaves(Full):
    def __init__(self, size, *, at: str = "build", rngs):
        super().__init__(size, rngs=rngs)
        self.at = at
        if at == "build":
            raise SystemExit(3)

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        raise KeyboardInterrupt

    def cost(self, T, S):
        raise GeneratorExit
"""


@pytest.mark.parametrize("at, train_line, show_line", [("build", 10, 10), ("call", 13, 16)])
def test_a_mechanism_that_exits(capsys, tmp_path, at, train_line, show_line):
    path = tmp_path / "leaves.py"
    path.write_text(LEAVES_BY)
    assert f"leaves.py:{train_line})" in refused(capsys, "train", "task=copy", f"attention={path}:at={at}")
    assert main(["show", f"{path}:at={at}"]) == 2
    assert f"leaves.py:{show_line})" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["time.sleep(60)", "try: time.sleep(60)\nexcept BaseException: raise SystemExit(7)"])
def test_a_real_interruption_of_a_recipe_interrupts(tmp_path, what):
    (tmp_path / "slow.py").write_text(f"import time\nprint(1, flush=True)\n{what}\n")
    command = [sys.executable, "-m", "xformers_lab", "compare", "@slow.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1].strip() == "xlab compare: interrupted"
    assert process.returncode == 130


MECHANISM = """
from __future__ import annotations
from typing import TYPE_CHECKING
from xformers_lab.attention.full import Full
if TYPE_CHECKING:
    from collections import OrderedDict


class Own(Full):
    def __init__(self, size, *, windows: {kind} = None, rngs):
        super().__init__(size, rngs=rngs)
"""


@pytest.mark.parametrize("kind, expected", [("OrderedDict", "TYPE_CHECKING"), ("list[int]", "its type list[int]")])
def test_option_of_a_type_that_none_can_have(capsys, tmp_path, kind, expected):
    path = tmp_path / "own.py"
    path.write_text(MECHANISM.format(kind=kind))
    assert expected in refused(capsys, "train", f"attention={path}:windows=3")


FILES = {
    "list.toml": ("[[", "list.toml"),
    "twice.json": ('{"lr": 1, "lr": 2}', "given twice"),
    "twice.yaml": ("lr: 1\nlr: 2\n", "given twice"),
    "bomb.yaml": ("a: &a [1]\nb: *a\n", "aliases"),
    "object.yaml": ("a: !!python/object:os.system x\n", "object.yaml"),
    "array.json": ("[1, 2]", "keys and values"),
    "unknown.toml": ("[train]\nlrr = 3\n", 'did you mean "lr"'),
    "section.toml": ("[trian]\nlr = 3\n", 'did you mean "train"'),
    "typed.toml": ("layers = true\n", "layers"),
    "empty.toml": ("seed = []\n", "empty list"),
    "deep.json": ("[" * 100_000, "deep.json"),
    "deeper.json": ('{"model":' * 100_000, "deeper.json"),
    "deep.toml": ("a = " + "[" * 100_000, "deep.toml"),
    "deep.yaml": ("[" * 2_000, "deep.yaml"),
    "sections.json": ('{"model":' * 300 + "1" + "}" * 300, "section within a section"),
    "truth.yaml": ("lr: !!bool x\n", "truth.yaml: cannot be read as .yaml"),
    "empty.yaml": ("steps: !!int ''\n", "empty.yaml: cannot be read as .yaml"),
    "digits.json": ('{"steps": ' + "9" * 5_000 + "}", "digits.json"),
    "digits.toml": ("steps = 0x" + "f" * 10_000, "steps must be below"),
    "surrogate.json": (r'{"attention": "\ud800"}', r'no attention "\ud800"'),
    "brackets.json": ('{"attention": "' + "(" * 100_000 + '"}', "is no name"),
    "cycle.json": ('{"attention": "' + "full+" * 100_000 + 'full"}', "a cycle of 100,001 choices; at most 64"),
    "values.json": ('{"seq_len": "' + "1," * 200_000 + '1"}', "at most 100,000 at once"),
    "dotted.json": ('{"attention": "' + "a." * 100_000 + 'b"}', "is no name"),
    "kind.ini": ("", "unknown kind"),
    "recipe.py": ("x = 1\n", "configs = "),
    "raises.py": ("configs = [1 / 0]\n", "raises.py:1"),
    "wrong.py": ("configs = [3]\n", "configs[0]"),
    "number.py": ("configs = 3\n", "configs = "),
    "exits.py": ("raise SystemExit(0)\n", "SystemExit: 0"),
    "interrupts.py": ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    "own_interrupt.py": ("class Own(KeyboardInterrupt): ...\nraise Own('x')\n", "Own: x"),
    "closes.py": ("raise GeneratorExit\n", "closes.py:1"),
    "speechless.py": ("class Own(BaseException):\n  def __str__(self): raise SystemExit\nraise Own\n", "Own"),
    "mapping.py": ("class M(dict):\n  def items(self): raise SystemExit(4)\nconfigs = [M(lr=1)]\n", "mapping.py:2"),
    "attribute.py": ("def __getattr__(name): raise KeyboardInterrupt\n", "attribute.py:1"),
    "huge.py": ("configs = [{'lr': 10**5000}]\n", "wants a number"),
}


@pytest.mark.parametrize("name", FILES)
def test_malformed_file(capsys, tmp_path, name):
    content, expected = FILES[name]
    (tmp_path / name).write_text(content)
    message = refused(capsys, "compare", f"@{tmp_path / name}")
    assert expected in message and len(message) < 2_500


def test_not_text(capsys, tmp_path):
    (tmp_path / "utf16.json").write_bytes(json.dumps({"lr": 1}).encode("utf-16"))
    assert "UTF-8" in refused(capsys, "train", f"@{tmp_path}/utf16.json")


def test_a_file_that_is_no_config(capsys, tmp_path):
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2**40)
    assert "1,099,511,627,776 bytes are no config" in refused(capsys, "train", f"@{tmp_path}/large.toml")


def test_file_that_cannot_be_read(capsys, tmp_path):
    memory = pathlib.Path("/proc/self/mem")  # nobody may read its first byte, not even root
    if not memory.exists():
        pytest.skip("no /proc here")
    (tmp_path / "closed.toml").symlink_to(memory)
    assert "closed.toml: cannot be read" in refused(capsys, "train", f"@{tmp_path}/closed.toml")


@pytest.mark.parametrize("place", ["taken", "file/report.html", "~nosuchuser/report.html"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(capsys, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    for command in ("bench", "compare"):
        assert place in refused(capsys, command, "task=copy", "attention=full", "--report", place)


COMMANDS = [
    words.split()
    for words in (
        "list attention-span",
        "show",
        "show locl",
        "show none",
        "check locl",
        "bench --rounds 0",
        "bench attention=full+local",
        "report --runs nowhere",
        "resume nowhere",
        "resume last --runs nowhere",
        "eval nowhere",
        "new attention 2x",
        "new attentoin mine",
        "compare",
        "compare attention=full,axial:shape=3x3",
        "frobnicate",
        "show local --json --deep seq_len=32",
        "list attention position",
    )
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments)


def test_there_are_enough_cases():
    generated = (
        len(MISSPELT_KEYS)
        + len(MISSPELT_NAMES)
        + len(MISSPELT_OPTIONS)
        + 4 * len(NUMBERS)
        + len(IMPOSSIBLE)
        + len(FILES)
    )
    assert generated >= 200


# Whole numbers of either sign mean something there.
SIGNED = {("hard_coded", "offsets"), ("informer", "seed")}


@pytest.mark.parametrize("shelf", ["attention", "position", "norm", "normaliser", "ffn", "memory", "depth"])
def test_every_option_of_every_choice_refuses_nonsense(shelf):
    """A size below any that could be meant, a number that is none, an unknown word: one message each, no traceback."""
    for name in spec.names(shelf):
        for option in spec.options(spec.entry(shelf, name)).values():
            kinds = typing.get_args(option.type) or (option.type,)
            nonsense = "-7" if int in kinds else "nan" if float in kinds else "bogus"
            choice = f"{name}:{option.name}={nonsense}"
            if (name, option.name) in SIGNED:
                continue
            with pytest.raises(UsageError, match=option.name):
                if shelf == "depth":  # which needs blocks to stack
                    config = configs.edit(configs.Config(), task="copy", seq_len=64, dim=32, heads=4, depth=choice)
                    build_model(config, build_task(config))
                else:
                    spec.build(shelf, choice, Size(length=64, dim=32, heads=4), causal=True)


def test_a_class_that_its_base_refuses_is_named_with_its_own_line(capsys, tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from xformers_lab.attention import Attention\n\n\nclass Old(Attention):\n    def attend(self, q, k, v): ...\n"
    )
    message = refused(capsys, "train", f"attention={path}")
    assert "its base class is OneHead" in message and f"({path}:4)" in message
