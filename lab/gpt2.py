"""GPT-2's weights and vocabulary (Radford et al., 2019), in and out, in the form that Hugging Face's
transformers gives them.

    python train.py --init-from model.safetensors   in: a .safetensors or .bin, or the folder with one
    python -m lab.gpt2 out/RUN FOLDER               out: a folder for AutoModelForCausalLM and AutoTokenizer

The names are those of model.py, but published files lack the "transformer." in front; the matrices of linear
layers are transposed (in, out). A .safetensors file holds the header's length (8 bytes, little-endian), the
header (JSON: name -> dtype, shape, offsets) and the numbers, one tensor after the other.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch

from data import Tokenizer
from model import GPTConfig
from sample import Parser, load_model, one_line_errors

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What files may hold besides: the causal mask, and the output layer, which GPT-2 shares with the embeddings.
EXTRA = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
ARCHITECTURE = {"position": "learned", "qk_norm": False, "token_shift": False, "bias": True}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_gpt2(path):
    """A file or folder of GPT-2's weights -> {"model", "model_config", "tokenizer"}, as in a checkpoint of
    train.py.

    The shape is read off the weights; heads have 64 channels, as in all of GPT-2's sizes. <PRE> <SUF> <MID>
    <MASK>, which GPT-2 lacks, get the mean of its embeddings (its <|endoftext|> is our <EOT>). Raises OSError
    where the file is damaged or holds something else, or the config.json beside it is not GPT-2's."""
    path = Path(path)
    files = [f for f in (path, path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()]
    if not files:
        raise OSError(f"--init-from {path}: no such file; expected a run, or a model.safetensors or "
                      "pytorch_model.bin of GPT-2, or a folder with one")
    path = files[0]
    try:
        content = (read_safetensors(path) if path.suffix == ".safetensors" else
                   torch.load(path, map_location="cpu", weights_only=True))
        state = {"transformer." + name.removeprefix("transformer."):
                 w.float().T.contiguous() if name.endswith(LINEAR) else w.float()
                 for name, w in content.items() if not name.endswith(EXTRA)}
        wte, n_layer = state["transformer.wte.weight"], sum(name.endswith("ln_1.weight") for name in state)
        (vocab_size, n_embd), block_size = wte.shape, len(state["transformer.wpe.weight"])
        is_tied = torch.equal(content.get("lm_head.weight", wte).float(), wte)
    except Exception as error:  # a damaged or foreign file fails the unpickler in any way
        raise OSError(f"--init-from {path}: not a whole state dict of GPT-2, or damaged "
                      f"({type(error).__name__})") from None
    tok = Tokenizer.gpt2()
    if vocab_size not in (tok.eot + 1, tok.n_vocab) or n_embd % 64 or not is_tied:
        raise OSError(f"--init-from {path}: {vocab_size:,} tokens, width {n_embd}, tied {is_tied}; expected "
                      f"GPT-2's {tok.eot + 1:,} tokens, 64 channels per head, and a tied output layer")
    check_config(path.with_name("config.json"), {
        "model_type": "gpt2", "n_head": n_embd // 64, "n_inner": 4 * n_embd,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    wte = torch.cat((wte, wte.mean(0).expand(tok.n_vocab - vocab_size, -1)))
    state["transformer.wte.weight"] = state["lm_head.weight"] = wte
    config = GPTConfig(tok.n_vocab, block_size, n_layer, n_embd // 64, n_embd, gelu="tanh", **ARCHITECTURE)
    return {"model": state, "model_config": asdict(config), "tokenizer": tok.to_dict()}


def check_config(path, expected):
    """Raises OSError where a config.json, if there is one, has another value than expected (or null)."""
    try:
        given = json.loads(path.read_text("utf-8")).items() if path.is_file() else ()
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"--init-from {path}: not a JSON object of settings ({error})") from None
    for key, value in given:
        if key in expected and value not in (None, expected[key]):
            raise OSError(f"--init-from {path}: {key} is {json.dumps(value)}, expected "
                          f"{json.dumps(expected[key])}")


def save_gpt2(model, tok, folder):
    """Writes a folder that transformers loads: pytorch_model.bin, config.json, generation_config.json,
    tokenizer.json and tokenizer_config.json. Raises ValueError for a model of another architecture."""
    c = model.config
    if vars(c) != vars(c) | ARCHITECTURE:
        raise ValueError("expected a model of GPT-2's architecture: train with --preset toy_gpt2, or with "
                         "--position learned --no-qk-norm --no-token-shift --bias")
    ends = {"bos_token_id": tok.eot, "eos_token_id": tok.eot}
    files = {
        "config": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
                   "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd,
                   "n_layer": c.n_layer, "n_head": c.n_head, "layer_norm_epsilon": 1e-5,
                   "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu",
                   "tie_word_embeddings": c.tied, **ends},
        # No sentinel is generated, as in sample.infill.
        "generation_config": {"suppress_tokens": [i for i in tok.specials if i != tok.eot], **ends},
        "tokenizer": tokenizer_json(tok),
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size,
            "bos_token": tok.names[tok.eot], "eos_token": tok.names[tok.eot], "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"]}}  # GPT-2 would add token_type_ids up
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")
    torch.save({name: w.T.contiguous() if name.endswith(LINEAR) else w
                for name, w in model.state_dict().items()}, folder / "pytorch_model.bin")


def tokenizer_json(tok):
    """The content of a tokenizer.json that gives the ids of tok for any text. It writes each byte of a token
    as a letter, and has the pairs of tokens that merge, in order.

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
    return {
        "added_tokens": [{"id": i, "content": tok.names[i], "special": True, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False} for i in tok.specials],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False},
            as_letters]},
        "decoder": as_letters,
        "model": {"type": "BPE",
                  "ignore_merges": True,  # a piece that is a token stays whole, whatever its parts merge to
                  "vocab": {written[text]: i for text, i in ranks.items()},
                  "merges": [[written[a], written[b]] for a, b in merges]}}


def read_safetensors(path):
    """-> {name: tensor}"""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    numbers = torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8)
    return {name: numbers[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()}


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
