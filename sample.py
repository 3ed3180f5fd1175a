"""Use a trained model: continue a prompt, or fill a hole between a prefix and a suffix.

    python sample.py --prompt "def main("
    python sample.py --prefix "def mean(xs):\\n    return " --suffix " / len(xs)\\n"
    python sample.py --file draft.py                    # a text with <FILL> where the hole is
    python sample.py --file draft.py --write            # the best infill goes into the file
    python sample.py --file draft.py --interactive      # type at the hole, get an infill, type on
    python sample.py --instruct "def mean(xs):\\n"       # a model that was fine-tuned on prompts and answers

What the model is given, and what it then generates, up to <EOT>:

    left to right      prompt                              continuation
    infilling, PSM     <PRE> prefix <SUF> suffix <MID>     middle
    infilling, SPM     <PRE> suffix <SUF> prefix <MID>     middle    (or another of objectives.SPM_LAYOUTS)
    fine-tuned         prompt <MID>                        answer

B: prompts in a batch, n: samples of each, T: tokens, V: vocabulary.
"""
import codecs
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

from cli import Parser, check_utf8, checkpoint_fits, load_checkpoint, newest_run, one_line_errors, pick_device
from data import Tokenizer, split_lines
from model import GPT, GPTConfig, KVCache
from objectives import ON_PAIRS, ORDERS, check_range, fim_prompt

FILL = "<FILL>"
STOPPED, CUT, NOT_STOPPED = "stopped", "cut where it repeats the suffix", "did not stop"


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
    cache = cache or KVCache(model.config)
    context = idx[:, -model.config.block_size:]
    logits = prefill(model, context, cache, n)                                  # (B*n, V)
    context = context.repeat_interleave(n, 0)                                   # (B*n, T)
    ended = torch.zeros(len(context), dtype=torch.bool, device=idx.device)
    for step in range(max_new_tokens):
        if step > 0:
            logits = decode_one_token(model, context, cache)
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


def prefill(model, idx, cache, n):
    """One pass over prompts idx (B, T), without the tokens that the cache holds -> the next token's logits
    (B*n, V). The cache then holds each prompt n times."""
    logits = model(idx[:, cache.length:], cache=cache)[0][:, -1]                # (B, V)
    if n > 1:
        cache.repeat(n)
    return logits.repeat_interleave(n, 0)


