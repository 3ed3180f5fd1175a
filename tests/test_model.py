"""The model, against published formulas and torch's own functions; its cache, against a pass without one."""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import small_model
from model import GPT, IGNORE, GPTConfig, KVCache, causal_attention, causal_mask, rope_rotations, rotate

POSITIONS = pytest.mark.parametrize("position", ["rope", "learned"])
ATTENTIONS = pytest.mark.parametrize("attention", ["manual", "fused"])
IDX = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))


def test_attention_worked_by_hand():
    """Two positions, D = 1: the first sees itself alone; the second's scores are 2 x 0 and 2 x 0.5."""
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([3.0, 2.0], [0.0, 0.5], [10.0, 20.0]))
    output, weights = causal_attention(q, k, v)
    e = math.e
    assert weights.flatten().tolist() == pytest.approx([1, 0, 1 / (1 + e), e / (1 + e)])
    assert output.flatten().tolist() == pytest.approx([10, (10 + 20 * e) / (1 + e)])
    assert torch.equal(causal_attention(q, k, v, dropout=0.999)[1], weights)
    assert causal_attention(1e4 * q, k, v)[1].flatten().tolist() == [1, 0, 0, 1], "exp(5000) overflows"
    # Where all values are 1, an output is the sum of its weights: 1 in the mean, with dropout, too.
    sums, _ = causal_attention(*torch.randn(2, 1, 2, 99, 8), torch.ones(1, 2, 99, 8), dropout=0.5)
    assert (sums - sums[..., :1]).abs().max() < 1e-5 and abs(sums.mean() - 1) < 0.1 and sums.std() > 0.05


@pytest.mark.parametrize("S, rows", [(3, ["0--", "00-", "000"]), (5, ["000--", "0000-", "00000"])],
                         ids=["no_cache", "cache"])
def test_the_mask_worked_by_hand(S, rows):
    """Three queries: 0 where a query attends, - for minus infinity. A cache puts positions before them."""
    expected = [[{"0": 0.0, "-": -math.inf}[sign] for sign in row] for row in rows]
    for dtype in (torch.float64, torch.float32):
        mask = causal_mask(3, S, torch.zeros(1, dtype=dtype))
        assert mask.tolist() == expected
        assert mask.dtype == dtype
    assert causal_mask(3, S, torch.zeros(1, device="meta")).device.type == "meta"


@pytest.mark.parametrize("T, S", [(7, 7), (3, 7), (1, 7)])
def test_attention_and_its_gradients_are_those_of_torch(T, S):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    may_see = torch.tensor([[j <= S - T + i for j in range(S)] for i in range(T)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=may_see)
    output, weights = causal_attention(q, k, v)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    torch.testing.assert_close(*(torch.autograd.grad(y, (q, k, v), direction) for y in (output, expected)))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[..., ~may_see] == 0).all() and (weights[..., may_see] > 0).all()


