"""A GPT, whole.

    ids (B, T) -> token embedding (B, T, C)
               -> n_layer x [x + attention(norm(x)); x + mlp(norm(x))] -> norm -> logits (B, T, V)

GPT-2's block (Radford et al., 2019) and names, with causal attention written out in causal_attention below.
Three switches help small models to learn several times faster: rotary positions (Su et al., 2021) in place of
GPT-2's learned vectors, normalised queries and keys (Henry et al., 2020), token shift (Peng et al., 2023).
B: rows, T: positions, C: n_embd, H: n_head, D = C / H: head size, V: vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -1  # targets with this value are excluded from the loss; objectives.IGNORE is the same number


@dataclass
class GPTConfig:
    """The shape of a model."""
    vocab_size: int
    block_size: int = 256        # T, the longest context
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 128            # C
    dropout: float = 0.0
    bias: bool = False           # in linear layers and norms, as GPT-2 has it
    position: str = "rope"       # or learned
    qk_norm: bool = True
    token_shift: bool = True     # attention and MLP read a quarter of their input from the previous token
    tied: bool = True            # the output layer shares the token embedding's weights
    gelu: str = "exact"          # or tanh: GPT-2's approximation, three times slower on a CPU
    attention: str = "manual"    # causal_attention below, or fused: torch's scaled_dot_product_attention


class GPT(nn.Module):
    def __init__(self, config):
        """Raises ValueError for a width that does not fit the number of heads."""
        super().__init__()
        self.config, head_size = config, config.n_embd // config.n_head
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        elif head_size % 2:
            raise ValueError(f"n_embd / n_head = {head_size}: expected an even head size, since rotary "
                             "positions rotate pairs")
        else:
            self.register_buffer("rotations", rope_rotations(config.block_size, head_size), persistent=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        # GPT-2's initialisation: standard deviation 0.02, less in the 2 n_layer linear layers whose outputs
        # add up in the residual stream.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) ids, targets (B, T) -> logits (B, T, V), loss: the mean cross-entropy in nats, or None
        without targets. With a KVCache, idx holds only the tokens not yet in the cache.

        Raises ValueError if the cached tokens and idx are more than block_size."""
        start = cache.length if cache else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the model's context of {self.config.block_size}")
        x = self.transformer.wte(idx)                                           # (B, T, C)
        rotations = None
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[start:end]
        else:
            rotations = self.rotations[:, start:end, None]                      # (2, T, 1, D)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, rotations, cache)
        logits = self.lm_head(self.transformer.ln_f(x))                         # (B, T, V)
        if cache:
            cache.length = end
        if targets is None:
            return logits, None
        # In fp32 also under bf16 arithmetic: the sum over V terms needs more than bf16's 8 bits.
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE,
                               reduction="sum")
        return logits, nats / (targets != IGNORE).sum().clamp(min=1)  # a batch may hold no target at all

    def n_params(self, embedding=True):
        """The number of parameters, shared ones once. embedding=False: without wte, wpe and lm_head."""
        outside = {id(p) for name, p in self.named_parameters() if not embedding and
                   name.split(".")[-2] in ("wte", "wpe", "lm_head")}
        return sum(p.numel() for p in self.parameters() if id(p) not in outside)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_shift = config.token_shift
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rotations, cache):
        for_attn = self.ln_1(x)                                                 # (B, T, C)
        if self.token_shift:
            for_attn = shift_tokens(for_attn, cache, (self, "for_attn"))
        x = x + self.attn(for_attn, rotations, cache)
        for_mlp = self.ln_2(x)
        if self.token_shift:
            for_mlp = shift_tokens(for_mlp, cache, (self, "for_mlp"))
        return x + self.mlp(for_mlp)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.weights = None
        if config.qk_norm:
            # Normalised, q . k / sqrt(D) is at most sqrt(D): the learned gain lets a head exceed this bound.
            self.gain = nn.Parameter(torch.full((config.n_head,), 1.5))

    def forward(self, x, rotations, cache):
        B, T, C = x.shape
        H = self.config.n_head
        qkv = self.c_attn(x).view(B, T, 3 * H, C // H)
        qk, v = qkv.split((2 * H, H), dim=2)                                    # (B, T, 2H, D), (B, T, H, D)
        if self.config.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rotations is not None:
            qk = rotate(qk, rotations)
        q, k = qk.split(H, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # each (B, H, T, D)
        if self.config.qk_norm:
            q = q * self.gain.to(q.dtype).view(-1, 1, 1)                        # one gain per head
        if cache:
            k, v = cache.store((self, "k"), k), cache.store((self, "v"), v)     # (B, H, S, D), S >= T
        dropout = self.config.dropout if self.training else 0.0
        if self.config.attention == "manual":
            y, weights = causal_attention(q, k, v, dropout)
            self.weights = None if self.training else weights                   # (B, H, T, S), for inspection
        else:
            mask = None if T in (1, k.shape[2]) else causal_mask(T, k.shape[2], q)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T == k.shape[2])
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def causal_attention(q, k, v, dropout=0.0):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(D) + mask) V (Vaswani et al., 2017, equation 1).

    q (B, H, T, D), k and v (B, H, S, D) -> output (B, H, T, D), weights (B, H, T, S). The queries are the
    last T of S positions (T = S in training); each attends to its own position and those before it. Each row
    of weights sums to 1; dropout acts on the weights that multiply V, not on those returned."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)                 # (B, H, T, S)
    if q.shape[2] > 1:  # a single query, the last position, attends to all
        scores += causal_mask(q.shape[2], k.shape[2], scores)                   # in place, to save memory
    weights = F.softmax(scores, dim=-1)
    return F.dropout(weights, dropout) @ v, weights


