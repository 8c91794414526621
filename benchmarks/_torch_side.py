"""The peers a user would otherwise pick, in PyTorch: timed by `_worker.py`. Needs the extra `peers`."""

import functools

import torch


def case(name: str, **options):
    return globals()[name](**options)


def _qkv(B, N, T, H, grad):
    torch.manual_seed(0)
    return [torch.randn(B, N, T, H, requires_grad=grad) for _ in range(3)]


def _run(forward, inputs, grad):
    """The callable to time: forward alone, or forward and backward against a fixed cotangent."""
    if not grad:

        def run():
            with torch.no_grad():
                forward(*inputs)

        return run
    cotangent = torch.randn_like(forward(*inputs))

    def run():
        torch.autograd.grad(forward(*inputs), inputs, cotangent)

    return run


def sdpa(N=8, T=1024, H=64, B=1, causal=False, grad=False):
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
    return _run(attend, _qkv(B, N, T, H, grad), grad)


def product(B, M, K, N, left_major, right_major):
    """(B, M, K) times (B, K, N), either as it lies in memory; no batch axis where B is 1."""
    side = lambda *shape: torch.ones(shape[-2:] if B == 1 else shape)
    left = side(B, K, M).mT if left_major else side(B, M, K)
    right = side(B, K, N) if right_major else side(B, N, K).mT
    return lambda: torch.matmul(left, right)


def local(N=8, T=4096, H=64, B=1, window=128, causal=True, grad=False):
    """The local-attention package, exact windows: causal sees the last `window` keys and itself."""
    from local_attention import LocalAttention

    attend = LocalAttention(
        dim=H, window_size=window, causal=causal, look_backward=1, look_forward=0 if causal else 1,
        dropout=0.0, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True,
    )  # fmt: skip
    return _run(lambda q, k, v: attend(q, k, v), _qkv(B, N, T, H, grad), grad)


def linear(N=8, T=4096, H=64, B=1, chunk=64, grad=False):
    """Causal linear attention, elu + 1, chunked: chunk states by one cumulative sum, everything batched."""

    def attend(q, k, v):
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        q, k, v = (x.reshape(B, N, T // chunk, chunk, H) for x in (q, k, v))
        state = k.transpose(-1, -2) @ v
        state = state.cumsum(2) - state
        total = k.sum(3)
        total = total.cumsum(2) - total
        weights = (q @ k.transpose(-1, -2)).tril()
        out = weights @ v + q @ state
        norm = weights.sum(-1) + (q @ total.unsqueeze(-1)).squeeze(-1)
        return (out / norm.unsqueeze(-1)).reshape(B, N, T, H)

    return _run(attend, _qkv(B, N, T, H, grad), grad)


def train_step(layers=4, dim=256, heads=4, T=512, B=8, vocab=256, compiled=False):
    """One AdamW step, clipped, of a plain pre-LN decoder with SDPA: embedding, learned positions, GELU, linear head."""
    torch.manual_seed(0)
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x):
            q, k, v = (y.reshape(B, T, heads, -1).transpose(1, 2) for y in self.qkv(self.n1(x)).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, dim))
            return x + self.down(nn.functional.gelu(self.up(self.n2(x)), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.at = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(T, dim))
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

        def forward(self, tokens):
            x = self.embed(tokens) + self.at
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    tokens = torch.randint(vocab, (B, T + 1))

    def loss_of(tokens):
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.reshape(-1, vocab), tokens[:, 1:].reshape(-1))

    if compiled:
        loss_of = torch.compile(loss_of)

    def run():
        loss = loss_of(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def gpt2():
    """Greedy generation by the GPT-2 of _gpt2.py in `transformers`, with its static cache."""
    import _gpt2

    model, ids = _gpt2_model(), torch.from_numpy(_gpt2.prompts())
    how = {"max_new_tokens": _gpt2.NEW, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}

    def run():
        with torch.no_grad():
            model.generate(ids, **how)

    return run


def gpt2_logits() -> list:
    """Its logits of the prompts."""
    import _gpt2

    with torch.no_grad():
        return _gpt2_model()(torch.from_numpy(_gpt2.prompts())).logits.tolist()


def _gpt2_model():
    import _gpt2
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_gpt2.VOCAB, n_positions=_gpt2.LENGTH, n_embd=_gpt2.DIM, n_layer=_gpt2.LAYERS, n_head=_gpt2.HEADS,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in _gpt2.weights().items()}, strict=False)
    return model