def turned(x):
    """RoFormer, equation 12: position m multiplies pair i, as a complex number, by exp(i m 10000^(-2i/D))."""
    T, D = x.shape[-2:]
    theta = torch.tensor([10000 ** (-2 * i / D) for i in range(D // 2)])
    pairs = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * torch.arange(T)[:, None] * theta)
    return torch.cat((pairs.real, pairs.imag), -1)


@ATTENTIONS
@POSITIONS
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_model_computes_gpt2s_published_formulas(attention, position, qk_norm):
    """... with either attention, and also with RoPE and with normalised queries and keys."""
    model = small_model(60, attention=attention, position=position, qk_norm=qk_norm, bias=True, gelu="tanh",
                        token_shift=False)
    w = model.state_dict()

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][IDX]
    if position == "learned":
        x = x + w["transformer.wpe.weight"]
    for h in ("transformer.h.0", "transformer.h.1"):
        qkv = linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).unflatten(-1, (3, 2, 16))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, H, T, D) each
        if qk_norm:
            q, k = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (q, k))
            q = q * w[f"{h}.attn.gain"][:, None, None]
        if position == "rope":
            q, k = turned(q), turned(k)
        weights = (q @ k.mT / 16 ** 0.5).exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        x = x + linear(f"{h}.attn.c_proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))
        hidden = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
        x = x + linear(f"{h}.mlp.c_proj", hidden)
    expected = norm("transformer.ln_f", x) @ w["transformer.wte.weight"].T
    torch.testing.assert_close(model(IDX)[0], expected, rtol=1e-4, atol=1e-4)
    if attention == "manual":  # the weights can be looked at
        torch.testing.assert_close(model.transformer.h[1].attn.weights, weights, rtol=1e-4, atol=1e-4)


def test_rope_scores_depend_on_the_distance_alone():
    rotations = rope_rotations(50, 16)[:, :, None]                              # (2, T, 1, D)
    q, k = (rotate(torch.randn(16).expand(1, 50, 1, 16), rotations)[0, :, 0] for _ in "qk")
    scores = q @ k.T
    torch.testing.assert_close(scores[:-7, :-7], scores[7:, 7:], rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0.1
    x = torch.randn(2, 50, 3, 16)                                               # (B, T, heads, D)
    expected = turned(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(rotate(x, rotations), expected, rtol=1e-5, atol=1e-5)


@ATTENTIONS
@POSITIONS
def test_no_prediction_sees_the_future(attention, position):
    model = small_model(60, attention=attention, position=position)
    logits = model(IDX)[0]
    for t in (0, 1, 11, 23):
        changed = IDX.clone()
        changed[:, t] = (changed[:, t] + 1) % 60
        difference = (model(changed)[0] - logits).abs().amax((0, 2))
        assert (difference[:t] == 0).all() and (difference[t:] > 0).all()


@ATTENTIONS
@POSITIONS
@pytest.mark.parametrize("chunks", [[1] * 24, [5, 1, 12, 6], [23, 1]])
@torch.no_grad()
def test_the_kv_cache_changes_no_logits(attention, position, chunks):
    """Set back, it forgets what came behind, the token shift's last token, too. Each of two samples then goes
    its own way."""
    model = small_model(60, attention=attention, position=position)
    cache = KVCache(model.config)
    logits = torch.cat([model(part, cache=cache)[0] for part in IDX.split(chunks, dim=1)], 1)
    torch.testing.assert_close(logits, model(IDX)[0], rtol=1e-4, atol=1e-4)
    for more, seen in ((IDX[:, :1], cache), (torch.cat((IDX, IDX[:, :1]), 1), None)):
        with pytest.raises(ValueError, match="25 tokens .* context of 24"):
            model(more, cache=seen)

    other, cache.length = torch.cat((IDX[:, :9], IDX[:, 9:].flip(1)), 1), 9
    logits = model(other[:, 9:20], cache=cache)[0]
    torch.testing.assert_close(logits, model(other)[0][:, 9:20], rtol=1e-4, atol=1e-4)
    cache.repeat(2)
    fork = IDX[:, 2:6].reshape(4, 2)                                        # two ways to go on for each row
    expected = model(torch.cat((other[:, :20].repeat_interleave(2, 0), fork), 1))[0][:, 20:]
    torch.testing.assert_close(model(fork, cache=cache)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("ignored", [[], slice(0, 24, 3), slice(1, 24), slice(24)])
def test_the_loss_is_torchs_cross_entropy(bf16, ignored):
    """-log softmax(logits)[target], the mean over the targets that count, 0 if none does; its sums are in
    fp32 under bf16."""
    model, targets = small_model(60), IDX.roll(1)
    targets[:, ignored] = IGNORE
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, loss = model(IDX, targets)
    p = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    expected = -p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].log()[targets != IGNORE]
    torch.testing.assert_close(loss.double(), expected.sum() / max(1, len(expected)), rtol=1e-5, atol=1e-5)
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32) and loss.dtype == torch.float32
    assert all(p.isfinite().all() for p in torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(model(IDX)[0], model(IDX, targets)[0]) and model(IDX)[1] is None


def test_compiled_it_computes_the_same():
    """... as one graph, which train.py --compile needs for its speed."""
    model, targets = small_model(60, n_layer=1), IDX.roll(1)
    targets[:, ::3] = IGNORE
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDX, targets), model(IDX, targets))


def test_weights_start_as_in_gpt2():
    model = GPT(GPTConfig(1000, n_layer=3, n_embd=192, position="learned", bias=True, tied=False))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all() or name.endswith("gain"), name
        else:
            expected = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert abs(p.std() / expected - 1) < 0.03 and abs(p.mean()) < 0.001, name


@ATTENTIONS
def test_dropout_acts_at_every_site_in_training_and_nowhere_else(attention):
    model, plain = small_model(60, dropout=0.5, attention=attention), small_model(60)(IDX)[0]
    torch.testing.assert_close(model(IDX)[0], plain)
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(modules) == 1 + 2 * 2
    model.train()
    for site in (*modules, "attention weights"):
        for m in modules:
            m.p = 0.5 if m is site else 0.0
        model.config.dropout = 0.5 if site == "attention weights" else 0.0
        assert not torch.allclose(model(IDX)[0], plain, atol=1e-3)
