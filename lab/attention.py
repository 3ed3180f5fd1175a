"""Where a model looks: the MEAP paper's analysis of attention. It explains MEAP's gains so: masked tokens
need no attention (it decays), and more is left for the tokens that matter (its variance over the others
rises, and so does the share on the answer to a question).
"""
import numpy as np
import torch


@torch.no_grad()
def weights(model, idx):
    """idx (B, T) -> attention weights of every layer and head, (B, L, H, T, T): by query, then by key."""
    before, model.config.attention = model.config.attention, "manual"  # the kind whose weights can be read
    try:
        model(idx)
    finally:
        model.config.attention = before
    by_layer = torch.stack([block.attn.weights for block in model.transformer.h], dim=1)
    for block in model.transformer.h:
        block.attn.weights = None
    return by_layer


def received(model, rows):
    """rows (N, T) of ids -> Att (N, T): the attention that each position gets, a mean over layers, heads and
    the queries that see it, times the number of positions each query sees: 1 everywhere if attention is
    uniform."""
    T, config, parts = rows.shape[1], model.config, []
    device = next(model.parameters()).device
    n_seen = torch.arange(1, T + 1, device=device)
    size = max(1, 2**26 // (config.n_layer * config.n_head * T * T))  # weights of 256 MB at most
    for batch in torch.from_numpy(np.asarray(rows, np.int64)).split(size):
        mean = weights(model, batch.to(device)).float().mean((1, 2))            # (B, T, T)
        parts.append(((mean * n_seen[:, None]).sum(1) / n_seen.flip(0)).cpu())  # T - j queries see position j
    return torch.cat(parts).numpy().astype(np.float64)


def compare(plain, masked, is_masked):
    """Att(X_N), Att(X_M) and where X_M is <MASK>, all (n, T) -> arrays (n,): Att(X_N) summed over the masked
    positions, and its fall to Att(X_M); the variance of Att(X_N) over the other positions, and its rise to
    that of Att(X_M).

    sum(fall) / sum(before) is the paper's decay, (Att(X_N[masked]) - Att(X_M[masked])) / Att(X_N[masked])."""
    before = (plain * is_masked).sum(1)
    fall = before - (masked * is_masked).sum(1)
    variance, after = (np.ma.array(att, mask=is_masked).var(axis=1).filled(0) for att in (plain, masked))
    return before, fall, variance, after - variance


def shares(model, tok, segments):
    """Of the last token's attention, how much falls on each of n texts, which together fit the context: array
    (L * H, n), whose rows sum to 1."""
    parts = [tok.encode(text) for text in segments]
    idx = torch.tensor([sum(parts, [])], device=next(model.parameters()).device)
    last = weights(model, idx)[0, :, :, -1].flatten(0, 1).float().cpu()         # (L * H, T)
    by_part = last.split([len(part) for part in parts], dim=1)
    return torch.stack([part.sum(1) for part in by_part], dim=1).numpy()
