"""A trained model at other lengths: what is scored there, and what is refused before anything compiles."""

import json
import math

import jax
import kinds
import numpy as np
import pytest
from flax import nnx
from test_train import tiny

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.cli import main
from xformers_lab.config import edit
from xformers_lab.errors import UsageError
from xformers_lab.memory import Remembered
from xformers_lab.model import build_model, build_task
from xformers_lab.train import jobs, loop, otherwise, scoring, trained
from xformers_lab.train.state import init


def untrained(task: str = "copy", **changes):
    """A job at its first state."""
    config = tiny(task, **({"position": "none"} | changes))
    job = jobs.prepare(config, configs.folder(config))
    return job, job.layout.place_state(init(config, job.task, job.tx))


def scored(job, state, length: int):
    other, there = scoring.at(job, length)
    return scoring.score(there, scoring.moved(other, there, state), "test", 1, None, lambda: 0, lambda what: None)


def shapes(config):
    model = nnx.eval_shape(lambda: build_model(config, build_task(config)))
    return jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model, nnx.Not(Remembered))))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, with its record."""
    config = tiny("copy", tmp_path_factory.mktemp("runs"), position="alibi", test_len="8+32", eval_batches=1)
    return configs.folder(config), loop.run(config)


@pytest.mark.full
def test_the_record_has_the_lengths_asked_for(run):
    folder, record = run
    assert [row["seq_len"] for row in record["by_length"]] == [8, 32]
    for row in record["by_length"]:
        again = trained.evaluate(folder, length=row["seq_len"])
        assert {key: again[key] for key in row} == row
        assert math.isfinite(row["loss"]) and row["examples"] == 32
    assert json.loads((folder / "result.json").read_text())["by_length"] == record["by_length"]


def test_the_trained_length_scores_as_ever(run):
    folder, record = run
    assert trained.evaluate(folder, length=16)["loss"] == record["loss"] == trained.evaluate(folder)["loss"]


@pytest.mark.full
def test_eval_is_a_command(run, capsys):
    folder, record = run
    assert main(["eval", str(folder), "seq_len=32", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["seq_len"] == 32 and one["loss"] == record["by_length"][1]["loss"]
    assert main(["eval", str(folder), "seq_len=8..32:x2", "--json"]) == 0
    several = json.loads(capsys.readouterr().out)
    assert [row["seq_len"] for row in several] == [8, 16, 32]
    assert [several[0]["loss"], several[2]["loss"]] == [row["loss"] for row in record["by_length"]]
    assert main(["eval", str(folder), "seq_len=8,32"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["seq_len", "accuracy"] and [line.split()[0] for line in shown[1:]] == ["8", "32"]
    assert main(["eval", str(folder), "seq_len=32"]) == 0
    assert ["seq_len", "32"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("word", "message"),
    [("lr=3", "at other lengths"), ("seq_len=no", "whole number"), ("seq_len=2", "holds no copy"), ("x", "seq_len=64")],
)
def test_other_words_are_refused(run, capsys, word, message):
    assert main(["eval", str(run[0]), word]) == 2
    assert message in capsys.readouterr().err


def test_test_len_is_checked_and_tells_runs_apart():
    assert tiny("copy", test_len="256+128+128").test_len == "128+256"
    assert tiny("copy", test_len=64).test_len == "64" and tiny("copy", test_len="none").test_len is None
    assert configs.lengths("64+128") == [64, 128] and configs.lengths(None) == []
    for wrong in ("a", "64+", "0", "64+x", "1.5"):
        with pytest.raises(UsageError, match="test_len"):
            tiny("copy", test_len=wrong)
    several, varied = configs.sweep(["test_len=32,64+128"])
    assert varied == ["test_len"] and [config.test_len for config in several] == ["32", "64+128"]
    assert configs.identity(several[0]) != configs.identity(several[1])


@pytest.mark.full
def test_which_examples_are_scored_does_not_depend_on_the_batch():
    # The batch shrinks at a longer length: a third of it is no whole number, and one row is left in the end.
    batches = {}
    for batch in (9, 2):
        job, state = untrained(batch=batch)
        _, there = scoring.at(job, 48)
        batches[there.config.train.batch] = scored(job, state, 48).loss
    assert sorted(batches) == [1, 3] and batches[1] == pytest.approx(batches[3], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("position", spec.names("position"))
def test_every_position_goes_beyond_its_length_or_says_why_not(position):
    job, state = untrained(position=position, batch=4)
    try:
        otherwise.at(job.config, job.task, 32)
    except UsageError as error:
        assert f"position={position}" in str(error) and "seq_len=32" in str(error)
        assert position in ("learned", "tupe", "grid")
        return
    assert position not in ("learned", "tupe", "grid")  # the message names the mend
    assert math.isfinite(scored(job, state, 32).loss)


@pytest.mark.full
@pytest.mark.parametrize("position", ["learned", "tupe"])
def test_a_shorter_sequence_takes_the_first_rows(position):
    """As the model for the longer ones scores it, of which it is the beginning."""
    job, state = untrained(position=position)
    other, there = scoring.at(job, 8)
    moved = scoring.moved(other, there, state)
    model = nnx.merge(there.graph, moved.params, moved.extra, moved.memory)
    whole = nnx.merge(job.graph, state.params, state.extra, state.memory)
    inputs = job.task.batch("test", 0).inputs
    close = np.testing.assert_allclose
    close(model(inputs[:, :8])[0], whole(inputs)[0][:, :8], atol=1e-5, rtol=1e-5)


def test_a_table_that_is_no_row_of_positions_is_refused_at_shorter_lengths_too():
    with pytest.raises(UsageError, match=r"position=grid has columns of 4x16 and 3x16 at 16 and 8 tokens"):
        job, _ = untrained(position="grid")
        otherwise.at(job.config, job.task, 8)


@pytest.mark.full
@pytest.mark.parametrize("attention", kinds.one_of_each_kind())
def test_every_attention_has_the_same_parameters_at_twice_the_length_or_is_refused(attention):
    one_way = spec.entry("attention", attention).refuses.get("causal")
    config = tiny("listops" if one_way else "copy", attention=attention, position="none", seq_len=64, layers=2)
    task = build_task(config)
    if shapes(config) == shapes(edit(config, seq_len=128)):
        assert not otherwise.at(config, task, 128).rows
    else:
        with pytest.raises(UsageError, match=rf"seq_len=128: attention={attention} has \w+ of"):
            otherwise.at(config, task, 128)


def test_what_a_choice_makes_of_the_length_is_told(caplog):
    job, _ = untrained(attention="strided", seq_len=16)
    other, _ = scoring.at(job, 36)
    assert other.changed == {"attention.stride": [4, 6]}
    assert "seq_len=36: attention.stride is 6, trained with 4" in caplog.text
    said = otherwise.at(edit(job.config, attention="strided:stride=4"), job.task, 36)
    assert said.changed == {} and said.said() is None


def test_what_an_attention_says_it_makes_of_the_length_is_told():
    """The cosine of cosformer has a period of four lengths; its other features do not go by the length."""
    config = tiny("copy", position="none", attention="linear:features=cosformer")
    other = otherwise.at(config, build_task(config), 32)
    assert other.changed == {"attention.period": [64, 128]}
    assert "attention.period is 128, trained with 64" in (other.said() or "")
    config = edit(config, attention="linear")
    assert otherwise.at(config, build_task(config), 32).said() is None


@pytest.mark.parametrize("attention", ["bigbird:block=2", "random:block=2", "sparse:pattern=band(2)|random(2,1)"])
def test_blocks_that_are_drawn_for_a_length_are_told(attention):
    """Among more blocks others are drawn; without any drawn nothing changes."""
    config = tiny("copy", position="none", attention=attention)
    assert otherwise.at(config, build_task(config), 32).changed == {"attention.random_blocks_of": [8, 16]}
    config = edit(config, attention="bigbird:block=2:random=0")
    assert otherwise.at(config, build_task(config), 32).said() is None


OWN = """
import numpy as np
from xformers_lab.tasks import Batch, Task

