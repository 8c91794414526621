"""Layers that normalise, their scales and shifts marked as what does not decay."""

import functools

from flax import nnx

still = {"decays": False}
LayerNorm = functools.partial(nnx.LayerNorm, scale_metadata=still, bias_metadata=still)
RMSNorm = functools.partial(nnx.RMSNorm, scale_metadata=still)
