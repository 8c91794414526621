"""Which part of a model a parameter belongs to."""

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from xformers_lab.attention import Attention
from xformers_lab.ffn import Ffn
from xformers_lab.memory import Memory
from xformers_lab.nn.embedding import Embedding
from xformers_lab.norm import Norm
from xformers_lab.position import Position

# What a part of a model is called, by the outermost of its modules that is one of these; any other module by the name
# that the model has for it: head, say.
PARTS: Mapping[type, str] = {
    Embedding: "embedding",
    Position: "position",
    Attention: "attention",
    Ffn: "ffn",
    Norm: "norm",
    Memory: "memory",
}
# What grows with the vocabulary and the length, not with what the layers do: Kaplan et al., 2020 (arXiv 2001.08361),
# table 1, count sizes without them.
OF_WORDS = ("embedding", "position", "head")


def parameters(model: nnx.Module) -> dict[str, int]:
    """Numbers of parameters by part."""
    parts: dict[str, int] = {}
    for part, leaf in _by_part(model):
        parts[part] = parts.get(part, 0) + leaf.size
    return parts


def of_words(model: nnx.Module) -> int:
    """Parameters of embeddings, positions and the head."""
    parts = parameters(model)
    return sum(parts.get(part, 0) for part in OF_WORDS)


def _by_part(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(part, array) of every parameter."""
    modules = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        above = (modules.get(path[:depth]) for depth in range(1, len(path)))
        named = (name for node in above for kind, name in PARTS.items() if isinstance(node, kind))
        yield next(named, str(path[0])), leaf.get_value()
