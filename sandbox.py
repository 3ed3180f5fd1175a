"""Runs Python that nobody has read, such as a model's completions, in a process of its own, with limits.

    run("x = 1 + 1")                                    -> Outcome(ok=True, ...)
    run(source, "heapq", {"merge": docstring})          the source as module heapq, then the examples of the docstring

The process has a time and a memory limit and an empty folder, and an audit hook (PEP 578) that refuses sockets, other
processes, ctypes, writing outside the folder and any change to the file system. That is a guard against accidents: an
endless loop, a hungry list, a stray open(..., "w"). It is no wall against malice, because code in the same process can
undo what Python does, reading files is allowed, and there is no container around it. For code from strangers use one.
"""
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

OUTPUT = 2**20  # bytes that a program may print, or write into a file
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr", "os.putenv", "os.unsetenv")
REFUSED = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "resource.", "signal.", "winreg.", "_winapi.")


class Outcome(NamedTuple):
    ok: bool        # the program ran to its end and every example of every docstring gave what it says
    passed: dict    # {name of a docstring: did it}
    lines: dict     # {name of a docstring: the program's lines that its examples ran}, where trace was asked for
    why: str        # the end of what was printed, or which limit was met


def run(program, module="__main__", docstrings=None, trace=False, timeout=5.0, memory=2**29):
    """Runs the program (source text) under a module's name; then, in a fresh copy of it each, the docstrings' examples.

    timeout: seconds of the CPU; ten times as many of the clock, since the machine may be busy. memory: bytes of address
    space. Both hold where the system knows such limits. Whatever the program does, nothing is raised here."""
    token = secrets.token_hex(16)
    job = {"program": program, "module": module, "docstrings": docstrings or {}, "trace": trace, "timeout": timeout,
           "memory": memory, "token": token}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-I", "-B", __file__], stdin=subprocess.PIPE, stdout=output,
                                   stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
                                   env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ})
        try:
            process.communicate(json.dumps(job).encode(), 10 * timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        printed, _, verdict = output.read(2 * OUTPUT).decode("utf-8", "replace").partition(token)
    if not verdict:
        stopped = process.returncode in (-signal.SIGKILL, -getattr(signal, "SIGXCPU", 0))
        why = f"stopped: {timeout:g} s of the CPU, or ten times as many of the clock, are over" if stopped else ""
        return Outcome(False, {}, {}, why or printed.strip()[-300:] or f"left early, with status {process.returncode}")
    passed, lines = json.loads(verdict)
    return Outcome(all(passed.values()), passed, lines, printed.strip()[-300:])


def child():
    """What the process does: reads the job, limits itself, runs it, and prints the token and the verdict last."""
    import doctest
    import types
    job = json.loads(sys.stdin.buffer.read())
    limit(job["timeout"], job["memory"])
    sys.addaudithook(guard(os.path.realpath(os.getcwd())))
    filename = f"<{job['module']}>"
    code = compile(job["program"], filename, "exec")

    def fresh_module():
        module = sys.modules[job["module"]] = types.ModuleType(job["module"])
        module.__file__ = filename
        exec(code, module.__dict__)
        return module

    passed, lines, module = {}, {}, fresh_module()
    for number, (name, docstring) in enumerate(job["docstrings"].items()):
        module = fresh_module() if number else module
        test = doctest.DocTestParser().get_doctest(docstring, dict(module.__dict__), name, None, 0)
        ran = set()

        def tracer(frame, event, _):
            if frame.f_code.co_filename != filename:
                return None
            ran.add(frame.f_lineno)
            return tracer

        sys.settrace(tracer if job["trace"] else None)
        passed[name] = doctest.DocTestRunner(verbose=False).run(test).failed == 0
        sys.settrace(None)
        lines[name] = sorted(ran)
    sys.stdout = sys.__stdout__
    print(job["token"] + json.dumps([passed, lines]), flush=True)


def limit(seconds, memory):
    """Sets the process's limits, as far as the system knows them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_AS": memory, "RLIMIT_FSIZE": OUTPUT, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (AttributeError, OSError, ValueError):
            pass


def guard(folder):
    """The audit hook: raises PermissionError at what the top of this file lists. Files may be written below folder."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside = os.path.join(folder, "")

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if flags & writing and (isinstance(path, int) or not os.path.realpath(os.fsdecode(path)).startswith(inside)):
                raise PermissionError(f"refused here: writing {path!r}")
        elif event.startswith(REFUSED) and event not in HARMLESS:
            raise PermissionError(f"refused here: {event}")
    return hook


if __name__ == "__main__":
    child()
