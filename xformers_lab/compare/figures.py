"""What a worker says of a config's cost, in shapes alone: nothing is drawn and nothing compiles."""

import functools
from typing import Any

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.compare import match
from xformers_lab.config import Config
from xformers_lab.errors import Refused, UsageError, contained
from xformers_lab.supervise.worker import Tell


def measure(tell: Tell, config: dict, budget: str) -> float:
    """The figure of a config: parameters, training FLOPs per token, or bytes that decoding keeps of one sequence.
    Raises UsageError where it has none."""
    tell.doing("checking the cost of the reference")
    return _FIGURES[budget](configs.from_dict(config))


def solve(tell: Tell, config: dict, budget: str, target: float) -> dict[str, Any]:
    """{"reached": the figure, or None, "changed": {key: [from, to]}, "reason": why there is none} of the config that
    comes nearest to a target."""
    chosen = configs.from_dict(config)

    def figure(tried: Config) -> float:
        tell.doing("checking widths")
        return _FIGURES[budget](tried)

    headed = _headed(chosen)
    solved = match.solve(chosen, figure, target, headed=headed, decoding=budget == "state")
    reason = {} if solved.reached is not None else {"reason": _reason(chosen, budget)}
    return {"reached": solved.reached, "changed": match.changes(chosen, solved.config), **reason}


@functools.lru_cache(256)
def parameters(config: Config) -> int:
    """Parameters of a config's model."""
    import jax

    from xformers_lab.train.state import shapes

    return sum(leaf.size for leaf in jax.tree.leaves(_refusing(lambda: shapes(config, _task(config))[1])))


@functools.lru_cache(256)
def flops_per_token(config: Config) -> float:
    """Matrix-product FLOPs of one training step over the tokens in its batch."""
    import jax

    from xformers_lab.measure.flops import count_flops
    from xformers_lab.train import optimizer, prefetch
    from xformers_lab.train.state import abstract, merge, shapes
    from xformers_lab.train.step import make_train_step

    def count() -> int:
        task = _task(config)
        parts = shapes(config, task)
        graph, *_, memory = parts
        tx = optimizer.build(config.train, optimizer.roles(merge(*parts)))
        batch = prefetch.checked(task, "train", 0, bool(jax.tree.leaves(memory)))
        arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        return count_flops(make_train_step(config, task, graph, tx), abstract(config, task, tx), arrays)

    return _refusing(count) / (config.train.batch * config.seq_len)


@functools.lru_cache(256)
def state_bytes(config: Config) -> int:
    """Bytes that decoding keeps of one sequence of seq_len tokens."""
    import jax

    from xformers_lab.model import build_model

    kept = _refusing(lambda: jax.eval_shape(lambda: build_model(config, _task(config)).init_cache(1, config.seq_len)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


_FIGURES = {"params": parameters, "flops": flops_per_token, "state": state_bytes}


def _task(config: Config):
    from xformers_lab.model import build_task

    return build_task(config)


def _headed(config: Config) -> bool:
    """Whether the config's model has heads, which divide its width."""
    from xformers_lab.model import kind_of

    kind = kind_of(config, _task(config))
    return getattr(spec.entry("model", spec.parse(kind).name), "headed", True)


def _refusing(make) -> Any:
    """What make() gives; whatever a config cannot be raises UsageError."""
    try:
        with contained():
            return make()
    except UsageError:
        raise
    except (Refused, ValueError, OverflowError) as error:
        raise UsageError(str(error)) from None


def _reason(config: Config, budget: str) -> str:
    try:
        _FIGURES[budget](config)
    except UsageError as error:
        return str(error)
    return "no width of it has one"
