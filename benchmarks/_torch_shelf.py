"""Peers of the attention shelf, in PyTorch: timed by `_worker.py`. Needs the extra `peers`.

Cores take (B, N, T, H); modules take (B, T, D) and include their projections, as their users run them.
"""

import torch
from _torch_side import _qkv, _run, sdpa

nn = torch.nn


def case(name: str, **options):
    return globals()[name](**options)


def _module(module, T, grad, B=1, D=512):
    """Forward, or forward and backward to the input and every parameter."""
    torch.manual_seed(0)
    module.train(grad)
    x = torch.randn(B, T, D, requires_grad=grad)

    def out():
        output = module(x)
        return output[0] if isinstance(output, tuple) else output

    if not grad:

        def run():
            with torch.no_grad():
                out()

        return run
    cotangent = torch.randn_like(out())
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run():
        torch.autograd.grad(out(), inputs, cotangent, allow_unused=True)

    return run


# ---- cores -------------------------------------------------------------------------------------------------------


def bigbird(N=8, T=4096, H=64, B=1, block=64, rand=3, grad=False):
    """The block-sparse core of transformers' BigBird, nothing padded."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=N * H, num_attention_heads=N, num_hidden_layers=1, block_size=block, num_random_blocks=rand,
        max_position_embeddings=T, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    core = BigBirdBlockSparseAttention(config, seed=0)
    blocked, band, start, end = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(B, T), block)

    def attend(q, k, v):
        return core.bigbird_block_sparse_attention(
            q, k, v, band, start, end, blocked, blocked, N, rand, H, block, block, B, T, T,
            seed=0, plan_from_length=None, plan_num_rand_blocks=None,
        )[0]  # fmt: skip

    return _run(attend, _qkv(B, N, T, H, grad), grad)


def longformer(N=8, T=4096, H=64, B=1, window=128, grad=False):
    """The sliding-chunks core of transformers' Longformer: `window` keys on each side, no global token."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=N * H, num_attention_heads=N, attention_window=[2 * window])
    core = LongformerSelfAttention(config, 0)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q * H**-0.5, k, v))
        scores = core._sliding_chunks_query_key_matmul(q, k, window)
        weights = nn.functional.softmax(scores, -1)
        return core._sliding_chunks_matmul_attn_probs_value(weights, v, window).transpose(1, 2)

    return _run(attend, _qkv(B, N, T, H, grad), grad)


def flex(N=8, T=4096, H=64, B=1, pattern="longformer", window=128, block=64, rand=3, grad=False):
    """Compiled flex_attention with the block mask of a pattern; it has no backward on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert not grad
    last = T // block - 1
    torch.manual_seed(0)
    drawn = torch.zeros(last + 1, last + 1, dtype=torch.bool)
    drawn[torch.arange(last + 1)[:, None], torch.randint(last + 1, (last + 1, rand))] = True

    def band(b, h, q, k):
        return (q - k <= window) & (k - q <= window)

    def bigbird(b, h, q, k):
        i, j = q // block, k // block
        near = (i - j <= 1) & (j - i <= 1)
        return near | (i == 0) | (j == 0) | (i == last) | (j == last) | drawn[i, j]

    mask = create_block_mask({"longformer": band, "bigbird": bigbird}[pattern], None, None, T, T, "cpu", BLOCK_SIZE=64)
    torch._dynamo.reset()  # each length a program of its own: with lengths left open, some masks do not compile
    compiled = torch.compile(flex_attention, dynamic=False)
    return _run(lambda q, k, v: compiled(q, k, v, block_mask=mask), _qkv(B, N, T, H, grad), grad)


def performer(N=8, T=4096, H=64, B=1, features=256, causal=False, grad=False):
    """FastAttention of performer-pytorch; causal without its CUDA extension, as a CPU runs it."""
    from performer_pytorch import FastAttention

    return _run(FastAttention(H, nb_features=features, causal=causal), _qkv(B, N, T, H, grad), grad)


# ---- modules -----------------------------------------------------------------------------------------------------


def nystrom(T=4096, landmarks=64, grad=False):
    from nystrom_attention import NystromAttention

    return _module(NystromAttention(512, dim_head=64, heads=8, num_landmarks=landmarks, residual=False), T, grad)


def linformer(T=4096, rank=256, grad=False):
    from linformer import LinformerSelfAttention

    return _module(LinformerSelfAttention(512, T, k=rank, heads=8), T, grad)


def axial(T=4096, side=64, grad=False):
    """Rows and columns, each with its own projections, on a square grid."""
    from axial_attention import AxialAttention

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = AxialAttention(512, num_dimensions=2, heads=8)

        def forward(self, x):
            return self.inner(x.reshape(x.shape[0], side, side, 512)).reshape(x.shape)

    assert side * side == T
    return _module(Flat(), T, grad)


def routing(T=4096, window=128, grad=False):
    from routing_transformer.routing_transformer import SelfAttention

    module = SelfAttention(512, 1, T, 8, 0, window, dim_head=64, rel_pos_emb=False)
    return _module(module, T, grad)


def reformer(T=4096, bucket=64, rounds=4, grad=False):
    from reformer_pytorch import LSHSelfAttention

    return _module(LSHSelfAttention(512, heads=8, bucket_size=bucket, n_hashes=rounds), T, grad)


__all__ = ["case", "sdpa"]


def recurrent(kind="lstm", layers=1, B=32, T=128, D=256, grad=False):
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](D, D, layers, batch_first=True)
    return _module(module, T, grad, B, D)
