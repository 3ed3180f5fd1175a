"""Where a model looks: the MEAP paper's analysis of attention (Zhuang et al., 2025; claim 14), from the weights of the
hand-written attention, model.causal_attention.

    decay      how much less attention positions get once they read <MASK>
    variance   how much more unevenly the other positions are attended to
    shares     of the last token's attention: how much falls on the context before the answer, the answer, the context
               after it, and the query

MEAP's explanation of its gains is that masked tokens need no attention, so that what is left goes to what matters.
"""
from contextlib import contextmanager

import numpy as np
import torch

from objectives import mask_inputs

# A question whose answer stands in the middle, like the paper's example: context before, answer, context after, query.
PASSAGE = ("Paris is the capital of France and lies on the river Seine. Its museums and its parks have many visitors. "
           "One of its landmarks is known all over the world. ",
           "The Eiffel Tower was built from 1887 to 1889 by the company of the engineer Gustave Eiffel. ",
           "From the top one can see the whole city. At night it is lit by thousands of lamps, and there is a "
           "restaurant on the first floor. ",
           "Question: Who built the Eiffel Tower? Answer: It was built by")
SEGMENTS = ("context before", "answer", "context after", "query")


@contextmanager
def spelled_out(model):
    """Within it, the model uses the hand-written attention, whose weights can be read."""
    before, model.config.attention = model.config.attention, "manual"
    try:
        yield
    finally:
        model.config.attention = before


@torch.no_grad()
def weights(model, idx):
    """idx (B, T) -> the attention weights of every layer and head, (B, L, H, T, T): who looks, then at whom."""
    with spelled_out(model):
        model(idx)
    found = torch.stack([block.attn.weights for block in model.transformer.h], dim=1)
    for block in model.transformer.h:
        block.attn.weights = None
    return found


def received(model, rows):
    """rows (N, T) of ids -> Att (N, T): the attention that each position gets, a mean over layers, heads and the
    queries that see it, in units of what it would get if each query looked at all it sees alike (1 everywhere)."""
    T = rows.shape[1]
    device = next(model.parameters()).device
    sees = torch.arange(1, T + 1, device=device)
    found = []
    config = model.config
    size = max(1, 2**26 // (config.n_layer * config.n_head * T * T))  # weights of 256 MB at most
    for some in torch.from_numpy(np.asarray(rows, np.int64)).split(size):
        mean = weights(model, some.to(device)).float().mean((1, 2))             # (B, T, T)
        found.append(((mean * sees[:, None]).sum(1) / sees.flip(0)).cpu())     # T - j queries see position j
    return torch.cat(found).numpy().astype(np.float64)


def masked_change(plain_model, masked_model, tok, stream, n, seed, mask_ratio=0.15):
    """What masking changes, on n held-out windows: X_N, plain, read by one model; X_M, masked, by the same or another.

    Returns arrays (n,): Att(X_N) summed over the masked positions, and its fall to Att(X_M) there; the variance of
    Att(X_N) over the others, and its rise to that of Att(X_M). All falls over all of the first is the paper's decay,
    (Att(X_N[masked]) - Att(X_M[masked])) / Att(X_N[masked])."""
    rng = np.random.default_rng(seed)
    T = min(plain_model.config.block_size, masked_model.config.block_size)
    starts = rng.integers(len(stream) - T, size=n) if len(stream) > T else []
    plain = np.array([stream[start:start + T] for start in starts], np.int64).reshape(-1, T)
    masked = np.array([mask_inputs(row, mask_ratio, tok, rng) for row in plain], np.int64).reshape(-1, T)
    return compare(received(plain_model, plain), received(masked_model, masked), masked == tok.mask)


def compare(plain, masked, hidden):
    """Att(X_N), Att(X_M) and where X_M reads <MASK>, all (n, T) -> the four arrays (n,) of masked_change."""
    there = (plain * hidden).sum(1)
    before, after = (np.ma.array(att, mask=hidden).var(axis=1).filled(0) for att in (plain, masked))
    return there, there - (masked * hidden).sum(1), before, after - before


def shares(model, tok, segments=PASSAGE):
    """Of the last token's attention, how much falls on each of four texts: array (L * H, 4), whose rows sum to 1.

    Where they do not fit the context, the two contexts lose their far ends."""
    parts = fit([tok.encode(text) for text in segments], model.config.block_size)
    idx = torch.tensor([sum(parts, [])], device=next(model.parameters()).device)
    last = weights(model, idx)[0, :, :, -1].flatten(0, 1).float().cpu()         # (L * H, T)
    return torch.stack([part.sum(1) for part in last.split([len(part) for part in parts], dim=1)], dim=1).numpy()


def fit(parts, room):
    before, answer, after, query = parts
    surplus = max(0, sum(map(len, parts)) - room)
    from_before = min(len(before), max(surplus - len(after), surplus * len(before) // max(1, len(before) + len(after))))
    kept = [before[from_before:], answer, after[:max(0, len(after) - (surplus - from_before))], query]
    if sum(map(len, kept)) > room:
        raise ValueError(f"answer and query have {len(answer) + len(query)} tokens, the model's context holds {room}")
    return kept


def heatmap(model, tok, segments=PASSAGE, most=48):
    """The head whose last token looks most at the answer, on the answer and the query alone (at most `most` tokens):
    {"title", "labels": a text for each token, "weights": (T, T)}, plain values."""
    by_head = shares(model, tok, segments)[:, 1]
    layer, head = divmod(int(by_head.argmax()), model.config.n_head)
    ids = (tok.encode(segments[1]) + tok.encode(segments[3]))[-min(most, model.config.block_size):]
    found = weights(model, torch.tensor([ids], device=next(model.parameters()).device))[0, layer, head]
    return {"title": f"layer {layer + 1}, head {head + 1}", "labels": [tok.decode([i]) for i in ids],
            "weights": found.float().cpu().numpy().round(4).tolist()}
