"""Use a trained model: continue a prompt, or fill a hole between a prefix and a suffix.

    python sample.py --prompt "def main("
    python sample.py --prefix "def mean(xs):\\n    return " --suffix " / len(xs)\\n"
    python sample.py --instruct "def mean(xs):\\n"       # a model that was fine-tuned on prompts and answers
    python sample.py --raw "<PRE>def <SUF>(xs)<MID>"    # sentinels as typed, for a layout of your own

What the model is given, and what it then generates, up to <EOT>:

    left to right    prompt                                                      continuation
    infilling        prefix and suffix, laid out as in training by               middle
                     objectives.PROMPTS: <PRE> prefix <SUF> suffix <MID>, ...
    fine-tuned       prompt <MID>                                                answer

From top to bottom: generation, infilling, a run read from its folder, the command line.
B: prompts in a batch, n: samples of each, T: tokens, V: vocabulary.
"""
import argparse
import codecs
import functools
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Tokenizer, lines_of, newlines
from model import GPT, GPTConfig, KVCache
from objectives import ON_PAIRS, PROMPTS, check_range, fim_prompt

# Generation

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None, seed=0, n=1,
             allowed=None, cache=None):
    """Samples n continuations of each prompt in idx (B, T). Yields, for each new token, ids (B*n,) and their
    log-probabilities (B*n,) in nats: the model's own, whatever temperature, top_k and top_p (see pick).

    Rows b*n to b*n+n-1 continue prompt b. stop: the id that ends a row; an ended row is filled up with it at
    log-probability 0, and generation ends with the last row. allowed: only ids below it are drawn. cache: a
    KVCache that holds the first tokens of idx already. Raises ValueError for a bad temperature or top_p."""
    check_range("temperature", temperature, 0, 100)
    check_range("top_p", top_p, 1e-6, 1)
    rng = torch.Generator(idx.device).manual_seed(seed)
    size, cache = model.config.block_size, cache or KVCache(model.config)
    context = idx[:, -size:]

    # Prefill: one pass over the prompts, without the tokens that the cache holds; the n samples share it.
    logits = model(context[:, cache.length:], cache=cache)[0][:, -1].repeat_interleave(n, 0)    # (B*n, V)
    cache.repeat(n)
    context = context.repeat_interleave(n, 0)                                                   # (B*n, T)

    # Decode: a pass over one position for each new token.
    ended = torch.zeros(len(context), dtype=torch.bool, device=idx.device)
    for i in range(max_new_tokens):
        if i > 0:
            new = context[:, -1:]
            if cache.length == size:  # full: forget the older half of the context, compute the newer again
                cache.length, new = 0, context[:, -(size // 2):]
            logits = model(new, cache=cache)[0][:, -1]
        log_p = F.log_softmax(logits.float(), dim=-1)
        ids = pick(log_p[:, :allowed], temperature, top_k, top_p, rng)          # (B*n,)
        log_p = log_p.gather(1, ids[:, None])[:, 0]                             # (B*n,)
        if stop is not None:
            ids, log_p = ids.masked_fill(ended, stop), log_p.masked_fill(ended, 0.0)
            ended |= ids == stop
        yield ids, log_p
        if ended.all():
            return
        context = torch.cat((context, ids[:, None]), dim=1)


def pick(log_p, temperature, top_k, top_p, rng):
    """log_p (B, V) -> ids (B,): the likeliest at temperature 0, else drawn from softmax(log_p / temperature).

    top_k > 0 draws from the k likeliest ids alone, top_p < 1 from the fewest ids that together have at least
    that probability (nucleus sampling, Holtzman et al., 2020)."""
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = (log_p - log_p.amax(-1, keepdim=True)) / temperature  # the likeliest stays 0: no overflow near 0
    if top_k:
        least = log_p.topk(min(top_k, log_p.shape[-1]))[0][:, -1:]              # (B, 1)
        log_p = log_p.masked_fill(log_p < least, float("-inf"))
    p = F.softmax(log_p, dim=-1)
    if top_p < 1:
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0                         # likelier ids suffice
        p = torch.zeros_like(p).scatter(1, order, ranked)
    return torch.multinomial(p, 1, generator=rng)[:, 0]


def collect(steps, tok, stream=None):
    """Runs generate(stop=tok.eot) to its end -> for each row (ids, mean log-probability per token in nats).

    A row that emitted <EOT> ends with <EOT>. stream: called with each new piece of text; expects one row."""
    rows, log_ps = [], []
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # a token may end inside a character
    for ids, log_p in steps:
        if stream:
            stream(decoder.decode(tok.decode_bytes(ids.tolist())))
        rows.append(ids)
        log_ps.append(log_p)
    samples = []
    for ids, log_p in zip(torch.stack(rows, 1).tolist(), torch.stack(log_ps, 1).tolist()):
        length = ids.index(tok.eot) + 1 if tok.eot in ids else len(ids)
        samples.append((ids[:length], sum(log_p[:length]) / length))
    return samples


# Infilling

STOPPED, REPEATS, NOT_STOPPED = "stopped", "cut where it repeats the suffix", "did not stop"


@dataclass
class Infill:
    """One sample for a hole. ended: STOPPED (the model emitted <EOT>), REPEATS or NOT_STOPPED. mean_log_p:
    mean log-probability per token in nats, <EOT> and tokens that were cut included."""
    text: str
    ended: str
    mean_log_p: float


def infill(model, tok, prefix, suffix, n=1, prompt=None, max_new_tokens=64, temperature=0.0, top_k=0,
           top_p=1.0, seed=0, stream=None, warn=None, cache=None):
    """Fills the hole between two texts: a list of n Infill, the best first. A sample that did not stop is cut
    where it begins to repeat the suffix.

    prompt: a function, lists of ids prefix and suffix -> the prompt's ids (see objectives.PROMPTS). None:
    that of load_model, the layout in which the model was trained. stream: called with each new piece of text,
    before any cut. cache: a PromptCache, kept from one infill to the next. Both expect n = 1. warn, and the
    ValueError that may be raised: see infill_prompt."""
    ids = infill_prompt(model, tok, prefix, suffix, max_new_tokens, prompt, warn)
    if cache:
        cache.cut_back_to(ids)
    idx = torch.tensor([ids], device=next(model.parameters()).device)           # (1, T)
    steps = generate(model, idx, max_new_tokens, temperature, top_k, top_p, stop=tok.eot, seed=seed, n=n,
                     allowed=tok.eot + 1, cache=cache)
    infills = best_first(collect(steps, tok, stream), tok)
    for sample in infills:
        start = where_suffix_repeats(sample.text, newlines(suffix))
        if sample.ended == NOT_STOPPED and start is not None:
            sample.text, sample.ended = sample.text[:start], REPEATS
    return infills


def infill_prompt(model, tok, prefix, suffix, max_new_tokens, prompt=None, warn=None):
    """Two texts -> the prompt's ids, laid out as in training, with room for max_new_tokens behind them.

    Text that does not fit the room, block_size less three sentinels and max_new_tokens, is trimmed, the
    prefix on its left and the suffix on its right: the suffix gets a third of the room (rounded down), the
    prefix the rest, and either takes what the other does not need. warn is then called with a sentence about
    both: "... the last 30 of 200 tokens of the prefix and the first 15 of 90 of the suffix". Raises
    ValueError where there is no room for text, or nothing says how the model is prompted."""
    prompt = prompt or getattr(model, "prompt", None)
    if not prompt:
        raise ValueError("this model was not trained to infill: expected an objective with an entry in "
                         f"objectives.PROMPTS ({', '.join(PROMPTS)})")
    prefix, suffix = tok.encode(newlines(prefix)), tok.encode(newlines(suffix))
    block_size = model.config.block_size
    room = block_size - 3 - max_new_tokens                                      # for text, beside 3 sentinels
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: the model's context is {block_size} tokens, "
                         f"expected at most {block_size - 4}")
    if len(prefix) + len(suffix) > room:
        for_suffix = min(len(suffix), max(room // 3, room - len(prefix)))
        for_prefix = min(len(prefix), room - for_suffix)
        if warn:
            warn(f"the context of {block_size} tokens holds the last {for_prefix} of {len(prefix)} tokens of "
                 f"the prefix and the first {for_suffix} of {len(suffix)} of the suffix")
        prefix, suffix = prefix[len(prefix) - for_prefix:], suffix[:for_suffix]
    return prompt(prefix, suffix)


def best_first(samples, tok):
    """What collect returns -> a list of Infill, ranked by EOT-aware best of n (FIM, appendix H.3): those that
    ended in <EOT> first; within each group, the highest mean log-probability first. No text is cut."""
    infills = []
    for ids, mean_log_p in samples:
        ended = STOPPED if ids[-1] == tok.eot else NOT_STOPPED
        infills.append(Infill(tok.decode(ids, "ignore"), ended, mean_log_p))  # no half characters at the end
    return sorted(infills, key=lambda sample: (sample.ended != STOPPED, -sample.mean_log_p))


def where_suffix_repeats(text, suffix, least=8):
    """The position in text of the suffix's first lines, as many as hold 8 visible characters (a bracket alone
    says little). None if they do not occur in text, or the suffix is shorter."""
    first_lines = ""
    for line in lines_of(suffix):
        first_lines += line
        if len("".join(first_lines.split())) >= least:
            start = text.find(first_lines.rstrip())
            return start if start >= 0 else None
    return None


class PromptCache(KVCache):
    """A KVCache for one infill after another: the tokens with which two prompts both begin are computed once.

    This is why SPM puts the suffix first (FIM, section 3.1): text appended to the prefix leaves the keys and
    values of the suffix, and of the prefix so far, as they were. In PSM all of the suffix moves.
    ids: the last prompt. reused: how many of its tokens were not computed again."""

    def __init__(self, config):
        super().__init__(config)
        self.ids, self.reused = [], 0

    def cut_back_to(self, ids):
        """Forgets what the cache does not share with the next prompt, a list of ids: sets ids, reused and
        length. The prompt's last token is never reused: generate needs the logits after it. Nor is what was
        not computed: where generate failed, length is below len(self.ids)."""
        most = min(len(self.ids), self.length, len(ids) - 1)
        self.reused = 0
        while self.reused < most and self.ids[self.reused] == ids[self.reused]:
            self.reused += 1
        self.ids, self.length = ids, self.reused


# A run, read from its folder

def load_model(path, device="cpu"):
    """DIR or DIR/ckpt.pt -> (GPT in evaluation mode, Tokenizer, checkpoint as a dict). Raises OSError.

    model.prompt(prefix, suffix), lists of ids -> ids, lays a prompt for infilling out as in training."""
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    load_weights(model, checkpoint["model"], path)
    tok, config = Tokenizer.from_dict(checkpoint["tokenizer"]), checkpoint["config"]
    if config["objective"] in PROMPTS:
        model.prompt = partial(PROMPTS[config["objective"]], tok=tok, **config["knobs"])
    return model.to(device).eval(), tok, checkpoint


def load_checkpoint(path):
    """DIR or DIR/ckpt.pt -> the checkpoint, a dict of tensors and plain values. Raises OSError if not one."""
    file = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise OSError(f"{file}: no such checkpoint; `python train.py` makes one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign pickle, then refuses it
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            checkpoint["text"], checkpoint["config"]["knobs"], GPTConfig(**checkpoint["model_config"])
    except Exception as error:  # a damaged or foreign file fails the unpickler in any way
        raise OSError(f"{file}: not a checkpoint of this version of nanogap, or damaged "
                      f"({type(error).__name__})") from None
    return checkpoint


def load_weights(model, weights, path):
    """Raises OSError where the weights, of the checkpoint at path, are those of another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise OSError(f"{path}: its weights do not fit the model ({why})") from None


def newest_run(root="out"):
    """The folder of the newest checkpoint below root. Raises OSError if there is none."""
    runs = sorted(Path(root).glob("**/ckpt.pt"), key=lambda f: f.stat().st_mtime)
    if not runs:
        raise OSError(f"no checkpoint under {root}/; `python train.py` makes one, "
                      "--ckpt DIR names another place")
    return runs[-1].parent


# The command line

def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError if this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]}); "
                         "expected auto, cpu, cuda, cuda:N or mps") from None


class Parser(argparse.ArgumentParser):
    """argparse, but flags cannot be abbreviated, and a bad argument is a ValueError."""
    hint = ""  # what to add where a flag is unknown

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, usage="%(prog)s [flags]", **settings)

    def error(self, message):
        if "expected one argument" in message:
            message += ": one that begins with - is written --flag=-value"
        if "unrecognized" in message:
            message += self.hint
        raise ValueError(f"{message} (see {self.prog} --help)")


def within(low, high=math.inf):
    """A type for argparse: a number from low to high, whole where low is."""
    def number(text):
        if not low <= type(low)(text) <= high:  # false for NaN, too
            expected = f"{low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return type(low)(text)
    number.__name__ = type(low).__name__
    return number


def one_line_errors(main):
    """Wraps a script's main: prints an error as one line. Exit code 2: bad arguments, 1: a failed run."""
    @functools.wraps(main)
    def wrapped(arguments=None):
        for output in (sys.stdout, sys.stderr):
            if hasattr(output, "reconfigure"):  # a notebook's has not
                output.reconfigure(errors="replace")  # what a terminal or a log cannot show ends no run
        try:
            main(arguments)
            return sys.stdout.flush()
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        except BrokenPipeError:  # the program that reads our output has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, message = 1, ""
        except (ValueError, OSError) as error:
            code, message = 2 if isinstance(error, ValueError) else 1, str(error)
        except (MemoryError, RuntimeError) as error:  # only torch's message tells which error it is
            code, text = 1, str(error) or "out of memory"
            if re.search(r"working (C\+\+ compiler|triton)", text):
                message = f"--compile: {text.splitlines()[0]}; install it, or leave --compile out"
            elif re.search("out of memory|t allocate memory", text):
                message = "out of memory: lower --batch-size, --block-size or --n-embd; in sampling, --n"
            else:
                raise
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(code)
    return wrapped


def unescape(text):
    """A text as typed in a shell: \\n is a line end, \\t a tab, \\\\ a backslash."""
    if re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text")
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def add_sampling(parser):
    """The flags that all scripts which sample share."""
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--n", type=within(1, 1024), default=1, help="samples, infills ranked (default: 1)")
    parser.add_argument("--max-new-tokens", type=within(1), default=64, metavar="N",
                        help="the most per sample (default: 64)")
    parser.add_argument("--temperature", type=within(0.0, 100.0), metavar="T",
                        help="0: greedy (default: 0 for one sample, 0.8 for several)")
    parser.add_argument("--top-k", type=within(0), default=0, metavar="K",
                        help="draw from the K likeliest tokens (default: 0, all)")
    parser.add_argument("--top-p", type=within(1e-6, 1.0), default=1.0, metavar="P",
                        help="draw from the fewest tokens that have this probability (default: 1)")
    parser.add_argument("--seed", type=within(0, 2**63), default=1, help="of the draws (default: 1)")


def encode_raw(text, tok):
    """A text in which <PRE>, <SUF>, <MID>, <EOT> and <MASK> stand for the special ids -> ids."""
    ids = {name: i for i, name in tok.names.items()}
    parts = re.split(f"({'|'.join(ids)})", text)
    return [i for part in parts for i in ([ids[part]] if part in ids else tok.encode(part))]


def read_arguments(arguments):
    """The command line, checked -> (args, mode): prompt, prefix, instruct or raw."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = {"type": unescape, "metavar": "TEXT"}
    parser.add_argument("--prompt", **text, help="text to continue (\\n: line end, \\\\: backslash)")
    parser.add_argument("--prefix", **text, help="text before the hole")
    parser.add_argument("--suffix", **text, help="text after the hole")
    parser.add_argument("--instruct", **text, help="a prompt to answer, for a model trained on pairs")
    parser.add_argument("--raw", **text, help="a prompt with sentinels: <PRE> <SUF> <MID> <EOT> <MASK>")
    parser.add_argument("--order", choices=("psm", "spm"), help="of infilling, for a model trained in both")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    add_sampling(parser)
    args = parser.parse_args(arguments)
    if args.prefix is not None or args.suffix is not None:
        args.prefix, args.suffix = args.prefix or "", args.suffix or ""
    modes = [name for name in ("prompt", "prefix", "instruct", "raw") if getattr(args, name) is not None]
    if len(modes) != 1:
        raise ValueError("expected one of --prompt, --instruct, --raw, or --prefix and --suffix")
    if args.stream and args.n > 1:
        raise ValueError(f"--n {args.n}: expected one sample with --stream")
    return args, modes[0]


@one_line_errors
def main(arguments=None):
    args, mode = read_arguments(arguments)
    path = args.ckpt or newest_run()
    model, tok, checkpoint = load_model(path, pick_device(args.device))
    objective, knobs = checkpoint["config"]["objective"], checkpoint["config"]["knobs"]
    temperature = args.temperature if args.temperature is not None else 0.0 if args.n == 1 else 0.8
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": temperature, "top_k": args.top_k,
                "top_p": args.top_p, "seed": args.seed, "n": args.n}
    stream = partial(print, end="", flush=True) if args.stream else None

    if mode == "prefix":
        prompt = None  # that of the training
        if args.order:
            if "spm_rate" not in knobs:
                raise ValueError(f"--order {args.order}: {path} was trained with --objective {objective}, "
                                 "expected fim or fim_meap, which have both orders")
            prompt = partial(fim_prompt, tok=tok, order=args.order, spm_layout=knobs["spm_layout"])
        infills = infill(model, tok, args.prefix, args.suffix, prompt=prompt, stream=stream, warn=note,
                         **settings)
        for rank, best in enumerate(infills, 1):
            if args.n > 1:
                print(f"--- {rank} of {args.n}, {best.ended}, {best.mean_log_p:.2f} nats per token")
            print("" if args.stream else args.prefix + paint(best.text) + args.suffix)
            if args.n == 1:
                note(f"{best.ended}, {best.mean_log_p:.2f} nats per token")
        return

    if mode == "instruct" and objective not in ON_PAIRS:
        raise ValueError(f"{path} was trained with --objective {objective}, which never saw prompts and "
                         f"answers: expected a checkpoint of {' or '.join(ON_PAIRS)}, or --prompt instead")
    text = newlines(getattr(args, mode))
    ids = encode_raw(text, tok) if mode == "raw" else [*tok.encode(text), *[tok.mid] * (mode == "instruct")]
    idx = torch.tensor([ids or [tok.eot]], device=next(model.parameters()).device)  # <EOT>: a document begins
    print(text, end="" if args.n == 1 else "\n", flush=True)
    samples = collect(generate(model, idx, stop=tok.eot, allowed=tok.eot + 1, **settings), tok, stream)
    for number, (ids, mean_log_p) in enumerate(samples, 1):
        if args.n > 1:
            print(f"--- {number} of {args.n}, {mean_log_p:.2f} nats per token")
        print("" if args.stream else tok.decode(ids, "ignore"))


def note(message):
    print(f"({message})", file=sys.stderr)


def paint(text):
    """Bold green on a terminal, plain elsewhere."""
    return f"\033[1;32m{text}\033[0m" if sys.stdout.isatty() else text


if __name__ == "__main__":
    main()
