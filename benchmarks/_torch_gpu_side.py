"""PyTorch's side on a GPU: scaled_dot_product_attention, and flex_attention compiled with a mechanism's predicate."""

import jax
import torch

from xformers_lab import spec

jax.config.update("jax_platforms", "cpu")  # the mechanism is built for its predicate alone
INNER = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(name: str, **options):
    return globals()[name](**options)


def machine() -> dict:
    return {"torch": torch.__version__}


def sdpa(choice: str, T: int, B: int, N: int, H: int, causal: bool, grad: bool):
    attend = torch.nn.functional.scaled_dot_product_attention
    return _timed(lambda q, k, v: attend(q, k, v, is_causal=causal), T, B, N, H, grad)


def flex(choice: str, T: int, B: int, N: int, H: int, causal: bool, grad: bool):
    """The same mask: a pattern's predicate takes torch's integers as it takes JAX's, but where it has a table."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mechanism = spec.build("attention", choice, length=T, dim=N * H, heads=N)
    pattern = mechanism.seen(causal)
    mask = create_block_mask(lambda b, h, q, k: pattern(q, k), None, None, T, T, DEVICE, _compile=DEVICE == "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return _timed(lambda q, k, v: compiled(q, k, v, block_mask=mask), T, B, N, H, grad)


def _timed(forward, T: int, B: int, N: int, H: int, grad: bool):
    torch.manual_seed(0)
    make = lambda: torch.randn(B, N, T, H, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (make().requires_grad_(grad) for _ in range(3))
    cotangent = make()

    def once():
        if not grad:
            with torch.no_grad():
                return forward(q, k, v)
        return torch.autograd.grad(forward(q, k, v), (q, k, v), cotangent)

    def several():
        for _ in range(INNER):
            once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return several
