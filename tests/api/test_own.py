"""A class of the user's own as a choice: from a file, a script, a function, a notebook's cell."""

import functools
import importlib
import linecache
import pathlib
import runpy
import sys
import textwrap
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import sources, spec
from xformers_lab.api import own
from xformers_lab.api.arguments import items
from xformers_lab.attention.local import Local
from xformers_lab.errors import UsageError
from xformers_lab.nn.size import Size

SCALE, ODD = 0.5, object()


def halved(x):
    return x * SCALE


class Halving(Local):
    """A window, halved."""

    def __init__(self, size: Size, *, reach: int = 4, rngs):
        super().__init__(size, window=reach, rngs=rngs)

    def attend(self, q, k, v, **how):
        return jnp.asarray(halved(super().attend(q, k, v, **how)))


class Odd(Halving):
    """Uses what nobody can write down."""

    def attend(self, q, k, v, **how):
        return super().attend(q, k, v, **how) if ODD else v


def test_a_class_beside_others_is_kept_with_what_it_uses(tmp_path):
    path = own.choice(Halving, tmp_path)
    text = pathlib.Path(path).read_text()
    assert pathlib.Path(path).name == "halving.py" and path.startswith(f"{tmp_path}/source-")
    assert "import jax.numpy as jnp" in text and "SCALE = 0.5" in text and "def halved(x):" in text
    assert "ODD" not in text and "pytest" not in text
    assert own.choice(Halving, tmp_path) == path  # the same text is the same file
    assert spec.resolve("attention", path).options == {"reach": 4}
    assert sources.of({"attention": path}).keys() == {path}
    (config,), _, _ = configs.study(
        items((), {"attention": functools.partial(Halving, reach=8), "runs": str(tmp_path), "task": "copy"})
    )
    assert config.model.attention == f"{path}:reach=8"


def test_the_kept_file_stands_alone(tmp_path):
    alone = runpy.run_path(own.choice(Halving, tmp_path))["Halving"]
    assert alone is not Halving
    q = jnp.ones((8, 4))
    build = lambda kind: kind(Size(8, 4, 1), reach=2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(*(build(kind).attend(q, q, q, causal=True) for kind in (alone, Halving)))


def test_what_cannot_be_written_down_is_one_clear_error(tmp_path):
    with pytest.raises(UsageError, match=r"uses ODD, of type object, .*put the class into a file called odd\.py"):
        own.choice(Odd, tmp_path)
    plain: dict[str, Any] = {"__name__": "__main__"}
    exec("class Typed:\n    def attend(self):\n        pass\n", plain)  # as at a plain prompt
    with pytest.raises(UsageError, match=r"Typed: its source is not to be had; put the class into a file"):
        own.choice(plain["Typed"], tmp_path)
    with pytest.raises(UsageError, match="options have names"):
        own.choice(functools.partial(halved, 3), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written there"):
        own.choice(Halving, tmp_path / "file")


def test_a_class_in_a_function_takes_along_what_is_around_it(tmp_path):
    factor = 3

    class Inner(Local):
        def attend(self, q, k, v, **how):
            return jnp.multiply(factor, super().attend(q, k, v, **how))

    text = pathlib.Path(own.choice(Inner, tmp_path)).read_text()
    assert text.startswith(
        "from xformers_lab.attention.local import Local\nimport jax.numpy as jnp\n\nfactor = 3\n\nclass Inner(Local):"
    )


def test_a_class_of_the_package_is_its_name_and_one_of_a_file_its_file(tmp_path, monkeypatch):
    assert own.choice(Local, tmp_path) == "local"
    assert own.choice(functools.partial(Local, window=8), tmp_path) == "local:window=8"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    body = "from xformers_lab.attention.local import Local\nclass MyOwnAttention(Local):\n    pass\n"
    (tmp_path / "my_own_attention.py").write_text(body)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "my_own_attention.py").write_text(body)
    for module, name in {"my_own_attention": "my_own_attention.py", "my_package.my_own_attention": None}.items():
        assert own.choice(importlib.import_module(module).MyOwnAttention, tmp_path) == (name or module)
        for loaded in [known for known in sys.modules if known.startswith("my_")]:
            monkeypatch.delitem(sys.modules, loaded)


@pytest.fixture
def notebook(monkeypatch):
    """Runs cells as IPython does: in __main__, their text in linecache alone."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def run(number: int, text: str) -> types.ModuleType:
        name, text = f"<ipython-input-{number}-0a1b2c>", textwrap.dedent(text)
        monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(keepends=True), name))
        exec(compile(text, name, "exec"), vars(main))
        return main

    return run


def test_a_class_of_a_notebook_cell(notebook, tmp_path):
    notebook(1, "import jax.numpy as jnp\nfrom jax import Array\nfrom xformers_lab.attention.local import Local\n")
    notebook(2, "FACTORS = {'b': {'zz', 'a', 'mm'}, 'a': (1, float('inf'), [None])}")
    notebook(3, "def doubled(x: Array) -> Array:\n    return jnp.asarray(FACTORS['a'][0] * x)\n")
    cell = """
        class CellAttention(Local):
            def attend(self, q, k, v, **how):
                return doubled(super().attend(q, k, v, **how))
        """
    first = own.choice(notebook(4, cell).CellAttention, tmp_path)
    assert pathlib.Path(first).read_text() == textwrap.dedent("""\
        from jax import Array
        from xformers_lab.attention.local import Local
        import jax.numpy as jnp

        FACTORS = {'b': {'a', 'mm', 'zz'}, 'a': (1, float("inf"), [None])}

        def doubled(x: Array) -> Array:
            return jnp.asarray(FACTORS['a'][0] * x)

        class CellAttention(Local):
            def attend(self, q, k, v, **how):
                return doubled(super().attend(q, k, v, **how))
        """)
    assert runpy.run_path(first)["CellAttention"] is not vars(sys.modules["__main__"])["CellAttention"]
    notebook(5, "FACTORS = {'a': (3,)}")  # another value is another source, and so another run
    second = own.choice(notebook(6, cell).CellAttention, tmp_path)
    assert second != first and "FACTORS = {'a': (3,)}" in pathlib.Path(second).read_text()
    ids = [configs.identity(configs.edit(configs.Config(), attention=path)) for path in (first, second)]
    assert ids[0] != ids[1]
