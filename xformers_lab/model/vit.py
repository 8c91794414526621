import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import Config
from xformers_lab.errors import Refused
from xformers_lab.model.encoder import Encoder
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.tasks import Task


class Vit(Encoder):
    """Vision Transformer: an encoder whose tokens are patches of an image (Dosovitskiy et al., 2020, arXiv 2010.11929).

    x = [class token, W p_1 + b, ..., W p_n + b] for the n squares p of patch x patch grey levels, row by row, each
    level between 0 and 1; then positions, blocks, and a linear head on the class token (equations 1 to 4). All choices
    are built for these tokens, and told the plane of the patches. position=grid counts from behind the class token;
    attention=axial and image_local:form=2d need pool=mean, where the tokens are patches alone. A patch is valid where
    one of its pixels is.

    Options:
        patch: pixels of a patch's side
        pool: what the head looks at; token: a learned vector in front of the patches, mean: the mean of the patches
    """

    of_tokens = False

    def __init__(
        self,
        size: Size,
        *,
        patch: int = 4,
        pool: Literal["token", "mean"] = "token",
        config: Config,
        task: Task,
        rngs: nnx.Rngs,
    ):
        if task.image is None or task.target != "sequence":
            raise Refused("it reads images, and this task has none: use task=pixels, or model=encoder")
        rows, columns = task.image
        if patch < 1 or rows % patch or columns % patch:
            fitting = ", ".join(str(side) for side in range(1, rows + 1) if rows % side == 0 == columns % side)
            raise Refused(f"patch={patch} does not divide images of {rows}x{columns} pixels: use {fitting}")
        self.patch, self.token = patch, pool == "token"
        plane, ahead = (rows // patch, columns // patch), int(self.token)
        own = dataclasses.replace(size, length=math.prod(plane) + ahead, plane=plane, ahead=ahead)
        super().__init__(own, pool="first" if self.token else "mean", config=config, task=task, rngs=rngs)

    def input_layer(self, size: Size, task: Task, rngs: nnx.Rngs):
        assert task.image is not None
        return Patches(size, task.image, patch=self.patch, token=self.token, levels=task.vocab, rngs=rngs)

    # No packed data: it names no `documents`.
    def __call__(self, inputs, *, valid=None, key=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(inputs, valid=None if valid is None else self.embedding.valid(valid), key=key)


class Patches(nnx.Module):
    """Grey levels (B, rows * columns) below `levels` -> one vector for each patch, behind that of the class token."""

    def __init__(self, size: Size, image: tuple[int, int], *, patch: int, token: bool, levels: int, rngs: nnx.Rngs):
        self.image, self.patch, self.levels = image, patch, levels
        # Of unit size where all levels are as frequent: the mean square of numbers between 0 and 1 is a third.
        draw = nnx.initializers.variance_scaling(3.0, "fan_in", "truncated_normal")
        self.project = Linear(patch * patch, size.dim, kernel_init=draw, dtype=size.dtype, rngs=rngs)
        first = nnx.initializers.normal(1.0)
        self.token = nnx.Param(first(rngs.params(), (size.dim,)), decays=False) if token else None

    def __call__(self, inputs):
        x = self.project(self.cut(inputs).astype(jnp.float32) / (self.levels - 1))
        if self.token is None:
            return x
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        return jnp.concatenate([token, x], 1)

    def valid(self, valid):
        """Which tokens are valid where pixels (B, rows * columns) are."""
        patches = self.cut(valid).any(-1)
        return patches if self.token is None else jnp.pad(patches, ((0, 0), (1, 0)), constant_values=True)

    def cut(self, pixels):
        """(B, rows * columns) -> (B, patches, patch * patch), both row by row."""
        (rows, columns), side = self.image, self.patch
        squares = pixels.reshape(-1, rows // side, side, columns // side, side).swapaxes(2, 3)
        return squares.reshape(len(pixels), -1, side * side)