class Where(Task):
    chance, kinds, target = 0.5, ("encoder",), "sequence"

    def __init__(self, setting):
        super().__init__(setting)
        self.vocab, self.outputs = 5, setting.seq_len

    def batch(self, split, step):
        inputs = np.random.default_rng(step).integers(0, 5, (self.setting.batch, self.setting.seq_len), dtype=np.int32)
        return Batch(inputs, inputs.argmax(1).astype(np.int32), np.ones(len(inputs), np.float32))
"""


def test_a_task_with_other_answers_is_refused(tmp_path):
    path = tmp_path / "where.py"
    path.write_text(OWN)
    job, _ = untrained(str(path))
    with pytest.raises(UsageError, match=r"seq_len=32: task .*where\.py has outputs=32 there, trained with 16"):
        otherwise.at(job.config, job.task, 32)


@pytest.mark.full
@pytest.mark.parametrize("model", ["encoder_decoder", "seq2seq", "lstm", "bytenet"])
def test_kinds_of_models_score_beyond_their_length(model):
    position = {"position": "rope"} if model == "encoder_decoder" else {"position": "learned"}
    job, state = untrained("reverse", model=model, batch=4, **position)
    if model == "encoder_decoder":
        assert build_model(
            otherwise.at(job.config, job.task, 32).config, build_task(edit(job.config, seq_len=32))
        ).source
    assert math.isfinite(scored(job, state, 32).loss)


@pytest.mark.full
def test_tables_of_both_sides_are_cut_in_an_encoder_decoder():
    job, state = untrained("reverse", model="encoder_decoder", position="learned", batch=4)
    assert set(otherwise.at(job.config, job.task, 8).rows) == {"position.table", "source_position.table"}
    assert math.isfinite(scored(job, state, 8).loss)


@pytest.mark.full
def test_what_is_remembered_begins_empty_at_another_length(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{number} bottles of beer on the wall.\n" for number in range(900)))
    job, state = untrained(f"lm:path={book}", position="rope", batch=4, memory="xl")
    other, there = scoring.at(job, 32)
    moved = scoring.moved(other, there, state)
    assert there.config.train.batch == 4  # it decides what is remembered
    assert all(not leaf.any() for leaf in jax.tree.leaves(moved.memory)) and jax.tree.leaves(moved.memory)
    assert math.isfinite(scored(job, state, 32).loss)


@pytest.mark.full
def test_a_length_that_cannot_be_is_refused_before_a_run_begins(tmp_path, capsys):
    words = [f"runs={tmp_path}", "task=copy", "seq_len=16", "dim=16", "steps=2", "test_len=32"]
    assert main(["train", *words]) == 2
    assert "position=learned has places for 16 tokens alone" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.full
def test_a_comparison_keeps_the_lengths(tmp_path, capsys):
    words = [f"runs={tmp_path}", "task=copy", "seq_len=16", "dim=16", "steps=2", "batch=4", "eval_batches=1"]
    flags = ["--skip-impossible", "--no-baselines", "--json"]
    assert main(["compare", *words, "position=learned,rope", "test_len=32", *flags]) == 5  # a row is refused
    learned, rope = json.loads(capsys.readouterr().out)
    assert learned["status"] == "refused" and "position=learned has places" in learned["reason"]
    assert [row["seq_len"] for row in rope["by_length"]] == [32]
