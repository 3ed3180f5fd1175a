"""Use a trained model: continue a prompt, or fill a hole between a prefix and a suffix.

    python sample.py --prompt "def main("
    python sample.py --prefix "def mean(xs):\\n    return " --suffix " / len(xs)\\n"
    python sample.py --file draft.py            # a text with <FILL> where the hole is
    python sample.py --file draft.py --interactive      # type in the hole, get an infill, type on
    python sample.py --instruct "def mean(xs):\\n    \"The mean.\"\\n"        # a model that was fine-tuned on pairs

Infilling lays prefix and suffix out as in training (objectives.fim_prompt) and samples until <EOT>, the model's word that
it has joined the suffix. Of n samples, those that ended in <EOT> come first, then the likelier per token (EOT-aware
best-of-n, FIM paper, section 4.6 and appendix).
"""
import argparse
import codecs
import functools
import os
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Tokenizer, split_lines
from model import GPT, GPTConfig, KVCache
from objectives import ORDERS, answer_prompt, check_range, fim_prompt

FILL = "<FILL>"
ENDINGS = {"eot": "the model stopped", "suffix": "cut where it began to repeat the suffix",
           "length": "it did not stop"}


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None, seed=None, n=1, allowed=None,
             cache=None):
    """Samples up to max_new_tokens after each row of idx (B, T); yields (ids (B*n,), log-probabilities (B*n,)) per step.

    Row b's n samples are rows b*n .. b*n+n-1; they share one pass over the prompt. temperature 0 takes the likeliest.
    stop: the id that ends a row; an ended row repeats it at log-probability 0, and generation ends with the last row.
    allowed: how many ids, from 0, may be drawn. Log-probabilities are the model's own, in nats, before temperature and
    cuts. cache: a KVCache that holds the first tokens of idx already. Past block_size the older half of the context is
    forgotten."""
    check_range("temperature", temperature, 0, 100)
    check_range("top_p", top_p, 1e-6, 1)
    rng = torch.Generator(idx.device)
    rng.manual_seed(0 if seed is None else seed)
    block_size = model.config.block_size
    seen = idx[:, -block_size:]
    cache = cache or KVCache(model.config)
    logits = model(seen[:, cache.length:], cache=cache)[0][:, -1].repeat_interleave(n, 0)
    seen = seen.repeat_interleave(n, 0)
    if n > 1:
        cache.repeat(n)
    ended = torch.zeros(len(seen), dtype=torch.bool, device=idx.device)
    for i in range(max_new_tokens):
        if i:
            if cache.length == block_size:
                cache = KVCache(model.config)
                seen = seen[:, -(block_size // 2):]
                logits = model(seen, cache=cache)[0][:, -1]
            else:
                logits = model(seen[:, -1:], cache=cache)[0][:, -1]
        log_p = F.log_softmax(logits.float(), dim=-1)                           # (B*n, V)
        if allowed:
            log_p[:, allowed:] = float("-inf")
        ids = pick(log_p, temperature, top_k, top_p, rng)
        log_p = log_p.gather(1, ids[:, None])[:, 0]
        if stop is not None:
            ids, log_p = ids.masked_fill(ended, stop), log_p.masked_fill(ended, 0.0)
            ended |= ids == stop
        yield ids, log_p
        if ended.all():
            return
        seen = torch.cat((seen, ids[:, None]), dim=1)


def pick(log_p, temperature, top_k, top_p, rng):
    """log_p (B, V) -> ids (B,): the likeliest at temperature 0, else a draw from what top_k and top_p leave."""
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = (log_p - log_p.amax(-1, keepdim=True)) / temperature  # the likeliest stays at 0, however low the temperature
    if top_k:
        log_p = log_p.masked_fill(log_p < log_p.topk(min(top_k, log_p.shape[-1]))[0][:, -1:], float("-inf"))
    p = F.softmax(log_p, dim=-1)
    if top_p < 1:  # nucleus sampling (Holtzman et al., 2020): the fewest ids that hold top_p of the probability
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, order, ranked)
    return torch.multinomial(p, 1, generator=rng)[:, 0]


@dataclass
class Infill:
    """One sample for a hole. ended: "eot" (the model stopped), "suffix" (cut where it began to repeat the suffix) or
    "length". mean_log_p: nats per token, <EOT> included."""
    text: str
    ended: str
    mean_log_p: float


def infill(model, tok, prefix, suffix, n=1, max_new_tokens=64, order="spm", spm_layout="swapped", temperature=0.0,
           top_k=0, top_p=1.0, seed=None, stream=None, warn=None, cache=None):
    """Fills the hole between two texts: a list of n Infill, the best first.

    What of the texts does not fit the context is trimmed, and warn called with a sentence that says so; stream is called
    with each new piece of text, and cache is a PromptCache from the infill before (n must be 1 for both). Raises
    ValueError if the context leaves no room."""
    prompt = infill_prompt(model, tok, prefix, suffix, max_new_tokens, order, spm_layout, warn)
    if cache:
        cache.cut_back_to(prompt)
    idx = torch.tensor([prompt], device=next(model.parameters()).device)
    steps = generate(model, idx, max_new_tokens, temperature, top_k, top_p, tok.eot, seed, n, tok.eot + 1, cache)
    return best_first(collect(steps, tok, stream), tok, suffix)


class PromptCache(KVCache):
    """Computes of a prompt only what the prompt before did not begin with.

    That is why SPM puts the suffix first (FIM paper, section 3): text appended to the prefix leaves the keys and values
    of the suffix, and of the prefix so far, as they were. In PSM order the whole suffix moves.
    ids: the last prompt; reused: how many of its tokens were not computed again."""
    ids, reused = [], 0

    def cut_back_to(self, prompt):
        common = next((i for i, pair in enumerate(zip(self.ids, prompt)) if pair[0] != pair[1]), len(self.ids))
        self.reused = self.length = min(common, len(prompt) - 1)  # the last token's logits are needed
        self.ids = prompt


def infill_prompt(model, tok, prefix, suffix, max_new_tokens, order, spm_layout, warn=None):
    """The prompt's ids. What does not fit is trimmed, the prefix on its left and the suffix on its right; warn is called
    with a sentence that says so."""
    prefix, suffix = tok.encode(prefix), tok.encode(suffix)
    room = model.config.block_size - 3 - max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: the model's context is {model.config.block_size} tokens, "
                         f"expected at most {model.config.block_size - 4}")
    if len(prefix) + len(suffix) > room:
        # The suffix gets a third, the prefix the rest; either takes what the other does not need.
        for_suffix = min(len(suffix), max(room // 3, room - len(prefix)))
        for_prefix = min(len(prefix), room - for_suffix)
        if warn:
            warn(f"the context of {model.config.block_size} tokens holds the last {for_prefix} of {len(prefix)} tokens of "
                 f"the prefix and the first {for_suffix} of {len(suffix)} of the suffix")
        prefix, suffix = prefix[len(prefix) - for_prefix:], suffix[:for_suffix]
    return fim_prompt(prefix, suffix, tok, order, spm_layout)


def instruct_prompt(model, tok, prompt, max_new_tokens, warn=None):
    """ids of a text -> the ids that a fine-tuned model is to answer; what does not fit is cut off their left, and warn
    called with a sentence that says so. Raises ValueError if the context leaves no room."""
    room = model.config.block_size - 1 - max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: the model's context is {model.config.block_size} tokens, "
                         f"expected at most {model.config.block_size - 2}")
    if len(prompt) > room and warn:
        warn(f"the context of {model.config.block_size} tokens holds the last {room} of {len(prompt)} tokens of the prompt")
    return answer_prompt(prompt[-room:], tok)


def collect(steps, tok, stream=None):
    """Runs generate: a list of (ids, mean log-probability per token), <EOT> kept at the end where a row ended in it."""
    rows, log_ps = [], []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    for ids, log_p in steps:
        if stream:
            stream(decoder.decode(tok.decode_bytes(ids.tolist())))
        rows.append(ids)
        log_ps.append(log_p)
    if stream:
        stream(decoder.decode(b"", final=True))
    out = []
    for ids, log_p in zip(torch.stack(rows, 1).tolist(), torch.stack(log_ps, 1).tolist()):
        length = ids.index(tok.eot) + 1 if tok.eot in ids else len(ids)
        out.append((ids[:length], sum(log_p[:length]) / length))
    return out


def best_first(samples, tok, suffix):
    """EOT-aware best-of-n: those that ended in <EOT> first, each group by mean log-probability."""
    infills = []
    for ids, mean_log_p in samples:
        text, ended = tok.decode(ids), "eot" if ids[-1] == tok.eot else "length"
        joined = where_suffix_repeats(text, suffix) if ended == "length" else None
        if joined is not None:
            text, ended = text[:joined], "suffix"
        infills.append(Infill(text, ended, mean_log_p))
    return sorted(infills, key=lambda infill: (infill.ended != "eot", -infill.mean_log_p))


def where_suffix_repeats(text, suffix, least=8):
    """Where text begins to repeat the suffix, or None: its first lines that hold at least 8 visible characters."""
    start = ""
    for line in split_lines(suffix):
        start += line
        if len("".join(start.split())) >= least:
            found = text.find(start.rstrip())
            return None if found < 0 else found
    return None


def load_checkpoint(path, device="cpu"):
    """DIR or DIR/ckpt.pt -> the checkpoint's dictionary of tensors and plain values. Raises OSError."""
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        raise OSError(f"{file}: no such checkpoint; `python train.py` makes one")
    checkpoint = load_tensors(file, device)
    missing = [key for key in ("model", "optimizers", "model_config", "tokenizer", "config", "objective", "step")
               if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise OSError(f"{file}: not a nanogap checkpoint, it lacks {', '.join(missing)}")
    return checkpoint


def load_tensors(file, device="cpu"):
    """What torch.save wrote, if it is tensors and plain values. Raises OSError where it is anything else, or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on a foreign pickle before it refuses it
            if zipfile.is_zipfile(file):  # torch's format: the checksums of its parts tell what torch itself lets pass
                with zipfile.ZipFile(file) as parts:
                    if parts.testzip():
                        raise zipfile.BadZipFile
            return torch.load(file, map_location=device, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged or foreign file can fail the unpickler in any way
        raise OSError(f"{file}: not a whole checkpoint of tensors and plain values ({type(error).__name__})") from None


def load_model(path, device="cpu"):
    """DIR or DIR/ckpt.pt -> (GPT in evaluation mode, Tokenizer, checkpoint)."""
    checkpoint = load_checkpoint(path, device)
    with checkpoint_fits(path):
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        tok = Tokenizer.from_dict(checkpoint["tokenizer"])
    return model.to(device).eval(), tok, checkpoint


@contextmanager
def checkpoint_fits(path):
    """What fails within it does so because the checkpoint's settings or weights are not of this program: OSError."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: from another version of nanogap, or damaged ({type(error).__name__}: {why})") from None


def newest_run(root="out"):
    runs = sorted(Path(root).glob("**/ckpt.pt"), key=lambda f: f.stat().st_mtime)
    if not runs:
        raise OSError(f"no checkpoint under {root}/; `python train.py` makes one, --ckpt DIR names another place")
    return runs[-1].parent


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError where there is none of that kind."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps", name):  # torch knows more, such as meta, that cannot train
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    return device


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, arguments=None, namespace=None):  # parse_args calls it
        for argument in sys.argv[1:] if arguments is None else arguments:
            check_utf8(argument)
        return super().parse_known_args(arguments, namespace)

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def one_line_errors(main):
    """Wraps a script's main: a user's mistake is printed as one line; exit code 2 for bad arguments, 1 for a failed run."""
    @functools.wraps(main)
    def wrapped(arguments=None):
        try:
            main(arguments)
        except ValueError as error:
            code, message = 2, error
        except BrokenPipeError:  # whoever read the output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, message = 1, ""
        except OSError as error:
            code, message = 1, error
        except (MemoryError, RuntimeError) as error:  # torch's own say what they are in their text alone
            code, text = 1, str(error)
            if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
                message = "out of memory: lower --batch-size, --block-size or --n-embd; in sampling, --n"
            elif re.search(r"working (C\+\+ compiler|triton)", text):
                message = f"--compile: {text.splitlines()[0]}; install it, or leave --compile out"
            else:
                raise
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        else:
            return
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(code)
    return wrapped


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    parser.add_argument("--prompt", help="text to go on with")
    parser.add_argument("--instruct", metavar="PROMPT", help="a prompt to answer, for a model trained on pairs")
    parser.add_argument("--prefix", help="text before the hole (\\n is a line end)")
    parser.add_argument("--suffix", help="text after the hole")
    parser.add_argument("--file", metavar="F", help=f"a text with one {FILL} in it, the hole")
    parser.add_argument("--interactive", action="store_true", help="type at the hole, get an infill, type on")
    parser.add_argument("--order", choices=ORDERS, help="layout of the prompt (default: spm if it was trained on, else psm)")
    parser.add_argument("--n", type=int, default=1, help="samples, in one batch; infills are ranked (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for more)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens, 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    prefix, suffix = read_hole(args)
    check_range("--n", args.n, 1, 1024)
    check_range("--max-new-tokens", args.max_new_tokens, 1, 10**6)
    check_range("--top-k", args.top_k, 0, 10**6)
    check_range("--top-p", args.top_p, 1e-6, 1)
    if args.temperature is not None:
        check_range("--temperature", args.temperature, 0, 100)
    if (args.stream or args.interactive) and args.n > 1:
        raise ValueError(f"--n {args.n}: expected one sample with --stream and --interactive")
    temperature = args.temperature if args.temperature is not None else 0.0 if args.n == 1 else 0.8
    device = pick_device(args.device)
    folder = args.ckpt or newest_run()
    model, tok, checkpoint = load_model(folder, device)
    stream = functools.partial(print, end="", flush=True) if args.stream else None
    settings = {"temperature": temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed, "n": args.n}

    def warn(message):
        print(f"note: {message}", file=sys.stderr)

    text = args.prompt if args.instruct is None else args.instruct
    if text is not None:
        ids = tok.encode(text) or [tok.eot]
        if args.instruct is not None:
            if not checkpoint["objective"]["answers"]:
                raise ValueError(f"{folder} was trained with --objective {checkpoint['config']['objective']}, which never saw "
                                 "prompts and answers: expected a checkpoint of sft or meap_sft, or --prompt instead")
            ids = instruct_prompt(model, tok, ids, args.max_new_tokens, warn)
        idx = torch.tensor([ids], device=device)
        print(text, end="" if stream else "\n" if args.n > 1 else "", flush=True)
        samples = collect(generate(model, idx, args.max_new_tokens, stop=tok.eot, allowed=tok.eot + 1, **settings), tok, stream)
        for i, (ids, mean_log_p) in enumerate([] if stream else samples, 1):
            print((f"--- {i} of {args.n}, {mean_log_p:.2f} nats a token\n" if args.n > 1 else "") + tok.decode(ids))
        if stream:
            print()
        return

    objective = checkpoint["objective"]
    if not objective["fim_rate"]:
        raise ValueError(f"{folder} was trained with --objective {checkpoint['config']['objective']}, which never saw a gap: "
                         "expected a checkpoint of fim_psm, fim_spm, fim or fim_meap, or --prompt instead")
    order = args.order or ("spm" if objective["spm_rate"] > 0 else "psm")
    if objective["spm_rate"] == (order == "psm"):
        print(f"note: this model was never trained on {order}", file=sys.stderr)
    settings |= {"max_new_tokens": args.max_new_tokens, "order": order, "spm_layout": objective["spm_layout"],
                 "stream": stream, "warn": warn}
    if args.interactive:
        return interact(model, tok, prefix, suffix, settings)
    infills = infill(model, tok, prefix, suffix, **settings)
    for i, best in enumerate(infills, 1):
        if args.n > 1:
            print(f"--- {i} of {args.n}, {ENDINGS[best.ended]}, {best.mean_log_p:.2f} nats a token")
        if stream:
            print()
        else:
            print(prefix + paint(best.text) + suffix)
        if args.n == 1:
            print(f"({ENDINGS[best.ended]}, {best.mean_log_p:.2f} nats a token)", file=sys.stderr)


def interact(model, tok, prefix, suffix, settings):
    """Type text, get an infill, type on, until the input ends. A line is appended to the prefix; an empty one takes the
    last infill in."""
    cache, taken = PromptCache(model.config), ""
    while True:
        try:
            typed = input("> ")
        except EOFError:
            return print()
        check_utf8(typed)
        prefix += line_ends(typed) or taken
        best, = infill(model, tok, prefix, suffix, cache=cache, **settings)
        taken = best.text
        print("" if settings["stream"] else prefix + paint(taken) + suffix)
        print(f"({ENDINGS[best.ended]}, {best.mean_log_p:.2f} nats a token; {cache.reused} of the prompt's "
              f"{len(cache.ids)} tokens reused)", file=sys.stderr)


def check_utf8(text):
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{text!r}: not UTF-8 text (it has a lone surrogate)")


def line_ends(text):
    """What was typed, with \\n and \\t as line end and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read_hole(args):
    """The prefix and the suffix that the arguments give, or two empty texts with --prompt. Raises ValueError."""
    hole = args.prefix is not None or args.suffix is not None or args.interactive and args.file is None
    if (args.prompt is not None) + (args.instruct is not None) + hole + (args.file is not None) != 1:
        raise ValueError("expected one of --prompt TEXT, --instruct TEXT, --prefix TEXT with --suffix TEXT, or --file F")
    for name in ("prompt", "instruct", "prefix", "suffix"):
        text = getattr(args, name)
        if text is not None:
            setattr(args, name, line_ends(text))
    if args.file is None:
        return args.prefix or "", args.suffix or ""
    try:
        parts = Path(args.file).read_text(encoding="utf-8-sig").split(FILL)
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {args.file}: expected UTF-8 text, got {error}") from None
    if len(parts) != 2:
        raise ValueError(f"--file {args.file}: expected one {FILL} where the hole is, found {len(parts) - 1}")
    return parts


def paint(text):
    return f"\033[1;32m{text}\033[0m" if sys.stdout.isatty() else text


if __name__ == "__main__":
    main()
