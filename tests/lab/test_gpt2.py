"""GPT-2's weights in and out, against a state dict written here as the published files have it."""
import json
import random
import re
from functools import partial

import pytest
import torch

import train
from conftest import run_main, save_run, small_model
from data import Tokenizer
from lab.gpt2 import load_gpt2, main, save_gpt2, tokenizer_json
from model import GPT, GPTConfig
from objectives import fim_prompt
from sample import encode_raw, infill, load_model

V, T, C, L = 257, 32, 128, 3


@pytest.fixture
def published():
    """A state dict as published: no prefix, no sentinels, Conv1D's (in, out) matrices, the mask as a
    buffer."""
    torch.manual_seed(1)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    block = {"ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
             "attn.bias": (1, 1, T, T)}
    for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, 4 * C),
                              ("mlp.c_proj", 4 * C, C)):
        block |= {f"{name}.weight": (n_in, n_out), f"{name}.bias": (n_out,)}
    shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    """GPT-2's tokenizer is a download; single bytes stand in for it, with <|endoftext|> behind the last."""
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)


def write(weights, path):
    """A .safetensors: the header's length in 8 bytes, the header, the numbers."""
    if path.suffix == ".bin":
        torch.save(weights, path)
        return path
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        header[name] = {"dtype": "F32", "shape": [*w.shape], "data_offsets": [end, end + 4 * w.numel()]}
        end += 4 * w.numel()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header
                     + b"".join(w.numpy().astype("<f4").tobytes() for w in weights.values()))
    return path


@pytest.mark.parametrize("name, in_folder, prefix", [
    ("pytorch_model.bin", False, ""), ("model.safetensors", True, ""),
    ("model.safetensors", False, "transformer.")])  # as transformers' GPT2LMHeadModel.state_dict() has it
def test_weights_come_in_at_their_places_and_go_out_again(name, in_folder, prefix, published, tmp_path):
    """The sentinels, which are not published, have the mean of the embeddings. (That the model then computes
    GPT-2's formulas is checked in tests/test_model.py.)"""
    weights = {prefix + key: w for key, w in published.items()}
    path = write(weights | ({"lm_head.weight": published["wte.weight"]} if prefix else {}), tmp_path / name)
    start = load_gpt2(tmp_path if in_folder else path)
    model = GPT(GPTConfig(**start["model_config"]))
    model.load_state_dict(start["model"])
    assert model.config == GPTConfig(V + 4, T, L, 2, C, bias=True, position="learned", qk_norm=False,
                                     token_shift=False, gelu="tanh", tied=True)
    wte, found = published["wte.weight"], model.state_dict()
    torch.testing.assert_close(found["lm_head.weight"], torch.cat((wte, wte.mean(0).expand(4, -1))))
    for key in published.keys() - {"wte.weight", *(f"h.{i}.attn.bias" for i in range(L))}:
        is_matrix = re.search(r"c_\w+\.weight", key)  # whose rows are the inputs: x @ w
        assert torch.equal(found[f"transformer.{key}"], published[key].T if is_matrix else published[key])
    save_gpt2(model, Tokenizer.bytes(), tmp_path / "out")
    again = load_gpt2(tmp_path / "out")["model"]
    assert again.keys() == found.keys() and all(torch.equal(w, again[key]) for key, w in found.items())
    assert torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True).keys() == found.keys()


def test_training_goes_on_from_published_weights(published, tmp_path, documents):
    (tmp_path / "text.py").write_text(documents[0])
    path = write(published, tmp_path / "model.safetensors")
    flags = (f"--init-from {path} --objective fim_spm --data {tmp_path}/text.py --cache-dir {tmp_path}/cache "
             f"--steps 2 --warmup 1 --batch-size 2 --device cpu --block-size 24 --out {tmp_path}/run")
    train.main(flags.split())
    model, _, _ = load_model(tmp_path / "run")
    assert model.config.block_size == 24 and model.config.position == "learned"
    moved = model.state_dict()["transformer.h.0.mlp.c_fc.weight"] - published["h.0.mlp.c_fc.weight"].T
    assert 0 < moved.abs().max() < 0.1


