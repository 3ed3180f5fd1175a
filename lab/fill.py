"""Fill the hole in a file: its text has <FILL> in one place.

    python -m lab.fill draft.py                    prints the file with an infill in the hole
    python -m lab.fill draft.py --n 8 --write      the best of eight goes into the file
"""
import os
import shutil
from itertools import count
from pathlib import Path

from data import open_text
from sample import (Parser, add_sampling, infill, load_model, newest_run, note, one_line_errors, paint,
                    pick_device)

FILL = "<FILL>"


def write_infill(path, text):
    """Puts text, with the file's line ends, in place of its <FILL>, atomically: path is always the old or the
    new file, whole. The old one is kept as PATH.orig, or PATH.orig1 if that exists, and so on: its path is
    returned. Raises OSError."""
    path = Path(path).resolve()  # a link stays a link
    old = path.read_bytes()
    if b"\r\n" in old:
        text = text.replace("\n", "\r\n")
    kept = next(name for i in count() if not os.path.exists(name := f"{path}.orig{i or ''}"))
    shutil.copy2(path, kept)
    shutil.copy2(path, f"{path}.tmp")  # with its permissions
    with open(f"{path}.tmp", "wb") as f:
        f.write(old.replace(FILL.encode(), text.encode()))
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    return kept


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help=f"a text with {FILL} in one place, the hole")
    parser.add_argument("--write", action="store_true",
                        help="put the best infill into the file, and keep the old one as FILE.orig")
    add_sampling(parser)
    args = parser.parse_args(arguments)
    with open_text(Path(args.file), "FILE") as f:
        parts = f.read().split(FILL)
    if len(parts) != 2:
        raise ValueError(f"{args.file}: expected one {FILL} where the hole is, found {len(parts) - 1}")
    prefix, suffix = parts
    model, tok, _ = load_model(args.ckpt or newest_run(), pick_device(args.device))
    temperature = args.temperature if args.temperature is not None else 0.0 if args.n == 1 else 0.8
    infills = infill(model, tok, prefix, suffix, args.n, max_new_tokens=args.max_new_tokens,
                     temperature=temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, warn=note)
    for sample in infills:
        print(prefix + paint(sample.text) + suffix, flush=True)
        note(f"{sample.ended}, {sample.mean_log_p:.2f} nats per token")
    if args.write:
        note(f"written: {args.file}; before: {write_infill(args.file, infills[0].text)}")


if __name__ == "__main__":
    main()
