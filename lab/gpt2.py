"""GPT-2's weights and vocabulary (Radford et al., 2019), in and out, in the form that Hugging Face's
transformers gives them.

    python train.py --init-from model.safetensors   in: a .safetensors or .bin, or the folder with one
    python -m lab.gpt2 out/RUN FOLDER               out: a folder for AutoModelForCausalLM and AutoTokenizer

The names are those of model.py, but published files lack the "transformer." in front; the matrices of linear
layers are transposed (in, out). A .safetensors file holds the header's length (8 bytes, little-endian), the
header (JSON: name -> dtype, shape, offsets) and the numbers, one tensor after the other. A tokenizer.json
writes each byte of a token as a letter, and has the pairs of tokens that merge, in order.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch

from data import Tokenizer
from model import GPTConfig
from sample import Parser, load_model, one_line_errors

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files hold
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GELU = {"gelu_new": "tanh", "gelu": "exact"}


def load_gpt2(path):
    """A file or folder of GPT-2's weights -> {"model", "model_config", "tokenizer"}, as in a checkpoint of
    train.py.

    The shape is read off the weights; the heads off the config.json beside them, else they have 64 channels,
    as in all of GPT-2's sizes. <PRE> <SUF> <MID> <MASK>, which GPT-2 lacks, get the mean of its embeddings
    (its <|endoftext|> is our <EOT>). Raises OSError where the file is damaged or holds something else, or
    config.json asks for what model.py does not do."""
    path = Path(path)
    files = [f for f in (path, path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()]
    if not files:
        raise OSError(f"--init-from {path}: no such file; expected a run, or a model.safetensors or "
                      "pytorch_model.bin of GPT-2, or a folder with one")
    path = files[0]
    try:
        content = (read_safetensors(path) if path.suffix == ".safetensors" else
                   torch.load(path, map_location="cpu", weights_only=True))
        weights = {name.removeprefix("transformer."): w.float() for name, w in content.items()
                   if not name.endswith(BUFFERS)}
        wte, has_head = weights["wte.weight"], "lm_head.weight" in weights
        (vocab_size, n_embd), (block_size, _) = wte.shape, weights["wpe.weight"].shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
        head = weights.get("lm_head.weight", wte).view_as(wte)
    except Exception as error:  # a damaged or foreign file fails the unpickler in any way
        raise OSError(f"--init-from {path}: not a whole state dict of GPT-2, or damaged "
                      f"({type(error).__name__})") from None
    tok = Tokenizer.gpt2()
    if vocab_size not in (tok.eot + 1, tok.n_vocab):
        raise OSError(f"--init-from {path}: a vocabulary of {vocab_size:,} tokens, GPT-2's {tok.eot + 1:,}")

    # What config.json may say: first what holds where it says nothing.
    n_head, is_tied = max(1, n_embd // 64), torch.equal(head, wte)
    c = read_config(path.parent / "config.json", {
        "model_type": ["gpt2"], "vocab_size": [vocab_size], "n_positions": [block_size], "n_embd": [n_embd],
        "n_layer": [n_layer], "n_head": [n_head, *(n for n in range(1, n_embd + 1) if n_embd % n == 0)],
        "n_inner": [None, 4 * n_embd], "activation_function": [*GELU], "layer_norm_epsilon": [1e-5],
        "tie_word_embeddings": [is_tied, not is_tied] if has_head else [True], "eos_token_id": [tok.eot],
        "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False]})
    weights["lm_head.weight"] = wte if c["tie_word_embeddings"] else head
    for name in ("wte.weight", "lm_head.weight"):
        mean = weights[name].mean(0, keepdim=True)
        weights[name] = torch.cat((weights[name], mean.expand(tok.n_vocab - vocab_size, -1)))
    state = {name if name == "lm_head.weight" else f"transformer.{name}":
             w.T.contiguous() if name.endswith(LINEAR) else w for name, w in weights.items()}
    config = GPTConfig(tok.n_vocab, block_size, n_layer, c["n_head"], n_embd, bias=True, position="learned",
                       qk_norm=False, token_shift=False, tied=c["tie_word_embeddings"],
                       gelu=GELU[c["activation_function"]])
    return {"model": state, "model_config": asdict(config), "tokenizer": tok.to_dict()}


def read_config(path, allowed):
    """config.json, if there is one, and {key: the values that it may have} -> {key: its value, or else the
    first of those}. Raises OSError for another value."""
    try:
        given = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        values = {key: given.get(key, choices[0]) for key, choices in allowed.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"--init-from {path}: not a JSON object of settings ({error})") from None
    for key, choices in allowed.items():
        if json.dumps(values[key]) not in map(json.dumps, choices):  # in Python, 2.0 == 2 and True == 1
            expected = " or ".join(dict.fromkeys(map(json.dumps, choices)))
            raise OSError(f"--init-from {path}: {key} is {json.dumps(values[key])}, expected {expected}")
    return values


def save_gpt2(model, tok, folder):
    """Writes a folder that transformers loads: config.json, generation_config.json, model.safetensors, and
    the files of save_tokenizer.

    Raises ValueError for a model of another architecture."""
    c = model.config
    for name, wanted in (("position", "learned"), ("qk_norm", False), ("token_shift", False), ("bias", True)):
        if getattr(c, name) != wanted:
            raise ValueError(f"GPT-2 has {name} {wanted}, this model {getattr(c, name)}; train with --preset "
                             "toy_gpt2, or with --position learned --no-qk-norm --no-token-shift --bias")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
              "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
              "n_head": c.n_head, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": c.tied,
              "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu",
              "bos_token_id": tok.eot, "eos_token_id": tok.eot}
    state = {name: w.T if name.endswith(LINEAR) else w for name, w in model.state_dict().items()
             if not (c.tied and name == "lm_head.weight")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    suppressed = [i for i in tok.specials if i != tok.eot]  # as in sample.infill
    generation = {"bos_token_id": tok.eot, "eos_token_id": tok.eot, "suppress_tokens": suppressed}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    write_safetensors(folder / "model.safetensors", state)
    save_tokenizer(tok, folder, c.block_size)


def save_tokenizer(tok, folder, block_size):
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json: the ids of tok for any text.

    Names of special tokens in a text become their ids there, unless one asks for split_special_tokens=True.
    tiktoken merges whichever two neighbours have the joined text of the smallest id, so every way to cut a
    token into two is a merge here."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    written = {text: "".join(letters[byte] for byte in text) for text in tok.vocabulary}
    ranks = {text: i for i, text in enumerate(tok.vocabulary)}
    merges = []
    for text in tok.vocabulary:
        pairs = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ranks and text[k:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tok.names[i], "special": True, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False} for i in tok.specials],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False},
            as_letters]},
        "decoder": as_letters,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True,  # a piece that is a token stays whole, whatever its parts merge to
                  "vocab": {written[text]: i for text, i in ranks.items()},
                  "merges": [[written[a], written[b]] for a, b in merges]}}
    eot, mask = tok.names[tok.eot], tok.names[tok.mask]
    special = {"bos_token": eot, "eos_token": eot, "mask_token": mask,
               "additional_special_tokens": [tok.names[i] for i in (tok.pre, tok.suf, tok.mid)]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "clean_up_tokenization_spaces": False, "add_bos_token": False, **special,
              "model_input_names": ["input_ids", "attention_mask"]}  # GPT-2 would add token_type_ids up
    files = {"tokenizer": whole, "tokenizer_config": config, "special_tokens_map": special}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")


def read_safetensors(path):
    """-> {name: tensor}"""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    numbers = torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8)
    return {name: numbers[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()}


def write_safetensors(path, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            f.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())


@one_line_errors
def main(arguments=None):
    parser = Parser(description="Writes a run as a folder that Hugging Face's transformers loads.")
    parser.add_argument("ckpt", help="the run's folder")
    parser.add_argument("folder", help="where to write weights and vocabulary")
    args = parser.parse_args(arguments)
    model, tok, _ = load_model(args.ckpt)
    save_gpt2(model, tok, args.folder)
    print(f"written: {args.folder}")


if __name__ == "__main__":
    main()
