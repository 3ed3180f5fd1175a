"""GPT-2's published weights (Radford et al., 2019), in and out, in the form that Hugging Face's transformers
gives them.

    python train.py --init-from model.safetensors      in: a .safetensors or .bin, or the folder with one
    python -m lab.gpt2 out/gpt2 folder                 out: a folder for GPT2LMHeadModel.from_pretrained

The names are model.py's but for the "transformer." in front, which published files lack; the matrices of
linear layers are transposed (in, out). A .safetensors is a header's length (8 bytes, little-endian), the
header (JSON: name -> dtype, shape, offsets) and the numbers, one tensor behind the other.
"""
import json
from pathlib import Path

import torch

from cli import Parser, load_tensors, one_line_errors
from data import Tokenizer
from sample import load_model

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files hold
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_gpt2(path):
    """A file or folder of GPT-2's weights -> {"model", "model_config", "tokenizer"}, as in a checkpoint of
    train.py.

    The shape is read off the weights; the number of heads off a config.json beside them, or it is n_embd /
    64, as in all of GPT-2's sizes. <PRE> <SUF> <MID> <MASK>, which GPT-2 lacks, get the mean of its
    embeddings (its <|endoftext|> is our <EOT>). Raises OSError where the file is damaged or holds something
    else."""
    path = Path(path)
    if path.is_dir():
        files = [f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()]
        if not files:
            raise OSError(f"--init-from {path}: expected ckpt.pt, model.safetensors or "
                          "pytorch_model.bin in it")
        path = files[0]
    try:
        weights = (read_safetensors if path.suffix == ".safetensors" else load_tensors)(path)
        weights = {name.removeprefix("transformer."): w.float() for name, w in weights.items()
                   if not name.endswith(BUFFERS)}
        weights.pop("lm_head.weight", None)  # GPT-2 shares it with the embedding
        block_size, n_embd = weights["wpe.weight"].shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
    except FileNotFoundError:
        raise OSError(f"--init-from {path}: no such file; expected a run, or GPT-2's weights") from None
    except (RuntimeError, AttributeError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise OSError(f"--init-from {path}: not a whole state dict of GPT-2 ({why})") from None
    beside, n_head = path.parent / "config.json", max(1, n_embd // 64)
    if beside.is_file():
        n_head = json.loads(beside.read_text()).get("n_head", n_head)
    tok, wte = Tokenizer.gpt2(), weights["wte.weight"]
    if len(wte) != tok.n_vocab:
        if len(wte) != tok.eot + 1:
            raise OSError(f"--init-from {path}: a vocabulary of {len(wte):,} tokens, GPT-2's {tok.eot + 1:,}")
        weights["wte.weight"] = torch.cat((wte, wte.mean(0, keepdim=True).expand(tok.n_vocab - len(wte), -1)))
    state = {f"transformer.{name}": w.T.contiguous() if name.endswith(LINEAR) else w
             for name, w in weights.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size,
             "position": "learned", "qk_norm": False, "token_shift": False, "tied": True, "bias": True,
             "gelu": "tanh"}
    return {"model": state, "model_config": {"vocab_size": tok.n_vocab, **shape}, "tokenizer": tok.to_dict()}


def save_gpt2(model, folder, eot):
    """Writes config.json and model.safetensors. Raises ValueError for a model of another architecture."""
    c = model.config
    for name, wanted in (("position", "learned"), ("qk_norm", False), ("token_shift", False), ("bias", True)):
        if getattr(c, name) != wanted:
            raise ValueError(f"GPT-2 has {name} {wanted}, this model {getattr(c, name)}; train with "
                             "--preset gpt2, or with --position learned --no-qk-norm --no-token-shift --bias")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
              "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
              "tie_word_embeddings": c.tied,
              "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu",
              "bos_token_id": eot, "eos_token_id": eot}
    state = {name: w.T if name.endswith(LINEAR) else w for name, w in model.state_dict().items()
             if not (c.tied and name == "lm_head.weight")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_safetensors(folder / "model.safetensors", state)


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
    parser.add_argument("folder", help="where to write config.json and model.safetensors")
    args = parser.parse_args(arguments)
    model, tok, _ = load_model(args.ckpt)
    save_gpt2(model, args.folder, tok.eot)
    print(f"written: {args.folder}")


if __name__ == "__main__":
    main()
