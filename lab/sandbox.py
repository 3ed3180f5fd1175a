"""Runs Python that nobody has read, such as a model's completions, in a process of its own, with limits.

    run(source, "heapq", {"merge": docstring})      the source as module heapq, then a docstring's examples

The process has a time and a memory limit and an empty folder, and an audit hook (PEP 578) refuses sockets,
other processes, ctypes, and any change to files outside the folder. That guards against accidents: an endless
loop, a hungry list, a stray open(..., "w"). It is no wall against malice: code in the same process can undo
what Python does, and reading files is allowed. Code from strangers belongs in a container.
"""
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import NamedTuple

MEMORY = 2**29  # bytes of address space
OUTPUT = 2**20  # bytes that a program may print, or write into a file
REFUSED = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "resource.", "signal.",
           "winreg.", "_winapi.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


class Outcome(NamedTuple):
    ok: bool        # everything passed
    passed: dict    # {name of a docstring: did it}; empty if the process ended early


def run(program, module, docstrings, timeout=5.0, each=2.0):
    """Runs the program (source text) under a module's name, and the examples of docstrings ({name: text}) in
    it, each in a fresh copy.

    timeout: seconds of the CPU; ten times as many of the clock, since the machine may be busy. each: seconds
    of the CPU for one of several docstrings. They hold where the system knows such limits. Whatever the
    program does, nothing is raised here."""
    job = {"program": program, "module": module, "docstrings": docstrings, "timeout": timeout, "each": each,
           "token": secrets.token_hex(16)}
    env = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, tempfile.TemporaryFile() as output:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-I", "-B", __file__], cwd=folder, env=env,
                           input=json.dumps(job).encode(), stdout=output, stderr=subprocess.STDOUT,
                           start_new_session=True, timeout=10 * timeout)
        output.seek(0)
        verdict = output.read(2 * OUTPUT).decode("utf-8", "replace").partition(job["token"])[2]
    passed = json.loads(verdict or "{}")
    return Outcome(bool(passed) and all(passed.values()), passed)


def child():
    """What the process does: reads the job, limits itself, runs it, and prints token and verdict."""
    import doctest
    job = json.loads(sys.stdin.buffer.read())
    limit(job["timeout"])
    many = len(job["docstrings"]) > 1 and hasattr(signal, "setitimer")
    if many:  # one endless loop must not take the others' time
        signal.signal(signal.SIGPROF, signal.default_int_handler)
    sys.addaudithook(guard(os.path.realpath(os.getcwd())))
    code, passed = None, {}
    for key, docstring in job["docstrings"].items():
        passed[key] = False
        with suppress(BaseException):  # SystemExit, too
            if many:
                signal.setitimer(signal.ITIMER_PROF, job["each"], job["each"])
            code = code or compile(job["program"], job["module"], "exec")
            exec(code, namespace := {"__name__": job["module"]})
            test = doctest.DocTestParser().get_doctest(docstring, namespace, key, None, 0)
            passed[key] = doctest.DocTestRunner(verbose=False).run(test).failed == 0
        if many:
            signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout = sys.__stdout__
    print(job["token"] + json.dumps(passed), flush=True)
    os._exit(0)  # what the program has left for its exit prints nothing after the verdict


def limit(seconds):
    """Sets the process's limits, as far as the system knows them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, bound in {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": OUTPUT,
                        "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}.items():
        with suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (bound, bound))


def guard(folder):
    """The audit hook: raises PermissionError at what the top of this file lists. Files may be written below
    folder."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside = os.path.join(folder, "")

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if flags & writing and (isinstance(path, int) or
                                    not os.path.realpath(os.fsdecode(path)).startswith(inside)):
                raise PermissionError(f"refused here: writing {path!r}")
        elif event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"refused here: {event}")
    return hook


if __name__ == "__main__":
    child()
