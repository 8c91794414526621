"""One small GPT-2 for both sides of a duel: its sizes, its weights under their names there, its prompts."""

import numpy as np

VOCAB, LENGTH, LAYERS, DIM, HEADS = 256, 512, 4, 256, 8
BATCH, PROMPT, NEW = 8, 16, 256


def prompts() -> np.ndarray:
    """(BATCH, PROMPT) tokens."""
    return np.random.default_rng(1).integers(0, VOCAB, (BATCH, PROMPT))


def weights() -> dict[str, np.ndarray]:
    """Every weight by its name in `GPT2LMHeadModel`. Biases of attention's projections are 0, for the lab has none."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
    zeros, ones = (lambda n: np.zeros(n, np.float32)), (lambda n: np.ones(n, np.float32))
    arrays = {"wte.weight": normal(VOCAB, DIM), "wpe.weight": normal(LENGTH, DIM)}
    for layer in range(LAYERS):
        of_layer = {
            "ln_1.weight": ones(DIM), "ln_1.bias": zeros(DIM), "ln_2.weight": ones(DIM), "ln_2.bias": zeros(DIM),
            "attn.c_attn.weight": normal(DIM, 3 * DIM), "attn.c_attn.bias": zeros(3 * DIM),
            "attn.c_proj.weight": normal(DIM, DIM), "attn.c_proj.bias": zeros(DIM),
            "mlp.c_fc.weight": normal(DIM, 4 * DIM), "mlp.c_fc.bias": normal(4 * DIM),
            "mlp.c_proj.weight": normal(4 * DIM, DIM), "mlp.c_proj.bias": normal(DIM),
        }  # fmt: skip
        arrays |= {f"h.{layer}.{name}": array for name, array in of_layer.items()}
    arrays |= {"ln_f.weight": ones(DIM), "ln_f.bias": zeros(DIM)}
    return {f"transformer.{name}": array for name, array in arrays.items()} | {"lm_head.weight": arrays["wte.weight"]}
