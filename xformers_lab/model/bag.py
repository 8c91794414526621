import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import Config
from xformers_lab.errors import Refused
from xformers_lab.model import Model
from xformers_lab.model._recurrent import refuse_unused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.dropout import drop
from xformers_lab.nn.embedding import first_layer
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task


class Bag(Model):
    """Bag of tokens: a network on the mean of the embeddings so far, blind to order (Iyyer et al., 2015, the deep
    averaging network). What it solves needs no attention. Dropout is on the embeddings and on every layer's output."""

    causal = True
    headed = False
    most_layers = 64

    def __init__(self, size: Size, *, config: Config, task: Task, rngs: nnx.Rngs):
        refuse_unused("bag", config)
        self.target, self.dim, self.dropout = task.target, size.dim, config.model.dropout
        self.embedding = first_layer(task.vocab, task.channels, size.dim, dtype=size.dtype, rngs=rngs)
        self.layers = nnx.List(Linear(size.dim, size.dim, dtype=size.dtype, rngs=rngs) for _ in range(size.layers))
        self.head = Linear(size.dim, task.outputs, dtype=size.dtype, rngs=rngs)

    def __call__(self, inputs, *, valid=None, key=None):
        keys = [None] * (len(self.layers) + 1) if key is None else list(jax.random.split(key, len(self.layers) + 1))
        valid = jnp.ones(inputs.shape[:2], bool) if valid is None else valid
        x = drop(self.embedding(inputs), self.dropout, keys[0])
        x = jnp.where(valid[..., None], x, 0).astype(jnp.float32)
        mean = jnp.cumsum(x, 1) / jnp.maximum(jnp.cumsum(valid, 1), 1)[..., None]
        return self._answer(mean[:, -1] if self.target == "sequence" else mean, keys[1:]), Aux()

    def _answer(self, mean, keys):
        x = mean.astype(self.embedding.dtype or jnp.float32)
        for layer, key in zip(self.layers, keys, strict=True):
            x = drop(jax.nn.relu(layer(x)), self.dropout, key)
        return self.head(x).astype(jnp.float32)

    def init_cache(self, B: int, length: int):
        if self.target == "sequence":
            raise Refused("this model gives one answer per sequence, not one per token: there is nothing to decode")
        return {"sum": jnp.zeros((1, B, self.dim)), "seen": jnp.zeros(())}

    def step(self, cache, tokens):
        total, seen = cache["sum"] + self.embedding(tokens), cache["seen"] + 1
        return self._answer(total[0] / seen, [None] * len(self.layers)), {"sum": total, "seen": seen}