@pytest.mark.parametrize("name, content, message", [
    ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "not a whole state dict"),
    ("pytorch_model.bin", b"hello", "not a whole state dict"),
    ("none", None, "no such file; expected a run, or a model.safetensors or pytorch_model.bin of GPT-2"),
    ("pytorch_model.bin", {"wte.weight": torch.zeros(300, C)}, "300 tokens, width 128, .* 257 tokens"),
    ("pytorch_model.bin", {"wte.weight": torch.zeros(V, 2)}, "257 tokens, width 2, .* 64 channels per head"),
    ("model.safetensors", {"lm_head.weight": torch.zeros(V, C)}, "tied False; .* a tied output layer"),
    ("config.json", b"[]", "config.json: not a JSON object of settings"),
    *[("config.json", json.dumps({"n_inner": None, key: value}).encode(),
       f"config.json: {key} is {json.dumps(value)}, expected {expected}") for key, value, expected in (
        ("n_head", "2", "2"), ("n_inner", 100, "512"), ("model_type", "t5", '"gpt2"'),
        ("activation_function", "relu", '"gelu_new"'), ("layer_norm_epsilon", 1e-6, "1e-05"),
        ("tie_word_embeddings", False, "true"), ("scale_attn_by_inverse_layer_idx", True, "false"))]])
def test_what_is_not_gpt2s_is_refused_in_one_sentence(name, content, message, published, tmp_path):
    """A config.json is read if it lies beside the weights; null is no value."""
    path = tmp_path / name
    if isinstance(content, dict):
        write(published | content, path)
    elif content:
        path.write_bytes(content)
    if name == "config.json":
        path = write(published, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match=message):
        load_gpt2(path)


def test_a_tokenizer_json_worked_by_hand():
    """Every way to cut a token in two is a merge, in the order of the joined token, then of the left part."""
    tok = Tokenizer([*(bytes([i]) for i in range(256)), b"bc", b" a", b"abc", b" abc"])
    whole = tokenizer_json(tok)
    assert whole["model"]["merges"] == [["b", "c"], ["Ġ", "a"], ["a", "bc"], ["Ġ", "abc"], ["Ġa", "bc"]]
    vocab = whole["model"]["vocab"]
    assert len(vocab) == 260 and [vocab[text] for text in ("Ċ", "Ġ", "!", "Ġabc")] == [10, 32, 33, 259]
    added = [(token["id"], token["content"]) for token in whole["added_tokens"]]
    assert added == [(260, "<EOT>"), (261, "<PRE>"), (262, "<SUF>"), (263, "<MID>"), (264, "<MASK>")]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_same_logits_ids_and_infill(tied, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model(tok.n_vocab, 64, position="learned", qk_norm=False, token_shift=False, bias=True,
                        gelu="tanh", tied=tied)
    save_gpt2(model, tok, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(tok.n_vocab, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)

    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # code, languages, emoji, spaces, control characters, sentinels' names, and any character at all
    rng = random.Random(1)
    parts = ["def f(x):\n    return x_1", "    ", "\t", "\r\n", "\n\n", " ", "\u3000", "don't", "1234567",
             "Größe", "Ελλάδα", "שלום", "你好", "🏳\ufe0f\u200d🌈", "Ⅷ", "\0", "\x7f", "\ufeff", "_", "-->",
             "<EOT>", "<MASK>", "<"]
    for _ in range(10_000):
        text = "".join(rng.choice(parts) if rng.random() < 0.8 else
                       chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
                       for _ in range(rng.randrange(12)))
        ids = tok.encode(text)
        assert encoder(text, split_special_tokens=True).input_ids == ids and encoder.decode(ids) == text, text
        assert encoder(text).input_ids == encode_raw(text, tok), text

    pipeline = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    psm = partial(fim_prompt, tok=tok, order="psm", spm_layout=None)
    ours, = infill(model, tok, "def mean(", "):\n", prompt=psm, max_new_tokens=12)
    filled = pipeline("<PRE>def mean(<SUF>):\n<MID>", max_new_tokens=12, do_sample=False,
                      return_full_text=False)
    # although it may not write sentinels; half characters we leave out
    assert filled[0]["generated_text"].replace("\ufffd", "") == ours.text


def test_what_gpt2_does_not_cover_is_refused(tok, tmp_path, capsys):
    run = save_run(tmp_path / "run", small_model(tok.n_vocab), tok)
    shown = run_main(main, capsys, str(run), str(tmp_path / "out"))
    assert shown.code == 2 and "expected a model of GPT-2's architecture" in shown.err
    assert not (tmp_path / "out").exists()