def decode_one_token(model, context, cache):
    """context (B, T), of which the cache holds all but the last token -> the next token's logits (B, V).

    When the cache is full, the older half of the context is forgotten and the newer half computed again."""
    new = context[:, -1:]
    if cache.length == model.config.block_size:
        cache.length, new = 0, context[:, -(model.config.block_size // 2):]
    return model(new, cache=cache)[0][:, -1]


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
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    for ids, log_p in steps:
        if stream:
            stream(decoder.decode(tok.decode_bytes(ids.tolist())))
        rows.append(ids)
        log_ps.append(log_p)
    if stream:
        stream(decoder.decode(b"", final=True))
    samples = []
    for ids, log_p in zip(torch.stack(rows, 1).tolist(), torch.stack(log_ps, 1).tolist()):
        length = ids.index(tok.eot) + 1 if tok.eot in ids else len(ids)
        samples.append((ids[:length], sum(log_p[:length]) / length))
    return samples


@dataclass
class Infill:
    """One sample for a hole. ended: STOPPED (the model emitted <EOT>), CUT or NOT_STOPPED. mean_log_p: mean
    log-probability per token in nats, <EOT> and tokens that were cut included."""
    text: str
    ended: str
    mean_log_p: float


def infill(model, tok, prefix, suffix, n=1, max_new_tokens=64, order="spm", spm_layout="swapped",
           temperature=0.0, top_k=0, top_p=1.0, seed=0, stream=None, warn=None, cache=None):
    """Fills the hole between two texts: a list of n Infill, the best first. A sample that did not stop is cut
    where it begins to repeat the suffix.

    stream: called with each new piece of text, before any cut. cache: a PromptCache, kept from one infill to
    the next. Both expect n = 1. warn, and the ValueError that may be raised: see infill_prompt."""
    prompt = infill_prompt(model, tok, prefix, suffix, max_new_tokens, order, spm_layout, warn)
    if cache:
        cache.cut_back_to(prompt)
    idx = torch.tensor([prompt], device=next(model.parameters()).device)        # (1, T)
    steps = generate(model, idx, max_new_tokens, temperature, top_k, top_p, stop=tok.eot, seed=seed, n=n,
                     allowed=tok.eot + 1, cache=cache)
    infills = best_first(collect(steps, tok, stream), tok)
    for sample in infills:
        start = where_suffix_repeats(sample.text, suffix)
        if sample.ended == NOT_STOPPED and start is not None:
            sample.text, sample.ended = sample.text[:start], CUT
    return infills


def infill_prompt(model, tok, prefix, suffix, max_new_tokens, order, spm_layout, warn=None):
    """Two texts -> the prompt's ids, laid out as in training, with room for max_new_tokens behind them.

    Text that does not fit the room, block_size less three sentinels and max_new_tokens, is trimmed, the
    prefix on its left and the suffix on its right: the suffix gets a third of the room (rounded down), the
    prefix the rest, and either takes what the other does not need. warn is then called with a sentence about
    both: "... the last 30 of 200 tokens of the prefix and the first 15 of 90 of the suffix". Raises
    ValueError where there is no room for text."""
    prefix, suffix = tok.encode(prefix), tok.encode(suffix)
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
    return fim_prompt(prefix, suffix, tok, order, spm_layout)


def best_first(samples, tok):
    """What collect returns -> a list of Infill, ranked by EOT-aware best of n (FIM, appendix H.3): those that
    ended in <EOT> first; within each group, the highest mean log-probability first. No text is cut."""
    infills = []
    for ids, mean_log_p in samples:
        ended = STOPPED if ids[-1] == tok.eot else NOT_STOPPED
        infills.append(Infill(tok.decode(ids), ended, mean_log_p))
    return sorted(infills, key=lambda sample: (sample.ended != STOPPED, -sample.mean_log_p))


def where_suffix_repeats(text, suffix, least=8):
    """The position in text of the suffix's first lines, as many as hold 8 visible characters (a bracket alone
    says little). None if they do not occur in text, or the suffix is shorter."""
    first_lines = ""
    for line in split_lines(suffix):
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

    def cut_back_to(self, prompt):
        """Forgets what the cache does not share with the next prompt, a list of ids: sets ids, reused and
        length. The prompt's last token is never reused."""
        most = min(len(self.ids), len(prompt) - 1)  # generate needs the logits after the last token
        self.reused = 0
        while self.reused < most and self.ids[self.reused] == prompt[self.reused]:
            self.reused += 1
        self.ids, self.length = prompt, self.reused


def load_model(path, device="cpu"):
    """DIR or DIR/ckpt.pt -> (GPT in evaluation mode, Tokenizer, checkpoint as a dict). Raises OSError."""
    checkpoint = load_checkpoint(path)
    with checkpoint_fits(path):
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        tok = Tokenizer.from_dict(checkpoint["tokenizer"])
    return model.to(device).eval(), tok, checkpoint


def trained_orders(knobs):
    """An objective's knobs -> the orders of infilling that it trains, of "psm" and "spm"; [] without FIM."""
    if not knobs.get("fim_rate"):
        return []
    orders = []
    if knobs["spm_rate"] < 1:
        orders.append("psm")
    if knobs["spm_rate"] > 0:
        orders.append("spm")
    return orders


def unescape(text):
    """A text as typed in a shell, with \\n for a line end and \\t for a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read_arguments(arguments):
    """The command line, checked; the text of --file is in prefix and suffix. Raises ValueError or OSError."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = {"type": unescape, "metavar": "TEXT"}
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    parser.add_argument("--prompt", **text, help="text to continue (\\n is a line end)")
    parser.add_argument("--instruct", **text, help="a prompt to answer, for a model trained on pairs")
    parser.add_argument("--prefix", **text, help="text before the hole")
    parser.add_argument("--suffix", **text, help="text after the hole")
    parser.add_argument("--file", help=f"a text with one {FILL} in it, the hole")
    parser.add_argument("--write", action="store_true", help="put the best infill into the file, and keep "
                        "the old one as FILE.orig")
    parser.add_argument("--interactive", action="store_true", help="type at the hole, get an infill, type on")
    parser.add_argument("--order", choices=ORDERS, help="of infilling (default: spm if trained, else psm)")
    parser.add_argument("--n", type=int, default=1, help="samples; infills are ranked (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0 if --n is 1, else 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens, 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest with this probability")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--stream", action="store_const", const=partial(print, end="", flush=True),
                        help="print tokens as they come")
    parser.add_argument("--html", metavar="FILE", help="write a page on an infill and what it attends to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.8
    check_range("--n", args.n, 1, 1024)
    check_range("--max-new-tokens", args.max_new_tokens, 1, 10**6)
    check_range("--temperature", args.temperature, 0, 100)
    check_range("--top-k", args.top_k, 0, 10**6)
    check_range("--top-p", args.top_p, 1e-6, 1)
    if (args.stream or args.interactive) and args.n > 1:
        raise ValueError(f"--n {args.n}: expected one sample with --stream and --interactive")
    if args.write and (args.file is None or args.interactive):
        raise ValueError("--write: expected --file, without --interactive")
    if args.html and (args.n > 1 or args.interactive or args.prompt is not None or args.instruct is not None):
        raise ValueError("--html: expected one infill, of --prefix and --suffix or of --file, without --n, "
                         "--interactive, --prompt and --instruct")
    is_hole = args.prefix is not None or args.suffix is not None or args.interactive and args.file is None
    if sum([args.prompt is not None, args.instruct is not None, args.file is not None, is_hole]) != 1:
        raise ValueError("expected one of --prompt, --instruct, --prefix with --suffix, or --file")
    if args.file is not None:
        args.prefix, args.suffix = read_hole(args.file)
    args.prefix, args.suffix = args.prefix or "", args.suffix or ""
    return args


def read_hole(path):
    """A file -> the texts before and after its one <FILL>. Raises ValueError where it has not one."""
    try:
        parts = Path(path).read_text(encoding="utf-8-sig").split(FILL)
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {path}: expected UTF-8 text, got {error}") from None
    if len(parts) != 2:
        raise ValueError(f"--file {path}: expected one {FILL} where the hole is, found {len(parts) - 1}")
    return parts


def write_infill(path, text):
    """Puts text in place of the file's <FILL>, atomically: path is always the old or the new file, whole.

    The rest of the file stays as it is, with its permissions; where it has CRLF line ends, text gets them.
    The old file is kept as PATH.orig, or .orig1 if that exists, and so on: its path is returned. Raises
    OSError."""
    path = Path(path).resolve()  # a link stays a link
    old = path.read_bytes()
    if b"\r\n" in old:
        text = text.replace("\n", "\r\n")
    names = (Path(f"{path}.orig{i or ''}") for i in count())
    kept = next(name for name in names if not name.exists())
    shutil.copy2(path, kept)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
        try:
            f.write(old.replace(FILL.encode(), text.encode()))
            f.flush()
            os.fsync(f.fileno())
            shutil.copymode(path, f.name)
            os.replace(f.name, path)
        except OSError:
            os.unlink(f.name)
            raise
    return kept


def warn(message):
    print(f"note: {message}", file=sys.stderr)


def paint(text):
    """Bold green on a terminal, plain elsewhere."""
    return f"\033[1;32m{text}\033[0m" if sys.stdout.isatty() else text


def continue_text(model, tok, objective, args, **sampling):
    """--prompt and --instruct: prints the text and n continuations or answers."""
    if args.instruct is None:
        text = args.prompt
        ids = tok.encode(text) or [tok.eot]  # a document follows the <EOT> of another
    elif objective in ON_PAIRS:
        text = args.instruct
        ids = [*tok.encode(text), tok.mid]
    else:
        raise ValueError(f"{args.ckpt} was trained with --objective {objective}, which never saw prompts and "
                         f"answers: expected a checkpoint of {' or '.join(ON_PAIRS)}, or --prompt instead")
    print(text, end="" if args.n == 1 else "\n", flush=True)
    idx = torch.tensor([ids], device=next(model.parameters()).device)           # (1, T)
    steps = generate(model, idx, args.max_new_tokens, stop=tok.eot, allowed=tok.eot + 1, n=args.n, **sampling)
    for number, (ids, mean_log_p) in enumerate(collect(steps, tok, args.stream), 1):
        if args.n > 1:
            print(f"--- {number} of {args.n}, {mean_log_p:.2f} nats a token")
        print("" if args.stream else tok.decode(ids))


def fill_hole(model, tok, objective, knobs, args, **sampling):
    """--prefix, --suffix, --file: prints prefix, infill and suffix, for each of n infills; --interactive."""
    orders = trained_orders(knobs)
    if not orders:
        raise ValueError(f"{args.ckpt} was trained with --objective {objective}, which never saw a gap: "
                         "expected a checkpoint of fim_psm, fim_spm, fim or fim_meap, or --prompt instead")
    order = args.order or orders[-1]
    if order not in orders:
        warn(f"this model was never trained on {order}")
    settings = sampling | {"max_new_tokens": args.max_new_tokens, "order": order,
                           "spm_layout": knobs["spm_layout"], "stream": args.stream, "warn": warn}
    if args.html:
        from lab.page import draw_infill
        return draw_infill(args.html, model, tok, args.prefix, args.suffix, **settings)
    if args.interactive:
        return type_and_infill(model, tok, args.prefix, args.suffix, **settings)
    infills = infill(model, tok, args.prefix, args.suffix, args.n, **settings)
    for rank, best in enumerate(infills, 1):
        if args.n > 1:
            print(f"--- {rank} of {args.n}, {best.ended}, {best.mean_log_p:.2f} nats a token")
        print("" if args.stream else args.prefix + paint(best.text) + args.suffix)
        if args.n == 1:
            print(f"({best.ended}, {best.mean_log_p:.2f} nats a token)", file=sys.stderr)
    if args.write:
        print(f"written: {args.file}; before: {write_infill(args.file, infills[0].text)}", file=sys.stderr)


def type_and_infill(model, tok, prefix, suffix, **settings):
    """--interactive: infills after each typed line, until the input ends. The line is appended to the prefix;
    an empty one appends the last infill."""
    cache, accepted = PromptCache(model.config), ""
    while True:
        try:
            typed = input("> ")
        except EOFError:
            return print()
        check_utf8(typed)
        prefix += unescape(typed) or accepted
        best, = infill(model, tok, prefix, suffix, cache=cache, **settings)
        accepted = best.text
        print("" if settings["stream"] else prefix + paint(best.text) + suffix)
        print(f"({best.ended}, {best.mean_log_p:.2f} nats a token; "
              f"{cache.reused} of the prompt's {len(cache.ids)} tokens reused)", file=sys.stderr)


@one_line_errors
def main(arguments=None):
    args = read_arguments(arguments)
    args.ckpt = args.ckpt or newest_run()
    model, tok, checkpoint = load_model(args.ckpt, pick_device(args.device))
    with checkpoint_fits(args.ckpt):
        objective, knobs = checkpoint["config"]["objective"], checkpoint["config"]["knobs"]
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.prompt is not None or args.instruct is not None:
        continue_text(model, tok, objective, args, **sampling)
    else:
        fill_hole(model, tok, objective, knobs, args, **sampling)


if __name__ == "__main__":
    main()
