"""What every task owes the lab, over the whole shelf: purity, disjoint splits, ids in range, honest scores."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from xformers_lab import spec
from xformers_lab.errors import UsageError
from xformers_lab.tasks import SPLITS, Batch, Setting
from xformers_lab.tasks.listops import decode, evaluate
from xformers_lab.tasks.scan import SIGNS

TASKS = spec.names("task")
WORDS = ("good", "fair", "poor")
# Of tasks that do not have every length: a short one, and one more.
LENGTHS = {"pathfinder": (256, 289)}
# Tasks whose examples are so few at this length that a leak between splits would show at once.
CROWDED = {
    "addition": ("addition", 8),
    "brackets": ("brackets:types=2:depth=1", 19),
    "copy": ("copy:symbols=4", 11),
    "copy of mixed lengths": ("copy:symbols=4:shortest=5", 13),
    "induction": ("induction:symbols=4", 7),
    "listops": ("listops:min_length=4:max_args=3", 6),
    "modular": ("modular", 5),
    "mqar": ("mqar:pairs=2:vocab=14", 8),
    "needle": ("needle:symbols=8:noise=8", 5),
    "parity": ("parity", 11),
    "reverse": ("reverse:symbols=4", 11),
    "selective_copy": ("selective_copy:symbols=6:count=4", 8),
    "sort": ("sort:symbols=4", 11),
}


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> pathlib.Path:
    """A table of documents, each saying its own class; every third is there twice."""
    rows = [{"text": f"{number}: {WORDS[number % 3]}", "label": WORDS[number % 3]} for number in range(300)]
    path = tmp_path_factory.mktemp("documents") / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[::3]))
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> pathlib.Path:
    """Noisy images of 4 x 8 pixels in four classes, each with a row of its own lit."""
    label = np.arange(400) % 4
    image = np.random.default_rng(0).integers(0, 100, (400, 4, 8))
    image[np.arange(400), label] += 155
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, image=image, label=label)
    return path


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> pathlib.Path:
    """Numbers and their words."""
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "train.de").write_text("".join(f"{number}\n" for number in range(400)))
    (folder / "train.en").write_text("".join(f"{WORDS[number % 3]} {number % 7}\n" for number in range(400)))
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> pathlib.Path:
    """SCAN's commands without `around`, in its files."""
    folder = tmp_path_factory.mktemp("commands")
    verbs = [f"{verb}{way}" for verb in ("walk", "look", "run", "jump") for way in ("", " left", " opposite right")]
    phrases = verbs + [f"{verb} {many}" for verb in verbs for many in ("twice", "thrice")]
    whole = phrases + [f"{one} {word} {other}" for one in phrases for other in phrases for word in ("and", "after")]
    for side, some in (("train", whole[::2]), ("test", whole[1::2])):
        text = "".join(f"IN: {command} OUT: {' '.join(meaning(command))}\n" for command in some)
        (folder / f"tasks_{side}_simple.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> pathlib.Path:
    """Who went where, and where somebody is: four sentences and a question for each story, in bAbI's files."""
    folder, rng = tmp_path_factory.mktemp("stories"), np.random.default_rng(0)
    people, places = ("Mary", "John", "Daniel"), ("kitchen", "garden", "office", "hallway")
    for side, many in (("train", 400), ("test", 100)):
        rows = []
        for _ in range(many):
            moves = [(rng.choice(people), rng.choice(places)) for _ in range(4)]
            asked = rng.choice([who for who, _ in moves])
            at = max(number for number, (who, _) in enumerate(moves) if who == asked)
            rows += [f"{number} {who} went to the {place}." for number, (who, place) in enumerate(moves, 1)]
            rows += [f"5 Where is {asked}? \t{moves[at][1]}\t{at + 1}"]
        (folder / f"qa1_one-fact_{side}.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> pathlib.Path:
    """Two quantities that swing, and noise."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("measured") / "swings.csv"
    swings = np.sin(np.arange(1200)[:, None] / np.array([5, 9])) + 0.1 * rng.standard_normal((1200, 2))
    rows = [f"day {at},{one:.5f},{other:.5f}" for at, (one, other) in enumerate(swings)]
    path.write_text("\n".join(["date,fast,slow", *rows]))
    return path


@pytest.fixture
def choice(documents, images, sentences, commands, measured, stories):
    """The spelling of a task by its name: what it needs is added."""
    paths = {
        "text": documents,
        "retrieval": documents,
        "mlm": documents,
        "pixels": images,
        "masked_pixels": images,
        "translate": sentences,
        "scan": commands,
        "series": measured,
        "babi": stories,
    }
    return lambda name: f"{name}:path={paths[name]}" if name in paths else name


def build(text: str, length: int | None = None, batch: int = 16, seed: int = 0):
    length = LENGTHS.get(text.split(":")[0], (32,))[0] if length is None else length
    return spec.build("task", text, Setting(length, batch, seed))


def digest(batch: Batch) -> str:
    arrays = (batch.inputs, batch.targets, batch.weights, batch.valid)
    parts = [b"" if array is None else np.ascontiguousarray(array).tobytes() for array in arrays]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def scored(task, logits: np.ndarray, batch: Batch) -> float:
    right, weight = task.metric(jnp.asarray(logits), batch)
    return task.finish(float(right) / float(weight))


def certain(answers: np.ndarray, outputs: int) -> np.ndarray:
    """Logits of a model that is sure of its answers."""
    return 50.0 * np.eye(outputs, dtype=np.float32)[answers]


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_what_the_contract_says(name, choice):
    task = build(choice(name))
    assert task.target in ("token", "sequence")
    assert task.kinds and set(task.kinds) <= {"encoder", "decoder", "encoder_decoder"}
    for split in SPLITS:
        batch = task.batch(split, 3)
        if task.channels:
            assert batch.inputs.shape == (16, task.setting.seq_len, task.channels)
            assert batch.targets.shape == (16, task.outputs) and batch.weights.shape == (16,)
            assert (batch.inputs.dtype, batch.targets.dtype, batch.weights.dtype) == (np.float32,) * 3
            assert np.isfinite(batch.inputs).all() and np.isfinite(batch.targets).all() and task.vocab == 0
            continue
        assert batch.inputs.shape == (16, task.setting.seq_len)
        assert batch.targets.shape == batch.weights.shape
        assert batch.targets.shape == (batch.inputs.shape if task.target == "token" else (16,))
        assert (batch.inputs.dtype, batch.targets.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)
        assert batch.inputs.min() >= 0 and batch.inputs.max() < task.vocab
        assert batch.targets.min() >= 0 and batch.targets.max() < task.outputs
        assert set(np.unique(batch.weights)) <= {0.0, 1.0} and batch.weights.sum() >= 16
        if batch.valid is not None:
            assert batch.valid.dtype == bool and batch.valid.any(axis=1).all()
            assert (np.diff(batch.valid.astype(int), axis=1) <= 0).all(), "padding stands at the end"
            assert (batch.inputs[~batch.valid] == 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_seed_split_and_step_alone(name, choice):
    first, again, other = build(choice(name)), build(choice(name)), build(choice(name), seed=1)
    again.batch("test", 9)
    seen = {digest(first.batch(split, step)) for split in SPLITS for step in (0, 1)}
    assert len(seen) == 6
    assert seen == {digest(again.batch(split, step)) for step in (1, 0) for split in reversed(SPLITS)}
    assert not seen & {digest(other.batch(split, step)) for split in SPLITS for step in (0, 1)}


def test_batches_are_the_same_in_a_process_with_other_hashes(choice):
    program = (
        "from test_tasks import build, digest; import sys\n"
        "for text in sys.argv[1:]: print(digest(build(text).batch('validation', 2)))"
    )
    texts = [choice(name) for name in TASKS]
    here = [digest(build(text).batch("validation", 2)) for text in texts]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "tasks")))
    environment = os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *texts]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == here


@pytest.mark.parametrize("name", sorted(CROWDED))
@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)])
def test_generated_splits_share_no_example(name, seeds):
    text, length = CROWDED[name]
    examples = {}
    for split, seed in zip(SPLITS, seeds, strict=True):
        task = build(text, length, 256, seed)
        rows = np.concatenate([task.batch(split, step).inputs for step in range(8)])
        examples[split] = {row.tobytes() for row in rows}
        assert len(examples[split]) < len(rows), "examples are few enough to come twice"
    assert not examples["train"] & examples["test"]
    assert not examples["train"] & examples["validation"]
    assert not examples["validation"] & examples["test"]


@pytest.mark.parametrize("length", [8, 33, 64])
def test_the_split_of_an_expression_does_not_depend_on_seq_len(length):
    from xformers_lab.tasks import _splits

    rows = build("listops:min_length=4", length).batch("test", 0).inputs
    assert (_splits.of_rows(np.pad(rows, ((0, 0), (0, 50)))) == SPLITS.index("test")).all()


@pytest.mark.parametrize("name", TASKS)
def test_guessing_scores_chance(name, choice):
    task = build(choice(name), batch=64)
    if task.channels or (task.higher_is_better and name not in GUESSES):
        pytest.skip(f"no guesser for {name} here")
    rng = np.random.default_rng(0)
    scores = []
    for step in range(20):
        batch = task.batch("train", step)
        if not task.higher_is_better:
            scores.append(scored(task, np.zeros((*batch.targets.shape, task.outputs)), batch))
            continue
        scores.append(scored(task, certain(GUESSES[name](task, batch, rng), task.outputs), batch))
    assert np.mean(scores) == pytest.approx(task.chance, abs=1e-4 if not task.higher_is_better else 0.025)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "lm"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_oracle_that_reads_the_inputs_scores_one(name, which, choice):
    if name not in ORACLES:
        pytest.skip(f"no oracle for {name} here")
    task = build(choice(name), LENGTHS.get(name, (32, 47))[which])
    for split in SPLITS:
        batch = task.batch(split, 1)
        answers = np.zeros_like(batch.targets)
        for row, ids in enumerate(batch.inputs):
            answers[row] = ORACLES[name](task, ids)
        assert scored(task, certain(answers, task.outputs), batch) == 1.0
        loss, weight = task.loss(jnp.asarray(certain(answers, task.outputs)), batch)
        assert float(loss) == pytest.approx(0, abs=1e-4) and float(weight) == batch.weights.sum()


def solve_copy(task, ids):
    """Before the second separator anything; after it the symbol that stood half + 1 places before the next."""
    answers = np.zeros_like(ids)
    for t in range(task.half + 1, len(ids)):
        answers[t] = ids[t - task.half]
    return answers


def solve_string(task, ids, order):
    """The string's symbols, in this order, where they are asked for."""
    answers = np.zeros_like(ids)
    answers[task.half + 1 : 2 * task.half + 1] = order(ids[1 : task.half + 1])
    return answers


def solve_addition(task, ids):
    """Python's own sum of the two numbers."""
    left, right = task.decode(list(ids)).split("=")[0].split("+")
    total = f"{int(left) + int(right):0{task.digits + 1}d}"
    answers = np.zeros_like(ids)
    answers[2 * task.digits + 1 : 3 * task.digits + 2] = list(map(int, total[::-1] if task.reverse else total))
    return answers


def solve_brackets(task, ids):
    """The innermost bracket that is still open."""
    still, answers = [], []
    for token in ids:
        if token < task.types:
            still.append(token)
        else:
            assert still.pop() == token - task.types
        assert len(still) <= task.depth
        answers.append(still[-1] if still else 0)
    return answers


def solve_induction(task, ids):
    first, last = np.flatnonzero(ids == 0)
    assert last == len(ids) - 1
    return np.full_like(ids, ids[first + 1])


def solve_pathfinder(task, ids):
    """Flood fill from one disc, the centre of nine pixels, over pixels that the gaps of a line do not part."""
    picture = ids.reshape(task.image)
    discs = np.argwhere(np.lib.stride_tricks.sliding_window_view(picture, (3, 3)).all((2, 3))) + 1
    drawn, reached, border = np.argwhere(picture), set(), [tuple(discs[0])]
    while border:
        reached.update(border)
        near = {tuple(pixel) for at in border for pixel in drawn[abs(drawn - at).max(1) <= task.gap + 1]}
        border = list(near - reached)
    # A disc where its line bends may make two such centres, side by side.
    others = [tuple(disc) for disc in discs if abs(disc - discs[0]).max() > 1]
    assert others, "two discs"
    return int(any(disc in reached for disc in others))


def task_documents(ids):
    """The two documents of a row, of bytes plus one, with 257 between."""
    first, second = bytes((ids[ids > 0] - 1).clip(0, 255).tolist()).split(b"\xff")
    return first, second


def meaning(command):
    """The actions of a command, by the grammar of Lake and Baroni (2018), figure 2 of their supplement."""
    for word, order in ((" and ", 1), (" after ", -1)):
        if word in command:
            return [action for part in command.split(word)[::order] for action in meaning(part)]
    words = command.split()
    times = {"twice": 2, "thrice": 3}.get(words[-1], 1)
    verb, *way = words[: len(words) - (times > 1)]
    turn = [f"I_TURN_{way[-1].upper()}"] if way else []
    act = [] if verb == "turn" else [f"I_{verb.upper()}"]
    if way[:1] == ["around"]:
        return (turn + act) * 4 * times
    return ((turn * 2 if way[:1] == ["opposite"] else turn) + act) * times


def solve_scan(task, ids):
    """What the command means, and its end, where they are asked for."""
    answers = np.zeros_like(ids)
    words = [task.encode("")[-1], *map(SIGNS.index, meaning(task.decode(ids[: task.source_length].tolist()))), 2]
    answers[task.source_length : task.source_length + len(words) - 1] = words[1:]
    return answers


def solve_babi(task, ids):
    """Where the one that is asked for went last."""
    *moves, question = task.decode(ids.tolist()).rstrip(" ?").split(" . ")
    return task.answers.index([move for move in moves if move.split()[0] == question.split()[-1]][-1].split()[-1])


def solve_selective_copy(task, ids):
    answers = np.zeros_like(ids)
    answers[ids == 1] = ids[ids > 1]
    return answers


def solve_mqar(task, ids):
    values = dict(zip(ids[0 : 2 * task.pairs : 2], ids[1 : 2 * task.pairs : 2], strict=True))
    return [values.get(token, 0) for token in ids]


def solve_needle(task, ids):
    (needle,) = [token for token in ids if 1 <= token <= task.symbols]
    return np.full_like(ids, needle)


ORACLES = {
    "addition": solve_addition,
    "babi": solve_babi,
    "brackets": solve_brackets,
    "copy": solve_copy,
    "induction": solve_induction,
    "listops": lambda task, ids: evaluate(decode(ids)),
    "modular": lambda task, ids: eval(task.decode(list(ids))) % task.modulus,
    "mqar": solve_mqar,
    "needle": solve_needle,
    "parity": lambda task, ids: ids.sum() % 2,
    "pathfinder": solve_pathfinder,
    "retrieval": lambda task, ids: int(len({part.split()[-1] for part in task_documents(ids)}) == 1),
    "reverse": lambda task, ids: solve_string(task, ids, lambda string: string[::-1]),
    "scan": solve_scan,
    "selective_copy": solve_selective_copy,
    "sort": lambda task, ids: solve_string(task, ids, np.sort),
    "text": lambda task, ids: task.corpus.classes.index(bytes((ids[ids > 0] - 1).tolist()).split()[-1].decode()),
}


def guess_value(task, batch, rng):
    """One of the values of the row's own pairs, for every question."""
    values = batch.inputs[:, 1 : 2 * task.pairs : 2]
    return np.take_along_axis(values, rng.integers(0, task.pairs, batch.targets.shape), 1)


GUESSES = {
    "addition": lambda task, batch, rng: rng.integers(0, 10, batch.targets.shape),
    "babi": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "brackets": lambda task, batch, rng: rng.integers(0, task.outputs, batch.targets.shape),
    "induction": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "modular": lambda task, batch, rng: rng.integers(0, task.outputs, batch.targets.shape),
    "parity": lambda task, batch, rng: rng.integers(0, task.outputs, batch.targets.shape),
    "retrieval": lambda task, batch, rng: rng.integers(0, 2, batch.targets.shape),
    "reverse": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "scan": lambda task, batch, rng: rng.integers(3, task.outputs, batch.targets.shape),
    "selective_copy": lambda task, batch, rng: rng.integers(2, task.outputs, batch.targets.shape),
    "sort": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "copy": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "listops": lambda task, batch, rng: rng.integers(0, 10, batch.targets.shape),
    "mlm": lambda task, batch, rng: np.full(batch.targets.shape, task.likeliest),
    "mqar": guess_value,
    "needle": lambda task, batch, rng: rng.integers(1, task.outputs, batch.targets.shape),
    "text": lambda task, batch, rng: rng.integers(0, task.outputs, batch.targets.shape),
    "pixels": lambda task, batch, rng: rng.integers(0, task.outputs, batch.targets.shape),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_is(name, choice):
    task = build(choice(name))
    described = json.loads(json.dumps(task.describe()))
    assert described["source"]
    text = type(task).__doc__ or ""
    assert "Metric:" in text and "Chance:" in text
    for option in spec.options(type(task)).values():
        assert option.help, f"{name}:{option.name} has no help"


@pytest.mark.parametrize("name", [name for name in TASKS if "pixels" not in name])  # an image has one length
def test_what_a_model_is_built_for_does_not_depend_on_the_length(name, choice):
    """So a model can be scored beyond the length that it was trained at, on the same task with the same options."""
    short, long = (build(choice(name), length) for length in LENGTHS.get(name, (32, 96)))
    assert short.setting.seq_len < long.setting.seq_len
    assert (short.vocab, short.outputs, short.channels, short.target) == (
        long.vocab,
        long.outputs,
        long.channels,
        long.target,
    )


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_shown_with_its_answer(name, choice):
    task = build(choice(name))
    batch = task.batch("test", 0)
    shown = [task.show(jax.tree.map(lambda array, row=row: array[row : row + 1], batch)) for row in range(8)]
    assert all(isinstance(text, str) and text for one in shown for key, text in one.items() if key != "then")
    assert len({json.dumps(one | {"answer": ""}) for one in shown}) > 1
    if task.channels:
        assert len({one["answer"] for one in shown}) == 8
    elif task.target == "sequence":
        assert {one["answer"] for one in shown} == {task.answer_name(int(answer)) for answer in batch.targets[:8]}
    else:
        for one, weights in zip(shown, batch.weights, strict=False):
            bounds = [part.split("..") for part in one["positions"].split(", ")]
            assert [n for first, *last in bounds for n in range(int(first), int((last or [first])[0]) + 1)] == list(
                np.flatnonzero(weights)
            )


@pytest.mark.parametrize(
    ("text", "length", "says"),
    [
        ("mqar:pairs=9", 32, "use pairs=8"),
        ("mqar:pairs=0", 32, "pairs=1"),
        ("mqar:pairs=8:vocab=17", 64, "vocab=18"),
        ("mqar:power=0", 64, "power"),
        ("mqar:pairs=1:vocab=8", 64, "larger vocab"),
        ("mqar:pair=4", 64, 'did you mean "pairs"'),
        ("mqar:pairs=four", 64, "whole number"),
        ("mqar:random_non_queries=maybe", 64, "true or false"),
        ("copy", 2, "seq_len=3"),
        ("copy", 6, "longer seq_len"),
        ("copy:symbols=1", 64, "symbols=2"),
        ("reverse:symbols=1", 64, "symbols=2"),
        ("addition", 4, "seq_len=8"),
        ("addition:reverse=maybe", 64, "true or false"),
        ("brackets:types=1", 64, "types=2"),
        ("brackets:depth=0", 64, "depth=1"),
        ("brackets", 4, "longer seq_len"),
        ("induction", 2, "seq_len=3"),
        ("induction:symbols=1", 64, "symbols=2"),
        ("modular:modulus=1", 64, "modulus=2"),
        ("modular", 3, "longer seq_len"),
        ("parity", 9, "longer seq_len"),
        ("pathfinder", 1000, "961 or 1024"),
        ("pathfinder", 64, "256 or 289"),
        ("pathfinder:dashes=1", 256, "2 dashes or more"),
        ("pathfinder:distractors=90", 1024, "fewer"),
        ("selective_copy:count=33", 64, "1 to 32"),
        ("selective_copy:symbols=1", 64, "symbols=2"),
        ("needle", 1, "seq_len=1"),
        ("needle", 2, "longer seq_len"),
        ("needle:symbols=1", 64, "symbols=2"),
        ("needle:noise=0", 64, "noise=1"),
        ("needle:distance=64", 64, "1 to 63"),
        ("needle:distance=0", 64, "1 to 63"),
        ("listops", 4, "seq_len=5"),
        ("listops:min_length=65", 64, "1 to 64"),
        ("listops:max_depth=1", 64, "max_depth=2"),
        ("listops:max_args=1", 64, "max_args=2"),
        ("listops:min_length=60:max_depth=2:max_args=3", 64, "smaller min_length"),
        ("listops:max_depth=2:max_args=2:min_length=4", 64, "larger max_args"),
        ("lm:path=a:hub=b", 64, "give one"),
        ("lm:config=a", 64, "hub=..."),
        ("lm:column=a", 64, "path=..."),
        ("lm:path=/nowhere/at/all.txt", 64, "does not exist"),
        ("lm:hub=nobody/nothing", 64, "not available offline"),
        ("lm", 10**9, "smaller seq_len"),
        ("text:path=a:hub=b", 64, "give one"),
        ("text:path=a:config=b", 64, "hub=..."),
        ("text:header=false", 64, "path=..."),
        ("text:path=nowhere.csv", 64, "does not exist"),
        ("text:hub=stanfordnlp/imdb", 64, "path=..."),
        ("text", 64, "stanfordnlp/imdb is not available offline"),
        ("retrieval", 64, "path="),
        ("retrieval:path=a:hub=b", 64, "path="),
        ("retrieval:path=nowhere", 64, "does not exist"),
        ("retrieval:path=a:config=b", 64, "hub=..."),
        ("retrieval:path=a:max_length=32", 64, "does not fit twice"),
        ("retrieval:path=a:preset=lra", 8000, "seq_len=8192"),
        ("series", 64, "path="),
        ("series:path=nowhere.csv", 64, "does not exist"),
        ("series:path=a.csv:horizon=0", 64, "horizon=1"),
        ("babi", 64, "path="),
        ("babi:path=nowhere", 64, "does not exist"),
        ("babi:path=a:number=21", 64, "use 1 to 20"),
        ("babi:path=a:number=1+1", 64, "twice"),
        ("scan", 64, "path="),
        ("scan:path=nowhere", 64, "does not exist"),
        ("pixels", 64, "path=..."),
        ("pixels:path=nowhere", 64, "does not exist"),
        ("translate", 64, "path=..."),
        ("translate:path=a:hub=b", 64, "path=..."),
        ("translate:path=a:source=en", 64, "nothing to translate"),
        ("translate:path=nowhere", 64, "does not exist"),
    ],
)
def test_impossible_options_are_one_clear_message(text, length, says):
    with pytest.raises(UsageError) as caught:
        build(text, length)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["copy:symbols=5000", "needle:noise=5000"])
def test_many_symbols_in_a_long_sequence(text):
    """The number of such sequences is beyond what a float holds."""
    assert build(text, 256).batch("test", 0).inputs.shape[1] == 256
