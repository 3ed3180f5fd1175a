"""GPT-2's weights in and out, against a forward pass written here from the paper and the published files
alone."""
import importlib.util
import json
import math
import random
import re
import struct
from functools import partial

import pytest
import torch

import train
from conftest import save_run, small_model
from data import Tokenizer
from lab import gpt2
from lab.gpt2 import load_gpt2, read_safetensors, save_gpt2, save_tokenizer, write_safetensors
from model import GPT, GPTConfig
from objectives import fim_prompt
from sample import encode_raw, infill, load_model

V, T, C, L, H = 257, 32, 48, 3, 4


@pytest.fixture
def published():
    """A state dict as published: no prefix, no sentinels, Conv1D's (in, out) matrices, the mask as a
    buffer."""
    torch.manual_seed(1)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(L):
        shapes |= {f"h.{i}.{name}": shape for name, shape in {
            "ln_1.weight": (C,), "ln_1.bias": (C,), "attn.bias": (1, 1, T, T),
            "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,), "attn.c_proj.weight": (C, C),
            "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,), "mlp.c_fc.weight": (C, 4 * C),
            "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}.items()}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    """GPT-2's tokenizer is a download; single bytes stand in for it, with <|endoftext|> behind the last."""
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)


def reference(w, idx):
    """GPT-2, one position and one head at a time. idx: list of ids -> logits (T, V)."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = torch.stack([w["wte.weight"][i] + w["wpe.weight"][t] for t, i in enumerate(idx)])
    for layer in range(L):
        q, k, v = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(C, dim=-1)
        y = torch.zeros_like(x)
        for t in range(len(idx)):
            for head in range(H):
                part = slice(head * C // H, (head + 1) * C // H)
                p = torch.softmax(k[:t + 1, part] @ q[t, part] / math.sqrt(C // H), 0)
                y[t, part] = p @ v[:t + 1, part]
        x = x + linear(y, f"h.{layer}.attn.c_proj")
        h = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def write(weights, folder, form="bin", **config):
    (folder / "config.json").write_text(json.dumps({"n_head": H} | config))
    if form == "safetensors":
        write_safetensors(folder / "model.safetensors", weights)
        return folder / "model.safetensors"
    torch.save(weights, folder / "pytorch_model.bin")
    return folder if form == "folder" else folder / "pytorch_model.bin"


def build(start):
    model = GPT(GPTConfig(**start["model_config"]))
    model.load_state_dict(start["model"])
    return model.eval()


def test_a_safetensors_file_worked_by_hand(tmp_path):
    """The header's length in 8 bytes, the header padded to a multiple of 8 with spaces, the numbers."""
    write_safetensors(tmp_path / "f", {"a": torch.tensor([[1.0, 2.0]])})
    header = b'{"__metadata__": {"format": "pt"}, '
    header += b'"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}      '
    length, numbers = bytes([len(header), 0, 0, 0, 0, 0, 0, 0]), struct.pack("<2f", 1, 2)
    assert (tmp_path / "f").read_bytes() == length + header + numbers
    assert torch.equal(read_safetensors(tmp_path / "f")["a"], torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("form", ["bin", "safetensors", "folder", "prefixed"])
def test_published_weights_give_the_reference_logits(form, published, tmp_path):
    weights = published
    if form == "prefixed":  # as transformers' GPT2LMHeadModel.state_dict() names them
        weights = {f"transformer.{name}": w for name, w in published.items()}
        weights["lm_head.weight"] = published["wte.weight"]
    model, idx = build(load_gpt2(write(weights, tmp_path, form))), torch.randint(V, (20,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([idx]))[0][0]
    torch.testing.assert_close(logits[:, :V], reference(published, idx), atol=1e-4, rtol=1e-4)


def test_missing_special_tokens_get_the_mean_embedding(published, tmp_path):
    wte = load_gpt2(write(published, tmp_path))["model"]["transformer.wte.weight"]
    assert len(wte) == Tokenizer.bytes().n_vocab == V + 4
    torch.testing.assert_close(wte[V:], published["wte.weight"].mean(0).expand(4, -1))
    assert torch.equal(wte[:V], published["wte.weight"])


def test_training_goes_on_from_published_weights(published, tmp_path, documents):
    (tmp_path / "text.py").write_text(documents[0])
    path = write(published, tmp_path, "safetensors")
    flags = (f"--init-from {path} --objective fim_spm --data {tmp_path}/text.py --cache-dir {tmp_path}/cache "
             f"--steps 2 --warmup 1 --batch-size 2 --device cpu --block-size 24 --out {tmp_path}/run")
    train.main(flags.split())
    model, _, _ = load_model(tmp_path / "run")
    assert model.config.block_size == 24 and model.config.position == "learned"
    moved = model.state_dict()["transformer.h.0.mlp.c_fc.weight"] - published["h.0.mlp.c_fc.weight"].T
    assert 0 < moved.abs().max() < 0.1


def test_an_untied_head_and_exact_gelu_are_obeyed(published, tmp_path):
    head = torch.randn(V, C)
    start = load_gpt2(write(published | {"lm_head.weight": head}, tmp_path, tie_word_embeddings=False,
                            activation_function="gelu"))
    assert not start["model_config"]["tied"] and start["model_config"]["gelu"] == "exact"
    model = build(start)
    assert torch.equal(model.lm_head.weight[:V], head)
    assert torch.equal(model.transformer.wte.weight[:V], published["wte.weight"])


@pytest.mark.parametrize("key, value, expected", [
    ("n_head", "2", "1 or 2 or 3 or 4"), ("n_head", 5, "1 or 2"), ("n_head", None, "1"), ("n_head", 2.0, "1"),
    ("n_layer", 2, "3"), ("n_embd", 64, "48"), ("n_positions", 64, "32"), ("n_inner", 100, "null or 192"),
    ("activation_function", "relu", '"gelu_new" or "gelu"'), ("layer_norm_epsilon", 1e-6, "1e-05"),
    ("tie_word_embeddings", False, "true"), ("scale_attn_weights", False, "true"), ("eos_token_id", 0, "256"),
    ("scale_attn_by_inverse_layer_idx", True, "false"), ("add_cross_attention", True, "false"),
    ("model_type", "t5", '"gpt2"')])
def test_a_config_that_differs_from_gpt2_is_refused_by_name(key, value, expected, published, tmp_path):
    path = write(published, tmp_path, **{key: value})
    message = re.escape(f"config.json: {key} is {json.dumps(value)}, expected {expected}")
    with pytest.raises(OSError, match=message):
        load_gpt2(path)


@pytest.mark.parametrize("config", ["[]", "3", "null", "{", "[" * 10**5])
def test_a_config_that_is_no_object_is_refused(config, published, tmp_path):
    path = write(published, tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(OSError, match="config.json: not a JSON object of settings"):
        load_gpt2(path)


@pytest.mark.parametrize("name, content, message", [
    ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "not a whole state dict"),
    ("pytorch_model.bin", b"hello", "not a whole state dict"), ("pytorch_model.bin", None, "no such file"),
    ("", None, "expected a run, or a model.safetensors or pytorch_model.bin of GPT-2"),
    ("pytorch_model.bin", {"wte.weight": torch.zeros(300, C), "wpe.weight": torch.zeros(T, C),
                           "h.0.x": torch.zeros(1)}, "300 tokens, GPT-2's 257")])
def test_other_files_are_refused_in_one_sentence(name, content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        torch.save(content, tmp_path / name)
    with pytest.raises(OSError, match=message):
        load_gpt2(tmp_path / name)


def test_weights_go_out_as_they_came_in(published, tmp_path):
    save_gpt2(build(load_gpt2(write(published, tmp_path))), Tokenizer.bytes(), tmp_path / "out")
    again = read_safetensors(tmp_path / "out/model.safetensors")
    published = {name: w for name, w in published.items() if ".attn.bias" not in name}
    assert {name.removeprefix("transformer."): w.shape for name, w in again.items() if "wte" not in name} == {
        name: w.shape for name, w in published.items() if "wte" not in name}
    assert all(torch.equal(again[f"transformer.{name}"][:len(w)], w) for name, w in published.items())
    once, twice = (build(load_gpt2(folder)).state_dict() for folder in (tmp_path, tmp_path / "out"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_tokenizer_json_worked_by_hand(tmp_path):
    """Every way to cut a token in two is a merge, in the order of the joined token, then of the left part."""
    tok = Tokenizer([*(bytes([i]) for i in range(256)), b"bc", b" a", b"abc", b" abc"])
    save_tokenizer(tok, tmp_path, 16)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    assert whole["model"]["merges"] == [["b", "c"], ["Ġ", "a"], ["a", "bc"], ["Ġ", "abc"], ["Ġa", "bc"]]
    vocab = whole["model"]["vocab"]
    assert len(vocab) == 260 and [vocab[text] for text in ("Ċ", "Ġ", "!", "Ġabc")] == [10, 32, 33, 259]
    added = [(token["id"], token["content"]) for token in whole["added_tokens"]]
    assert added == [(260, "<EOT>"), (261, "<PRE>"), (262, "<SUF>"), (263, "<MID>"), (264, "<MASK>")]


needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                        reason="needs the transformers package")


@needs_transformers
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_same_logits(tied, published, tmp_path):
    import transformers
    start = load_gpt2(write(published, tmp_path))
    start["model_config"]["tied"] = tied
    if not tied:
        start["model"]["lm_head.weight"] = torch.randn_like(start["model"]["lm_head.weight"])
    model, idx = build(start), torch.randint(V, (2, 20))
    save_gpt2(model, Tokenizer.bytes(), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def random_strings(n):
    """Code, languages, emoji, spaces, control characters, sentinels' names, and any character at all."""
    rng = random.Random(1)
    parts = ["def f(x):\n    return x_1", "self.", "    ", "\t", "\r\n", "\n\n", " ", "\u3000", "'s", "don't",
             "1234567", "Größe", "naïve", "Ελλάδα", "привет", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "你好",
             "こんにちは", "한국어", "🚀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "Ⅷ", "②", "\0", "\x7f", "\u200d", "\ufeff",
             "_", "__", "-->", "!?", "<EOT>", "<PRE>", "<SUF>", "<MID>", "<MASK>", "<|endoftext|>", "<"]
    for _ in range(n):
        yield "".join(rng.choice(parts) if rng.random() < 0.8 else
                      chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
                      for _ in range(rng.randrange(12)))


@needs_transformers
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_transformers_gives_the_same_ids_and_text(kind, tok, tmp_path):
    import transformers
    ours = tok if kind == "bpe" else Tokenizer.bytes()
    save_tokenizer(ours, tmp_path, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in random_strings(10_000):
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True).input_ids == ids, text
        assert theirs.decode(ids) == text
        assert theirs(text).input_ids == encode_raw(text, ours), text


@needs_transformers
def test_a_pipeline_fills_a_hole_as_we_do(tok, tmp_path):
    import transformers
    model = small_model(tok.n_vocab, 64, position="learned", qk_norm=False, token_shift=False, bias=True,
                        gelu="tanh")
    save_gpt2(model, tok, tmp_path)
    pipeline = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    psm = partial(fim_prompt, tok=tok, order="psm", spm_layout=None)
    ours, = infill(model, tok, "def mean(", "):\n", prompt=psm, max_new_tokens=12)
    theirs = pipeline("<PRE>def mean(<SUF>):\n<MID>", max_new_tokens=12, do_sample=False,
                      return_full_text=False)
    prompt = encode_raw("<PRE>def mean(<SUF>):\n<MID>", tok)
    assert model(torch.tensor([prompt]))[0][0, -1].argmax() == tok.pre  # which neither may write
    assert len(set(ours.text)) > 3 and theirs[0]["generated_text"] == ours.text


def test_what_gpt2_does_not_cover_is_refused(tok, tmp_path, capsys):
    run = save_run(tmp_path / "run", small_model(tok.n_vocab), tok)
    with pytest.raises(SystemExit) as stop:
        gpt2.main([str(run), str(tmp_path / "out")])
    assert stop.value.code == 2 and "GPT-2 has position learned, this model rope" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
