"""What every script shares: one-line error messages, devices, and a run's folder on disk.

Functions raise ValueError (a bad argument) or OSError (a failed run) with a whole sentence; one_line_errors,
which wraps each script's main, prints that sentence and exits with code 2 or 1.
"""
import argparse
import functools
import json
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch


class Parser(argparse.ArgumentParser):
    """argparse, but a bad argument raises ValueError, and flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, arguments=None, namespace=None):  # parse_args calls it
        for argument in sys.argv[1:] if arguments is None else arguments:
            check_utf8(argument)
        return super().parse_known_args(arguments, namespace)

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def check_utf8(text):
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{text!r}: not UTF-8 text (it has a lone surrogate)")


def flag_of(name):
    return "--" + name.replace("_", "-")


def one_line_errors(main):
    """Wraps a script's main: prints an error as one line; exit code 2: bad arguments, 1: a failed run."""
    @functools.wraps(main)
    def wrapped(arguments=None):
        try:
            return main(arguments)
        except ValueError as error:
            code, message = 2, error
        except NotImplementedError as error:  # a function that a lab left empty
            code, message = 1, f"{error}: not written yet"
        except BrokenPipeError:  # the program that reads our output has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, message = 1, ""
        except OSError as error:
            code, message = 1, error
        except (MemoryError, RuntimeError) as error:  # only torch's message tells which error it is
            code, text = 1, str(error)
            if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
                message = "out of memory: lower --batch-size, --block-size or --n-embd; in sampling, --n"
            elif re.search(r"working (C\+\+ compiler|triton)", text):
                message = f"--compile: {text.splitlines()[0]}; install it, or leave --compile out"
            else:
                raise
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(code)
    return wrapped


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError if this machine has no such device."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps", name):  # torch has others, such as meta
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    return device


def has_fast_bf16(device):
    """True if the device computes faster in bf16 than in fp32. On a CPU that has bf16 instructions, products
    are timed: AVX512-BF16 halves their time on AMD's Zen 4, but doubled it on a Xeon whose AMX is off."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Only oneDNN's own check obeys ONEDNN_MAX_CPU_ISA=AVX2, which turns newer instruction sets off.
    checks = (getattr(torch.cpu, "_is_avx512_bf16_supported", None),
              getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None))
    if device.type != "cpu" or not all(check is not None and check() for check in checks):
        return False
    A = torch.ones(512, 512)
    return seconds_of_product(A.bfloat16()) < seconds_of_product(A)


def seconds_of_product(A):
    """The seconds of the fastest of 20 products A A."""
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        A @ A
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint atomically: path is always, even after a power cut, the old or the new one, whole.

    Raises OSError if the checkpoint cannot be written."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns some failed writes into a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: step {checkpoint['step']} could not be saved ({cause}); "
                      "what was saved before is whole") from None


def load_checkpoint(path):
    """DIR or DIR/ckpt.pt -> the checkpoint, a dict of tensors and plain values. Raises OSError if not one."""
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        raise OSError(f"{file}: no such checkpoint; `python train.py` makes one")
    checkpoint = load_tensors(file)
    missing = [key for key in ("model", "optimizers", "model_config", "tokenizer", "config", "step")
               if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise OSError(f"{file}: not a checkpoint of this version of nanogap, it lacks {', '.join(missing)}")
    return checkpoint


def load_tensors(file, device="cpu"):
    """Loads tensors and plain values that torch.save wrote. Raises OSError if the file is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign pickle before refusing it
            if zipfile.is_zipfile(file):  # torch's format; torch itself does not verify its checksums
                with zipfile.ZipFile(file) as parts:
                    if parts.testzip():
                        raise zipfile.BadZipFile
            return torch.load(file, map_location=device, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged or foreign file can fail the unpickler in any way
        raise OSError(f"{file}: not a whole checkpoint of tensors and plain values "
                      f"({type(error).__name__})") from None


@contextmanager
def checkpoint_fits(path):
    """A context that raises OSError if the settings or weights of the checkpoint at path do not fit."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: from another version of nanogap, or damaged "
                      f"({type(error).__name__}: {why})") from None


def newest_run(root="out"):
    """The folder of the newest checkpoint below root. Raises OSError if there is none."""
    runs = sorted(Path(root).glob("**/ckpt.pt"), key=lambda f: f.stat().st_mtime)
    if not runs:
        raise OSError(f"no checkpoint under {root}/; `python train.py` makes one, "
                      "--ckpt DIR names another place")
    return runs[-1].parent


def lock(folder):
    """Locks a folder against other runs while the returned file is open, at most until the process ends.

    Raises OSError if another run has the lock. (Windows and some network disks have no locks: no error.)"""
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"--out {folder}: another run is at work in this folder; "
                      "wait, or take another") from None
    except (ImportError, OSError):
        pass
    return file


def open_metrics(path, first):
    """Opens metrics.jsonl, one JSON object a line, for appending. Removes damaged lines and those of steps
    after first, the step that the run resumes from."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            kept += [line + "\n"] if json.loads(line)["step"] <= first else []
        except (ValueError, KeyError, TypeError):
            pass
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return open(path, "a")


class Interrupt:
    """A context in which Ctrl-C (or kill) sets asked: stop after this step. A second Ctrl-C stops at once."""
    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step ...")

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
