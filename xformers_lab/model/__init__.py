"""The shelf of model kinds. One file = one class; built by `build_model` from a Config and a task."""

import contextlib
import dataclasses
import inspect
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from xformers_lab import spec
from xformers_lab.config import (
    LEAVES,
    MOST_LAYERS,
    Config,
    get,
    refuse_heads,
    refuse_schedule,
    refuse_selection,
    seed_of,
)
from xformers_lab.errors import BrokenChoice, Refused, UsageError, contained, in_words, outside
from xformers_lab.memory import Remembered
from xformers_lab.model import _memory, _widths
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.documents import why_not
from xformers_lab.nn.plan import AUTO, Plan
from xformers_lab.nn.platform import platform
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size
from xformers_lab.tasks import SPLITS, Setting, Task, without_test


class Model(nnx.Module):
    """Tokens to logits: what every kind of model keeps to.

    causal: whether a position sees only what stands before it, as tasks that predict the next token need.
    of_tokens: whether what its layers see as one position is one token of the inputs.
    source: how many of the first positions are read by an encoder; 0 where source and target are one sequence.
    endless: whether it decodes beyond the length that it was built for, as a memory lets it.
    headed: whether its layers have heads, which divide its width.
    most_layers: a model that writes its layers out one by one, not in a loop, compiles too long with more.
    """

    causal: ClassVar[bool] = False
    of_tokens: bool = True
    headed: ClassVar[bool] = True
    most_layers: ClassVar[int] = MOST_LAYERS
    source: int = 0
    endless: bool = False

    @required
    def __init__(self, size: Size, *, config: Config, task: Task, rngs: nnx.Rngs): ...

    @required
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        valid: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B *T outputs"], Aux]:
        """Logits of every token, or one row for every sequence, and auxiliary results.

        Args:
            inputs: Tokens.
            valid: What is no padding; None where nothing is padded.
            key: It turns on dropout and whatever else is random in training.

        A model that keeps the documents of packed data apart names `documents` in its signature, too, (B, T) int32 or
        None; others are refused for a task that packs. One whose layers may look at the positions that a task marks
        names `marked`, (B, T) bool or None; others are told of no marks.
        """
        ...

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether `__call__` names `documents` or `marked`."""
        return name in inspect.signature(cls.__call__).parameters

    @classmethod
    def given(cls, told: dict[str, Any]) -> dict[str, Any]:
        """What `__call__` is given of what a batch says beside its inputs: documents wherever there are any, marks
        where it has a place for them."""
        wanted = lambda name: name != "marked" or cls.takes(name)
        return {name: value for name, value in told.items() if value is not None and wanted(name)}

    def init_cache(self, B: int, length: int) -> Any:
        """What decoding remembers of up to `length` tokens of B sequences; raises Refused where it cannot decode."""
        raise Refused(f"model={type(self).__name__.lower()} cannot decode token by token")

    def read(self, cache: Any, sources: Int[Array, "B source"], valid: Bool[Array, "B source"]) -> Any:
        """An empty cache given whole sources, (B, source) int32, valid (B, source) bool; the target's first is next."""
        raise Refused(f"model={type(self).__name__.lower()} reads no source apart")

    def step(self, cache: Any, tokens: Int[Array, " B"]) -> tuple[Float[Array, "B outputs"], Any]:
        """One more token of every sequence, (B,) int32 -> logits (B, outputs) of what follows it, and the new cache."""
        raise Refused(f"model={type(self).__name__.lower()} cannot decode token by token")

    def step_several(self, cache: Any, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B outputs"], Any]:
        """T more tokens of every sequence, (B, T) int32 -> logits (B, outputs) of what follows the last, the cache."""

        def one(cache, token):
            logits, cache = self.step(cache, token)
            return cache, logits

        cache, logits = jax.lax.scan(one, cache, tokens.T)
        return logits[-1], cache

    def check_draft(self, layers: int) -> None:
        """Raises Refused where the first `layers` layers cannot propose tokens for the others to verify; else it has
        the three methods below. A cache is drafted on for some tokens, verified once, and rewound."""
        raise Refused(f"model={type(self).__name__.lower()} drafts nothing: leave it out, or use model=decoder")

    def draft(self, cache: Any, tokens: Int[Array, " B"], layers: int) -> tuple[Float[Array, "B D"], Any, Any]:
        """One more token of every sequence, read by the first `layers` layers alone -> their state, the head's logits
        of it (B, outputs), and the new cache."""
        raise NotImplementedError

    def verify(
        self, cache: Any, states: Float[Array, "B T D"], tokens: Int[Array, "B T"], layers: int
    ) -> tuple[Float[Array, "B T outputs"], Any]:
        """The T tokens that were drafted last, read by the other layers -> logits of what follows each, the cache."""
        raise NotImplementedError

    def rewound(self, before: Any, after: Any, tokens: Int[Array, "B T"], taken: Int[Array, ""]) -> Any:
        """The cache behind the first `taken` of the tokens that made `after` of `before`; raises Refused where a layer
        cannot go back."""
        raise NotImplementedError


def size_of(config: Config, plan: Plan | None = None) -> Size:
    """The sizes of a config, to be run by a plan, else the platform's, with the config's `remat` and `kernel`; raises
    UsageError where sizes do not fit one another."""
    model, asked = config.model, {"remat": config.train.remat, "kernel": config.train.kernel}
    if asked != {"remat": "none", "kernel": AUTO}:
        plan = dataclasses.replace(plan or Plan.of(platform()), **asked)
    try:
        return Size(config.seq_len, model.dim, model.heads, model.kv_heads, model.layers, model.dtype, plan=plan)
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_task(config: Config) -> Task:
    """The task of a config, which refuses its test split where the run is scored on the validation split."""
    setting = Setting(seq_len=config.seq_len, batch=config.train.batch, seed=seed_of(config, "data_seed"))
    task = spec.build("task", config.task, setting, where=f"task={config.task} seq_len={config.seq_len}")
    return without_test(task) if config.train.score == "validation" else task


def build_model(config: Config, task: Task, plan: Plan | None = None) -> Model:
    """The model of a config for a task, its parameters drawn from `init_seed`; raises UsageError.

    plan: how it runs, else the platform's; with the config's `remat` and `kernel`.
    """
    kind, size = kind_of(config, task), dataclasses.replace(size_of(config, plan), plane=task.image)
    entry = spec.entry("model", spec.parse(kind).name)
    size = dataclasses.replace(size, marks=task.marks if entry.takes("marked") else 0)
    most = getattr(entry, "most_layers", MOST_LAYERS)
    if size.layers > most:
        raise UsageError(f"layers={size.layers}: model={kind} has its layers one by one, at most {most}")
    if task.packed and not entry.takes("documents"):
        reason = "it reads a row from end to end"
        raise UsageError(why_not(f"model={spec.parse(kind).name}", reason, "model=decoder"))
    rngs = nnx.Rngs(seed_of(config, "init_seed"))
    model = spec.build("model", kind, size, config=config, task=task, rngs=rngs, where=f"model={kind}")
    if config.model.parametrisation == "mup":
        try:
            base = nnx.eval_shape(lambda: build_model(_widths.base_of(config), task))
        except UsageError as error:
            raise UsageError(f"parametrisation=mup: the model of base_dim={config.model.base_dim}: {error}") from None
        _widths.scale(model, base)
    return model


def kind_of(config: Config, task: Task) -> str:
    """`model=auto` resolved; raises UsageError where the task is not made for the model."""
    choice = config.model.model
    if choice == "auto":
        return task.kinds[0]
    if not spec.entry("model", spec.parse(choice).name).causal and "encoder" not in task.kinds:
        name = spec.parse(config.task).name
        raise UsageError(
            f"model={choice}: it sees both sides, so it would see the answers of task {name}; use model=decoder"
        )
    return choice


def check_config(config: Config) -> Task:
    """Everything about a config that can be wrong, found before anything compiles; raises UsageError. -> its task.

    Whatever a choice from outside the package raises becomes BrokenChoice; the package's own may raise only ValueError,
    and either refuses by raising Refused.
    """
    if config.train.batch % config.train.accumulate:
        raise UsageError(f"batch={config.train.batch} is not divisible by accumulate={config.train.accumulate}")
    refuse_selection(config)
    refuse_schedule(config)
    refuse_heads(config)
    _widths.refuse(config)
    size_of(config)
    _memory.refuse_activations(config)
    with _own_errors(config):
        task = build_task(config)
        _refuse_shaping(config, task)
        logits, remembered, parameters = _traced(config, task)
        _memory.refuse_activations(config, logits.size)
        _memory.refuse_parameters(config, task, parameters)
        # A memory reads each split in rows of its own, for which one may be too short.
        for split in SPLITS if jax.tree.leaves(remembered) else ():
            if split != "test" or config.train.score == "test":
                task.segment(split, 0)
    return task


def _refuse_shaping(config: Config, task: Task) -> None:
    """Raises UsageError where the training loss of a task that is no cross-entropy of its own is to be shaped."""
    asked = {key: get(config, key) for key in ("label_smoothing", "z_loss") if get(config, key)}
    if asked and type(task).loss is not Task.loss:
        words = " ".join(f"{key}={value:g}" for key, value in asked.items())
        raise UsageError(
            f"{words}: task {spec.parse(config.task).name} has a loss that is no cross-entropy; leave it out"
        )


def check_built(config: Config, task: Task) -> None:
    """Raises UsageError where the model of a config cannot be built for a task, or refuses to run; nothing compiles."""
    with _own_errors(config):
        _traced(config, task)


@contextlib.contextmanager
def _own_errors(config: Config):
    """What a config can be blamed for becomes UsageError; see `check_config`."""
    try:
        with contained():
            yield
    except BrokenChoice as error:
        raise BrokenChoice(": ".join(filter(None, [", ".join(_outsiders(config)), str(error)]))) from error
    except UsageError:
        raise
    except Exception as error:
        own = _outsiders(config)
        mine = isinstance(error, (ValueError, OverflowError)) and not (own and outside(error))
        if mine or isinstance(error, Refused):
            raise UsageError(str(error)) from None
        if own:
            raise BrokenChoice(f"{', '.join(own)}: {in_words(error)}") from error
        raise


def _traced(config: Config, task: Task):
    """What `_forward_once` gives, in shapes."""
    return jax.eval_shape(lambda: _forward_once(config, task))


def _outsiders(config: Config) -> list[str]:
    """The choices of a config that live outside the package, as key=choice."""
    chosen = [
        (key, shelf, part)
        for key, (_, field, _) in LEAVES.items()
        if (shelf := field.metadata["shelf"])
        for part in spec.split(str(get(config, key)), "+")
    ]
    inside = lambda shelf, part: (shelf == "model" and part == "auto") or spec.digest(shelf, part) is None
    return [f"{key}={part}" for key, shelf, part in chosen if not inside(shelf, part)]


def _forward_once(config: Config, task: Task):
    """The logits of one sequence, what the model remembers of it, and its parameters."""
    shape = (1, config.seq_len)
    inputs = jax.numpy.zeros((*shape, task.channels), "float32") if task.channels else jax.numpy.zeros(shape, "int32")
    model = build_model(config, task)
    remembered = nnx.to_pure_dict(nnx.state(model, Remembered))
    parameters = nnx.state(model, nnx.Param)
    told = {"documents": jax.numpy.zeros(shape, "int32")} if task.packed else {}
    told |= {"marked": jax.numpy.zeros(shape, bool)} if task.marks else {}
    return model(inputs, valid=jax.numpy.ones(shape, bool), **model.given(told))[0], remembered, parameters