def causal_mask(T, S, like):
    """(T, S), the queries at the last T of S positions: 0 up to the query's own position, -inf after it.

    like: a tensor that has the mask's dtype and device."""
    return torch.full((T, S), float("-inf"), dtype=like.dtype, device=like.device).triu(S - T + 1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


def shift_tokens(x, cache, key):
    """x (B, T, C) -> x with its first C / 4 channels taken from the previous token (RWKV, Peng et al., 2023).

    Each position then knows which token precedes it, so attention can find "the first token after <PRE>" or
    "what followed this word before" in one layer instead of two. key: of x in the cache, if there is one."""
    T, quarter = x.shape[1], x.shape[-1] // 4
    moving = cache.store(key, x[..., :quarter]) if cache else x[..., :quarter]  # (B, S, C / 4), S >= T
    shifted = moving[:, -T - 1:-1] if moving.shape[1] > T else F.pad(moving[:, :-1], (0, 0, 1, 0))
    return torch.cat((shifted, x[..., quarter:]), dim=-1)


def rope_rotations(T, D):
    """(2, T, D): cos and sin of every position's angles, sin with the signs that rotate needs.

    The angle of pair i is position * 10000^(-2i/D) (RoFormer, section 3.2)."""
    angles = torch.outer(torch.arange(T, dtype=torch.float32), 10000.0 ** (-torch.arange(0, D, 2) / D))
    for function in (torch.cos, torch.sin):
        function(torch.zeros(1))  # a first call that threads share may be off by 1e-4 (pytorch issue 188792)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def rotate(x, rotations):
    """x (B, T, heads, D) with each pair (x[i], x[i + D/2]) rotated by its position's angle; q . k then
    depends on the distance of the two positions. rotations (2, T, 1, D): see rope_rotations.

        (a, b) -> (a cos - b sin, b cos + a sin)"""
    cos, sin = rotations.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """The keys and values computed so far, so that a new token needs a pass over one position, not all.

    length: the number of tokens in the cache, at most block_size. Lowering length drops the last tokens.
    parts: k and v of each layer, (B, H, block_size, D), and what its token shifts read, (B, block_size,
    C / 4). Each is allocated whole at first use; a new token is written in its place."""

    def __init__(self, config):
        self.block_size, self.length, self.parts = config.block_size, 0, {}

    def store(self, key, new):
        """Stores new (..., T, D), of the T tokens after the S in the cache -> (..., S + T, D), of all."""
        S, T = self.length, new.shape[-2]
        if key not in self.parts:
            self.parts[key] = new.new_empty(*new.shape[:-2], self.block_size, new.shape[-1])
        self.parts[key].narrow(-2, S, T).copy_(new)
        return self.parts[key].narrow(-2, 0, S + T)

    def repeat(self, n):
        """Repeats each row n times, side by side, so that n samples share one pass over their prompt."""
        self.parts = {key: part.repeat_interleave(n, 0) for key, part in self.parts.items()}
