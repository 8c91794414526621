"""Small random weights for a module of torch, and what the tests read of it."""

# pyright: reportMissingImports=false

import torch


def small(module):
    """The module in evaluation mode, with every parameter drawn anew: matrices by their last axis, vectors by 0.4."""
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.4))
    return module.eval()


def weights(module) -> dict:
    """{"w.<torch name>": tensor}, buffers that are saved among them."""
    return {f"w.{name}": tensor for name, tensor in module.state_dict().items()}


def qkv(q_shape: tuple[int, ...], k_shape: tuple[int, ...] = (), v_shape: tuple[int, ...] = ()) -> dict:
    """Queries, keys of their shape where none is said, and values of the keys' shape."""
    k_shape = k_shape or q_shape
    shapes = {"q": q_shape, "k": k_shape, "v": v_shape or k_shape}
    return {name: torch.randn(shape) for name, shape in shapes.items()}
