"""Runs Python that nobody has read, such as a model's completions, in a process of its own, with limits.

    run("x = 1 + 1")                                -> Outcome(ok=True, ...)
    run(source, "heapq", {"merge": docstring})      the source as module heapq, then a docstring's examples

The process has a time and a memory limit and an empty folder, and an audit hook (PEP 578) refuses sockets,
other processes, ctypes, writing outside the folder and any other change to the file system. That is a guard
against accidents: an endless loop, a hungry list, a stray open(..., "w"). It is no wall against malice: code
in the same process can undo what Python does, and reading files is allowed. Code from strangers belongs in a
container.
"""
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

OUTPUT = 2**20  # bytes that a program may print, or write into a file
REFUSED = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "resource.", "signal.",
           "winreg.", "_winapi.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


class Outcome(NamedTuple):
    ok: bool        # everything passed
    passed: dict    # {name: did it}: the program, or each docstring, or each hole
    lines: dict     # {name: the program's lines that its examples ran}, where trace was asked for
    why: str        # the end of what was printed, or which limit was met


def run(program, module="__main__", docstrings=None, holes=None, trace=False, timeout=5.0, memory=2**29,
        each=2.0):
    """Runs the program (source text) under a module's name, and the examples of docstrings ({name: text}) in
    it, each in a fresh copy; or, with holes ({name: (start, end, name of a docstring)}), in a copy without
    program[start:end].

    timeout: seconds of the CPU; ten times as many of the clock, since the machine may be busy. memory: bytes
    of address space. each: seconds of the CPU for one of several. They hold where the system knows such
    limits. Whatever the program does, nothing is raised here."""
    if holes is None:
        holes = {name: (0, 0, name) for name in docstrings or ()} or {"program": (0, 0, None)}
    job = {"program": program, "module": module, "docstrings": docstrings or {}, "holes": holes,
           "trace": trace, "timeout": timeout, "memory": memory, "each": each,
           "token": secrets.token_hex(16)}
    env = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-I", "-B", __file__], cwd=folder, env=env, stdout=output,
                                   stdin=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.communicate(json.dumps(job).encode(), 10 * timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        printed, _, verdict = output.read(2 * OUTPUT).decode("utf-8", "replace").partition(job["token"])
    if not verdict:
        stopped = process.returncode in (-signal.SIGKILL, -getattr(signal, "SIGXCPU", 0))
        if stopped:
            printed = f"stopped: {timeout:g} s of the CPU, or ten times as many of the clock, are over"
        why = printed.strip()[-300:] or f"left early, with status {process.returncode}"
        return Outcome(False, {}, {}, why)
    passed, lines = json.loads(verdict)
    return Outcome(all(passed.values()), passed, lines, printed.strip()[-300:])


def child():
    """What the process does: reads the job, limits itself, runs it, and prints token and verdict."""
    import doctest
    import traceback
    import types
    job = json.loads(sys.stdin.buffer.read())
    limit(job["timeout"], job["memory"])
    many = len(job["holes"]) > 1 and hasattr(signal, "setitimer")
    if many:  # one endless loop must not take the others' time
        signal.signal(signal.SIGPROF, out_of_time)
    sys.addaudithook(guard(os.path.realpath(os.getcwd())))
    name, filename, code, passed, lines = job["module"], f"<{job['module']}>", {}, {}, {}
    for key, (start, end, docstring) in job["holes"].items():
        ran = lines[key] = []

        def tracer(frame, event, _):
            if frame.f_code.co_filename != filename:
                return None
            ran.append(frame.f_lineno)
            return tracer

        passed[key] = False
        try:
            if many:
                signal.setitimer(signal.ITIMER_PROF, job["each"], job["each"])
            if (start, end) not in code:
                program = job["program"][:start] + job["program"][end:]
                code = {(start, end): compile(program, filename, "exec")}
            module = sys.modules[name] = types.ModuleType(name)
            module.__file__ = filename
            exec(code[start, end], module.__dict__)
            if docstring:
                text = job["docstrings"][docstring]
                test = doctest.DocTestParser().get_doctest(text, dict(module.__dict__), docstring, None, 0)
                sys.settrace(tracer if job["trace"] else None)
                passed[key] = doctest.DocTestRunner(verbose=False).run(test).failed == 0
            else:
                passed[key] = True
        except (Exception, SystemExit):
            traceback.print_exc()
        if many:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.settrace(None)
        ran[:] = sorted(set(ran))
    sys.stdout = sys.__stdout__
    print(job["token"] + json.dumps([passed, lines]), flush=True)


def out_of_time(*_):
    raise TimeoutError("its time on the CPU is over")


def limit(seconds, memory):
    """Sets the process's limits, as far as the system knows them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, bound in {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_AS": memory, "RLIMIT_FSIZE": OUTPUT,
                       "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}.items():
        try:
            resource.setrlimit(getattr(resource, name), (bound, bound))
        except (AttributeError, OSError, ValueError):
            pass


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
