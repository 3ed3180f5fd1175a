"""A GPT, whole.

    ids (B, T) -> token embedding (B, T, C) -> n_layer x [x + attention(norm(x)); x + mlp(norm(x))] -> norm -> logits (B, T, V)

GPT-2's block (Radford et al., 2019) and names, with the causal attention spelled out in causal_attention below. Three
switches help small models to learn several times faster: rotary positions (Su et al., 2021) in place of GPT-2's learned
vectors, normalised queries and keys (Henry et al., 2020), and a token shift (Peng et al., 2023).
B: rows, T: positions, C: n_embd, H: heads, D = C / H: head size, V: vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -1  # targets with this value cost nothing; objectives.IGNORE is the same number


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError where it does not fit together."""
    vocab_size: int
    block_size: int = 256        # T, the longest context
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 128            # C
    dropout: float = 0.0
    bias: bool = False           # in linear layers and norms, as GPT-2 has it
    position: str = "rope"       # or learned
    qk_norm: bool = True
    token_shift: bool = True     # attention reads a quarter of its input from the token before: see shift_tokens
    tied: bool = True            # the output layer shares the token embedding's weights
    gelu: str = "none"           # exact, or tanh: GPT-2's approximation, three times slower on a CPU
    attention: str = "manual"    # causal_attention below, or fused: torch's scaled_dot_product_attention

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: expected 0 to below 1")
        for name, choices in (("position", ("rope", "learned")), ("gelu", ("none", "tanh")),
                              ("attention", ("fused", "manual"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)}: expected one of {', '.join(choices)}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"head size n_embd / n_head = {self.n_embd // self.n_head}: expected an even number for rope")


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("rotations", rope_rotations(config.block_size, config.n_embd // config.n_head), False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        # GPT-2's initialisation: N(0, 0.02), and the layers that write into the residual stream smaller, since 2 per
        # block add up there.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) ids -> (logits (B, T, V), loss): the mean cross-entropy in nats, or None without targets (B, T).

        With a KVCache, idx holds only the tokens that the cache has not seen. Raises ValueError past block_size."""
        start = cache.length if cache else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the model's context of {self.config.block_size}")
        x = self.transformer.wte(idx)                                           # (B, T, C)
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[start:end]
            rotations = None
        else:
            rotations = self.rotations[:, start:end]                            # (2, T, D)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, rotations, cache.layers[i] if cache else None)
        logits = self.lm_head(self.transformer.ln_f(x))                         # (B, T, V)
        if cache:
            cache.length = end
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())

    def n_params(self, embedding=True):
        """The number of parameters, shared ones once; without token and position embeddings if asked."""
        outside = {id(p) for name, p in self.named_parameters() if not embedding and
                   name.split(".")[-2] in ("wte", "wpe", "lm_head")}
        return sum(p.numel() for p in self.parameters() if id(p) not in outside)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rotations, cache):
        x = x + self.attn(self.ln_1(x), rotations, cache)
        return x + self.mlp(self.ln_2(x))


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.weights = None
        if config.qk_norm:
            # Normalised, q . k / sqrt(D) is at most sqrt(D): the gain, learned, lets a head be as sure as it needs to be.
            self.gain = nn.Parameter(torch.full((config.n_head,), 1.5))

    def forward(self, x, rotations, cache):
        B, T, C = x.shape
        if self.config.token_shift:
            x = shift_tokens(x, cache)
        qkv = self.c_attn(x).view(B, T, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)   # (3, B, H, T, D)
        qk, v = qkv[:2], qkv[2]
        if self.config.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rotations is not None:
            qk = rotate(qk, rotations)
        q, k = qk                                                               # each (B, H, T, D)
        if self.config.qk_norm:
            q = q * self.gain.to(q.dtype).view(-1, 1, 1)                        # one gain a head
        if cache is not None:
            k, v = cache.store("k", k), cache.store("v", v)                     # (B, H, S, D), S >= T
        dropout = self.config.dropout if self.training else 0.0
        if self.config.attention == "manual":
            y, weights = causal_attention(q, k, v, dropout)
            self.weights = None if self.training else weights                   # (B, H, T, S), for whoever looks
        elif T == k.shape[2]:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            mask = causal_mask(T, k.shape[2], q) if T > 1 else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def causal_attention(q, k, v, dropout=0.0):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(D) + mask) V (Vaswani et al., 2017, equation 1).

    q (B, H, T, D), k and v (B, H, S, D) -> output (B, H, T, D), weights (B, H, T, S). The queries are the last T of S
    positions (T = S in training); each sees itself and what comes before it. Each row of weights sums to 1."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)                 # (B, H, T, S)
    if q.shape[2] > 1:  # the last position sees all
        scores = scores + causal_mask(q.shape[2], k.shape[2], scores)
    weights = F.softmax(scores, dim=-1)
    return F.dropout(weights, dropout) @ v, weights


def causal_mask(T, S, like):
    """(T, S): 0 where query i of the last T positions may see key j, -inf where j comes after it."""
    return torch.full((T, S), float("-inf"), dtype=like.dtype, device=like.device).triu(S - T + 1)


def shift_tokens(x, cache=None):
    """x (B, T, C) -> the same with the first quarter of the channels taken from the token before (RWKV, Peng et al., 2023).

    The cache knows what stands in front of x. Each position then knows which token it follows, so that "the first token
    after <PRE>", where the suffix begins, or "what came after this word last time" is found by one attention layer in
    place of two."""
    T, quarter = x.shape[1], x.shape[-1] // 4
    moving = cache.store("x", x[..., :quarter]) if cache else x[..., :quarter]  # (B, S, C / 4), S >= T
    shifted = moving[:, -T - 1:-1] if moving.shape[1] > T else F.pad(moving[:, :-1], (0, 0, 1, 0))
    return torch.cat((shifted, x[..., quarter:]), dim=-1)


def cross_entropy(logits, targets):
    """Mean cross-entropy in nats of logits (N, V) against targets (N,), those that are IGNORE left out.

    N x V is by far the largest array of a step. torch.compile fuses the line below so that it never stands in fp32;
    without it, CrossEntropy sees to that."""
    if torch.compiler.is_compiling():
        total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)
    return CrossEntropy.apply(logits, targets)


class CrossEntropy(torch.autograd.Function):
    """cross_entropy, by hand, at a fifth of the time of torch's own on a CPU: the probabilities are made in fp32 a few
    rows at a time, and all that is kept of them is the gradient, in the logits' own type."""

    @staticmethod
    def forward(ctx, logits, targets):
        kept = targets != IGNORE
        n = kept.sum().clamp(min=1)
        loss = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits)
        rows = 2048 if logits.device.type == "cuda" else 256                    # keeps a GPU busy; fills a CPU's cache
        for some in zip(*(part.split(rows) for part in (logits, targets, kept, gradient))):
            some_logits, target, keep, out = some
            target = target.clamp(min=0)[:, None]
            x = some_logits.float()                                             # (rows, V)
            p = F.softmax(x, dim=-1)
            log_z = x.amax(dim=1) - p.amax(dim=1).log()                         # log sum exp x, as log p = x - log_z
            loss += ((log_z - x.gather(1, target)[:, 0]) * keep).sum()
            # d loss / d logits = (softmax(logits) - one_hot(target)) / n
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            out.copy_(p.mul_((keep / n)[:, None]))
        ctx.save_for_backward(gradient)
        return loss / n

    @staticmethod
    def backward(ctx, grad_loss):
        gradient, = ctx.saved_tensors
        return gradient.mul_(grad_loss), None


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


def rope_rotations(T, D):
    """cos and, with the signs that rotate needs, sin of every position's angles: (2, T, D).

    Pair i turns by position * 10000^(-2i/D) (RoFormer, section 3.2)."""
    angles = torch.outer(torch.arange(T, dtype=torch.float32), 10000.0 ** (-torch.arange(0, D, 2) / D))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def rotate(x, rotations):
    """x (..., T, D) with each pair (x[i], x[i + D/2]) turned by its position's angle: scores then depend on distance."""
    cos, sin = rotations.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """The keys and values that a model has computed so far, so that generating a token costs one position, not all.

    length: how many tokens it holds, at most block_size. Set lower, it forgets those behind; they are written over."""

    def __init__(self, config):
        self.block_size, self.length = config.block_size, 0
        self.layers = [LayerCache(self) for _ in range(config.n_layer)]

    def repeat(self, n):
        """Each row becomes n neighbouring ones: samples that share a prompt share the pass over it."""
        for layer in self.layers:
            layer.parts = {name: part.repeat_interleave(n, 0) for name, part in layer.parts.items()}


class LayerCache:
    """One layer's k and v (B, H, block_size, D), and what the positions before are needed for besides attention: x (B,
    block_size, C / 4) in shift_tokens.

    Each is allocated whole when it is first used: a new token is then written in its place, and nothing is copied."""

    def __init__(self, cache):
        self.cache, self.parts = cache, {}

    def store(self, name, new):
        """new (..., T, D), of the T tokens after the cache's S -> (..., S + T, D): the same of all of them."""
        S, T = self.cache.length, new.shape[-2]
        if name not in self.parts:
            self.parts[name] = new.new_empty(*new.shape[:-2], self.cache.block_size, new.shape[-1])
        self.parts[name].narrow(-2, S, T).copy_(new)
        return self.parts[name].narrow(-2, 0, S + T)
