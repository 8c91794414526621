"""Images: how they are read, split and refused, and the model that reads them by patches."""

import gzip
import json
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import drawing, spec
from xformers_lab.cli import main
from xformers_lab.config import Config, edit, to_dict
from xformers_lab.errors import UsageError
from xformers_lab.model import build_model, build_task, check_config
from xformers_lab.report import patterns
from xformers_lab.tasks import SPLITS, Setting

COUNT, ROWS, COLUMNS = 120, 4, 6


@pytest.fixture
def drawn():
    """Images (COUNT, 4, 6) with a lit half, and which half, 3 for the upper, 8 for the lower."""
    rng = np.random.default_rng(0)
    image, upper = rng.integers(0, 60, (COUNT, ROWS, COLUMNS)), rng.random(COUNT) < 0.5
    image[:, : ROWS // 2] += 190 * upper[:, None, None]
    image[:, ROWS // 2 :] += 190 * ~upper[:, None, None]
    return image.astype(np.uint8), np.where(upper, 3, 8).astype(np.uint8)


def build(path, length: int = ROWS * COLUMNS, batch: int = 8, options: str = ""):
    return spec.build("task", f"pixels:path={path}{options}", Setting(length, batch))


def write_idx(path, array) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def pictures(task, split: str) -> dict[bytes, str]:
    """Every image of a split with the name of its class."""
    pixels, labels = task.corpus.splits[split]
    return {row.tobytes(): task.corpus.classes[label] for row, label in zip(pixels, labels, strict=True)}


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_as_mnist_has_them(tmp_path, drawn, suffix):
    """Test data stay test data; every image comes out as it went in, beside its label."""
    image, label = drawn
    for name, part in (("train", slice(0, 90)), ("t10k", slice(90, None))):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", image[part])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", label[part])
    (tmp_path / "SOURCE.md").write_text("where it is from")
    task = build(tmp_path)
    assert (task.vocab, task.outputs, task.chance, task.image) == (256, 2, 0.5, (ROWS, COLUMNS))
    whole = dict(zip((row.tobytes() for row in image), map(str, label), strict=True))
    assert pictures(task, "test") == dict(list(whole.items())[90:])
    assert pictures(task, "train") | pictures(task, "validation") == dict(list(whole.items())[:90])
    batch = task.batch("train", 2)
    for row, target in zip(batch.inputs, batch.targets, strict=True):
        assert whole[row.astype(np.uint8).tobytes()] == task.corpus.classes[target]


def test_npz_files(tmp_path, drawn):
    """One for each split, or one for all; extra axes of colours; one file of no split is split by a hash."""
    image, label = drawn
    parts, one, whole = tmp_path / "parts", tmp_path / "one.npz", tmp_path / "whole.npz"
    parts.mkdir()
    for name, part in (("train", slice(0, 90)), ("test", slice(90, None))):
        np.savez(parts / f"{name}.npz", image=image[part], label=label[part].astype(np.int64))
    grey = np.repeat(image[..., None], 3, 3)
    np.savez(one, x_train=grey[:90], y_train=label[:90], x_test=image[90:, ..., None], y_test=label[90:])
    for split in SPLITS:
        assert pictures(build(parts), split) == pictures(build(one), split)
    assert len(pictures(build(one), "test")) == 30
    np.savez(whole, image=image, label=label)
    sizes = [len(pictures(build(whole), split)) for split in SPLITS]
    assert sum(sizes) == COUNT and 80 <= sizes[0] <= 108 and min(sizes) > 3


def test_colours_become_grey_by_brightness(tmp_path):
    level = np.arange(60) + 190
    image = np.zeros((60, 2, 2, 3), np.uint8)
    image[:, 0, 0, 0] = image[:, 0, 1, 1] = image[:, 1, 0, 2] = level
    image[:, 1, 1] = level[:, None]
    np.savez(tmp_path / "images.npz", image=image, label=level % 2)
    rows = np.concatenate([build(tmp_path, 4).corpus.splits[split][0] for split in SPLITS]).astype(float)
    np.testing.assert_array_equal(rows, np.rint(rows[:, 3:] * np.array([[0.299, 0.587, 0.114, 1.0]])))


def test_shrink_takes_means_of_squares_and_splits_what_is_left(tmp_path, drawn):
    """Images that only differ in what shrinking hides are copies."""
    image, label = drawn
    twins = image.copy()
    twins[:, :2, :2] = image[:, :2, :2][:, ::-1, ::-1]
    np.savez(tmp_path / "images.npz", image=np.concatenate([image, twins]), label=np.concatenate([label, label]))
    task = build(tmp_path, 6, options=":shrink=2")
    assert task.image == (2, 3)
    for old in image:
        mean = [np.rint(old[r : r + 2, c : c + 2].mean()) for r in (0, 2) for c in (0, 2, 4)]
        assert sum(bytes(map(int, mean)) in pictures(task, split) for split in SPLITS) == 1
    assert not pictures(task, "train").keys() & pictures(task, "test").keys()


def test_a_copy_of_a_test_image_is_dropped_from_the_training_data(tmp_path, drawn):
    image, label = drawn
    np.savez(tmp_path / "train.npz", image=image, label=label)
    np.savez(tmp_path / "test.npz", image=image[:30], label=label[:30])
    task = build(tmp_path)
    assert task.describe()["copies_dropped"] == 30
    assert len(pictures(task, "test")) == 30
    assert len(pictures(task, "train") | pictures(task, "validation") | pictures(task, "test")) == COUNT
    assert sum(len(pictures(task, split)) for split in SPLITS) == COUNT


def test_every_image_comes_once_a_pass(tmp_path, drawn):
    np.savez(tmp_path / "test.npz", image=drawn[0], label=drawn[1])
    task = build(tmp_path, batch=1)
    count = len(pictures(task, "validation"))
    orders = [[task.batch("validation", step + at).inputs.tobytes() for at in range(count)] for step in (0, count)]
    assert len(set(orders[0])) == count and set(orders[0]) == set(orders[1]) and orders[0] != orders[1]


def test_real_images(shared):
    """MNIST's test set begins with a 7; CIFAR-10 in grey has its 2000 test images, evenly of ten classes."""
    for name in ("mnist_t10k", "cifar10_gray"):
        if not (shared / "data" / name).is_dir():
            pytest.skip(f"{name} is not here")
    folder = shared / "data" / "mnist_t10k"
    task = build(folder, 784)
    content = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = {image: label for split in SPLITS for image, label in pictures(task, split).items()}
    assert len(labels) == 10_000 and "".join(labels[content[i : i + 784]] for i in range(0, 7840, 784)) == "7210414959"
    task = build(shared / "data" / "cifar10_gray", 1024)
    assert list(np.bincount(task.corpus.splits["test"][1])) == [200] * 10 and task.chance == 0.1
    described = task.describe()
    assert described["train_images"] + described["validation_images"] + described["copies_dropped"] == 6000


REFUSED = {
    "another length": ({}, "", 23, "pixels need seq_len=24, got 23"),
    "shrink divides not": ({}, ":shrink=3", 24, "shrink=3 does not divide images of 4x6 pixels: use 1, 2"),
    "shrink of nothing": ({}, ":shrink=0", 24, "shrink must be at least 1"),
    "no labels": ({"label": None}, "", 24, "as many labels"),
    "fewer labels": ({"label": np.zeros(3, int)}, "", 24, "as many labels"),
    "one class": ({"label": np.zeros(COUNT, int)}, "", 24, "1 class(es)"),
    "fractions": ({"image": np.zeros((COUNT, 4, 6))}, "", 24, "images must be whole numbers, got float64"),
    "too bright": ({"image": np.full((COUNT, 4, 6), 256)}, "", 24, "levels from 0 to 255"),
    "two colours": ({"image": np.zeros((COUNT, 4, 6, 2), int)}, "", 24, "1 or 3 colours"),
    "all the same": ({"image": np.zeros((COUNT, 4, 6), int)}, "", 24, "give more images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_clear_message(tmp_path, drawn, case):
    changed, options, length, message = REFUSED[case]
    arrays = {"image": drawn[0], "label": drawn[1]} | changed
    np.savez(tmp_path / "images.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UsageError) as caught:
        build(tmp_path, length, options=options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("images-idx3-ubyte", b"", "no idx file"),
    ("images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\x09", "no idx file"),
    ("images-idx3-ubyte", struct.pack(">BBBBI", 0, 0, 8, 1, 5) + b"abcd", "not all of one"),
    ("images-idx3-ubyte", struct.pack(">BBBBI", 0, 0, 13, 1, 1) + b"abcd", "no idx file of bytes"),
    ("images-idx3-ubyte.gz", gzip.compress(b"much" * 100, mtime=0)[:-9], "cannot read"),
    ("train.npz", b"PK nothing", "cannot read"),
    ("train.npz", b"", "cannot read"),
    ("notes.txt", b"none", "has no images"),
])  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        build(tmp_path)


def test_sizes_may_not_be_mixed(tmp_path, drawn):
    np.savez(tmp_path / "train.npz", image=drawn[0], label=drawn[1])
    np.savez(tmp_path / "test.npz", image=drawn[0].swapaxes(1, 2), label=drawn[1])
    with pytest.raises(UsageError, match="4x6 and 6x4"):
        build(tmp_path)


# ---- models ------------------------------------------------------------------------------------------------------


def config(folder, drawn, **chosen) -> Config:
    np.savez(folder / "images.npz", image=drawn[0], label=drawn[1])
    small = {"seq_len": ROWS * COLUMNS, "dim": 16, "heads": 2, "layers": 1, "batch": 4}
    return edit(Config(), **({"task": f"pixels:path={folder}"} | small | chosen))


def run(model, inputs, **options):
    graph, variables = nnx.split(model)
    return jax.jit(lambda variables, *args: nnx.merge(graph, variables)(*args, **options)[0])(variables, inputs)


def vit(folder, drawn, **chosen) -> Any:
    settings = config(folder, drawn, **({"model": "vit:patch=2", "position": "grid"} | chosen))
    return build_model(settings, build_task(settings))


def test_patches_by_definition(tmp_path, drawn):
    model = vit(tmp_path, drawn)
    pixels = drawn[0][:3]
    out = np.asarray(model.embedding(jnp.asarray(pixels.reshape(3, -1), jnp.int32)))
    kernel, bias = np.asarray(model.embedding.project.kernel[...]), np.asarray(model.embedding.project.bias[...])
    assert out.shape == (3, 7, 16)
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(model.embedding.token[...], (3, 16)))
    for place, (row, column) in enumerate((row, column) for row in (0, 2) for column in (0, 2, 4)):
        square = pixels[:, row : row + 2, column : column + 2].reshape(3, 4) / 255
        np.testing.assert_allclose(out[:, 1 + place], square @ kernel + bias, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_pixels_that_are_not_real_leave_no_trace(tmp_path, drawn, pool):
    """Of patches none of whose pixels is valid; a patch with one valid pixel is valid."""
    model, inputs = vit(tmp_path, drawn, model=f"vit:patch=2:pool={pool}"), drawn[0][:3].astype(np.int32)
    valid = np.ones((3, ROWS, COLUMNS), bool)
    valid[:, 2:, 1:] = False
    other = inputs.copy()
    other[:, 2:, 2:] = 7
    out = [run(model, jnp.asarray(x.reshape(3, -1)), valid=jnp.asarray(valid.reshape(3, -1))) for x in (inputs, other)]
    np.testing.assert_array_equal(*out)
    assert (
        list(np.asarray(model.embedding.valid(jnp.asarray(valid.reshape(3, -1))))[0])
        == [True] * (5 if pool == "token" else 4) + [False] * 2
    )
    other[:, 2, 0] = 255
    seen = run(model, jnp.asarray(other.reshape(3, -1)), valid=jnp.asarray(valid.reshape(3, -1)))
    assert np.abs(seen - out[1]).max() > 1e-5


@pytest.mark.parametrize("chosen", [
    {"attention": "axial:shape=4x6", "position": "grid:width=6"},
    {"attention": "image_local:form=2d:shape=4x6:block=2x2", "position": "grid:width=6", "model": "decoder"},
    {"attention": "axial:shape=2x3", "position": "grid:width=3", "model": "vit:patch=2:pool=mean"},
    {"attention": "full", "position": "rope", "model": "vit:patch=1", "depth": "universal"},
], ids=str)  # fmt: skip
def test_planes_fit_images(tmp_path, drawn, chosen):
    check_config(config(tmp_path, drawn, **chosen))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["encoder", "decoder", "vit:patch=1", "vit:patch=1:pool=mean"])
def test_choices_are_told_the_plane(tmp_path, drawn, kind):
    """Rows and columns of an image that is no square, behind a class token where there is one."""
    model = vit(tmp_path, drawn, model=kind, position="grid")
    token = kind == "vit:patch=1"
    added = np.asarray(model.position.embed(jnp.zeros((1, 24 + token, 16)), jnp.arange(24 + token))[0])
    rows, columns = (np.asarray(table[...]) for table in (model.position.rows, model.position.columns))
    scale = model.position.scale / 1.5**0.5
    expected = [np.zeros(16)] * token + [scale * (row + column) for row in rows for column in columns]
    assert (len(rows), len(columns)) == (ROWS, COLUMNS)
    np.testing.assert_allclose(added, expected, atol=1e-6)
    if token:
        return
    row, column = np.divmod(np.arange(24), COLUMNS)
    for attention, near in (
        ("axial", (row[:, None] == row) | (column[:, None] == column)),
        (
            "image_local:form=2d:block=2x2:memory=0x0",
            (row[:, None] // 2 == row // 2) & (column[:, None] // 2 == column // 2),
        ),
    ):
        stack = vit(tmp_path, drawn, model=kind, attention=attention).stack
        pattern = stack.periods[0].attention.seen(kind == "decoder")
        seen = np.broadcast_to(pattern(np.arange(24)[:, None], np.arange(24)[None]), (24, 24))
        np.testing.assert_array_equal(seen, near & np.tri(24, dtype=bool) if kind == "decoder" else near)


@pytest.mark.parametrize("chosen, message", [
    ({"attention": "axial", "model": "vit:patch=1"}, "4x6 plane.* use model=vit:pool=mean"),
    ({"attention": "axial:shape=5x5", "model": "vit:patch=1"}, "use model=vit:pool=mean"),
    ({"attention": "image_local:form=2d", "model": "vit:patch=1"}, "use model=vit:pool=mean"),
    ({"attention": "axial", "depth": "funnel:blocks=2", "layers": 4}, "12 positions are not the 4x6 plane"),
    ({"model": "vit:patch=3"}, "patch=3 does not divide images of 4x6 pixels: use 1, 2"),
    ({"model": "vit:patch=0"}, "patch=0 does not divide"),
    ({"model": "vit", "task": "listops"}, "use task=pixels"),
    ({"attention": "axial:shape=4x6", "model": "vit:patch=2:pool=mean"}, "must be 6"),
    ({"attention": "axial:shape=5x6"}, "must be 24"),
    ({"ffn": "hash", "model": "vit:patch=2"}, "hash looks at the tokens"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_compiles(tmp_path, drawn, chosen, message):
    with pytest.raises(UsageError, match=message):
        check_config(config(tmp_path, drawn, **chosen))


def test_a_report_draws_no_patches_at_the_number_of_pixels(tmp_path, drawn):
    rows = [
        {"config": to_dict(config(tmp_path, drawn, attention="local:window=2", model=model))}
        for model in ("vit:patch=2", "encoder")
    ]
    assert [len(patterns.figures(part)) for part in (rows, rows[:1], rows[1:])] == [1, 0, 1]


def test_a_report_draws_the_plane_of_the_image(tmp_path, drawn):
    cell = {"config": to_dict(config(tmp_path, drawn, attention="axial", model="encoder")), "plane": [ROWS, COLUMNS]}
    row, column = np.divmod(np.arange(24), COLUMNS)
    expected = drawing.path((row[:, None] == row) | (column[:, None] == column))
    assert [figure.path for figure in patterns.figures([cell])] == [expected]


@pytest.mark.full
def test_patches_learn_which_half_is_lit(tmp_path, drawn, capsys):
    np.savez(tmp_path / "images.npz", image=drawn[0], label=drawn[1])
    small = ["seq_len=24", "dim=16", "heads=2", "layers=1", "batch=16", "eval_batches=2", "steps=30", "warmup=0"]
    chosen = [f"task=pixels:path={tmp_path / 'images.npz'}", "model=vit:patch=2", "position=grid", "lr=0.01"]
    assert main(["train", f"runs={tmp_path / 'runs'}", *small, *chosen, "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["metric"] > 0.9
    assert f"train: {record['data']['train_images']} images, 2 classes" in printed.err, "it says what was read"
    assert sum(entry["examples"] for entry in record["data"]["reading"]["splits"]) == COUNT
