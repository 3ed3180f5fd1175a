"""lab.serve under load for as long as one likes: what editors send, and what else may come, from 16 threads.

    python tests/lab/try_load.py out/fim_spm 600      seconds

Prints how each kind of request was answered, and the server's memory, threads and open files (Linux) before
and after. It fails if the server ends, prints anything but its first line, answers with a 5xx, keeps
connections, or stands still. pytest does not run it.
"""
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

HEAD = ("POST /{} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nUser-Agent: editor-{}\r\n"
        "Content-Length: {}\r\n\r\n")
BAD_BODIES = ("", "{", "[1]", '{"n_predict": "a"}', "\xff", "[" * 50_000, '{"prompt": "\\ud800"}')
# kind of request -> path, body, and after how many seconds the client hangs up (60: it waits for the answer)
KINDS = {
    "infill": lambda rng: ("infill", json.dumps({
        "input_prefix": "x = 1\n" * rng.randrange(400), "prompt": "def f" + "a" * rng.randrange(9),
        "input_suffix": "\n", "n_predict": 12, "n_cmpl": rng.choice([1, 1, 3])}), 60),
    "stream": lambda rng: ("v1/completions", '{"prompt": "import ", "stream": true, "max_tokens": 20}', 60),
    "left stream": lambda rng: ("v1/completions", '{"prompt": "a", "stream": true, "max_tokens": 60}', 0.05),
    "bad body": lambda rng: ("infill", rng.choice(BAD_BODIES), 60),
    "long prefix": lambda rng: ("infill", json.dumps({"input_prefix": "é" * 10**6, "n_predict": 2}), 60),
    "huge body": lambda rng: ("infill", "x" * 2 * 10**7, 60),
    "no request": lambda rng: (None, rng.choice(["GET /hea", "\x16\x03\x01", HEAD.format("infill", 0, 9)]),
                               rng.choice([0, 0, 3]))}


def ask(port, kind, rng):
    """-> the answer's status, or what became of the request."""
    path, body, seconds = KINDS[kind](rng)
    head = HEAD.format(path, rng.randrange(16), len(body.encode("latin-1"))) if path else ""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall((head + body).encode("latin-1"))
        if seconds < 60:
            time.sleep(seconds)
            return "not waited for"
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        return answer.split()[1].decode() if answer else "closed"


def send(port, rng, end, counts):
    while time.monotonic() < end:
        kind = rng.choice([*KINDS, "infill", "infill"])
        try:
            counts[kind, ask(port, kind, rng)] += 1
        except OSError as error:
            counts[kind, type(error).__name__] += 1


def resources(pid):
    """-> memory in MB, threads, open files"""
    fields = dict(re.findall(r"(VmRSS|Threads):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
    return int(fields["VmRSS"]) // 1024, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def main(run, seconds):
    counts = Counter()
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen([sys.executable, "-m", "lab.serve", "--ckpt", run, "--port", "0"],
                                  stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            port, = map(int, re.findall(r"http://[\d.]+:(\d+)", server.stdout.readline()))
            before, end = resources(server.pid), time.monotonic() + seconds
            threads = [threading.Thread(target=send, args=(port, random.Random(i), end, counts))
                       for i in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(15)  # slow clients are given up after ten seconds
            after, answer = resources(server.pid), ask(port, "infill", random.Random(0))
        finally:
            server.terminate()
            server.wait()
        errors.seek(0)
        printed = errors.read()
    for (kind, status), n in sorted(counts.items()):
        print(f"{kind:15} {status:15} {n:,}")
    print(f"before {before}, after {after}; then an infill: {answer}; stderr: {printed[-1000:]!r}")
    has_failed = any(status.startswith("5") or status == "TimeoutError" for _, status in counts)
    sys.exit(has_failed or answer != "200" or bool(printed) or after[2] > before[2] + 2)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], float(sys.argv[2]))
