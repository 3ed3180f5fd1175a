"""lab.serve under load for as long as one likes: what editors send, and what else may come, from 16 threads.

    python tests/lab/try_load.py out/fim_spm 600      seconds

Once a minute it prints the server's memory, threads and open files (Linux), at the end how each kind of
request was answered. It fails if the server ends, prints a traceback, answers with a 5xx, keeps connections,
or stands still. pytest does not run it.
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

THREADS = 16
SLOW_HEADER = b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
HUGE_HEADER = b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
BAD_BODIES = (b"", b"{", b"[1]", b'{"n_predict": "a"}', b"\xff\xfe", b"[" * 50_000, b'{"prompt": "\\ud800"}')


def post(path, body, client=0):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: editor-{client}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def status(connection):
    """The status of an answer, or "closed"."""
    received = b""
    while b"\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            return "closed"
        received += part
    return received.split()[1].decode()


# What may come: functions (connection, rng) -> the answer's status, or None where nobody waits for one.


def infill(connection, rng):
    connection.sendall(post("/infill", {
        "input_prefix": "x = 1\n" * rng.randrange(400), "prompt": "def f" + "a" * rng.randrange(9),
        "input_suffix": "\n", "n_predict": 12, "n_cmpl": rng.choice([1, 1, 3])}, rng.randrange(THREADS)))
    return status(connection)


def stream(connection, rng):
    connection.sendall(post("/v1/completions", {"prompt": "import ", "stream": True, "max_tokens": 20}))
    answer = status(connection)
    while rng.random() < 0.9 and connection.recv(65536):  # some leave in the middle
        pass
    return answer


def bad_body(connection, rng):
    connection.sendall(post("/infill", rng.choice(BAD_BODIES)))
    return status(connection)


def huge_body(connection, rng):
    connection.sendall(HUGE_HEADER)
    answer = status(connection)
    try:
        for _ in range(20):
            connection.sendall(bytes(10**6))
    except OSError:
        pass  # the server hung up, as it should
    return answer


def long_prefix(connection, rng):
    connection.sendall(post("/infill", {"input_prefix": "é" * 10**6, "n_predict": 2}))
    return status(connection)


def half_a_request(connection, rng):
    connection.sendall(rng.choice([b"GET /hea", b"\x16\x03\x01", SLOW_HEADER]))
    time.sleep(3 * (rng.random() < 0.3))


def gone(connection, rng):
    connection.sendall(post("/infill", {"input_prefix": "class A:\n", "n_predict": 60}))
    time.sleep(0.02)


KINDS = (infill, infill, infill, stream, bad_body, huge_body, long_prefix, half_a_request, gone)


def send(port, rng, end, counts):
    while time.monotonic() < end:
        kind = rng.choice(KINDS)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                answer = kind(connection, rng)
        except OSError as error:
            answer = type(error).__name__
        counts[kind.__name__, answer or "not waited for"] += 1


def resources(pid):
    """-> memory in MB, threads, open files"""
    fields = dict(re.findall(r"(VmRSS|Threads):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
    return int(fields["VmRSS"]) // 1024, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def main(run, seconds):
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen([sys.executable, "-m", "lab.serve", "--ckpt", run, "--port", "0"],
                                  stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            port, = map(int, re.findall(r"http://[\d.]+:(\d+)", server.stdout.readline()))
            counts, before = Counter(), resources(server.pid)
            end = time.monotonic() + seconds
            threads = [threading.Thread(target=send, args=(port, random.Random(i), end, counts))
                       for i in range(THREADS)]
            for thread in threads:
                thread.start()
            while time.monotonic() < end:
                time.sleep(min(60, seconds))
                print(f"{counts.total():,} requests; MB, threads, files: {resources(server.pid)}", flush=True)
            for thread in threads:
                thread.join()
            time.sleep(15)  # slow clients are given up after ten seconds
            after = resources(server.pid)
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                answer = infill(connection, random.Random(0))
        finally:
            server.terminate()
            server.wait()
        errors.seek(0)
        printed = errors.read()
    for (kind, answer), n in sorted(counts.items()):
        print(f"{kind:15} {answer:15} {n:,}")
    print(f"before {before}, after {after}; then an infill: {answer}; stderr: {printed[-1000:]!r}")
    has_failed = any(answer.startswith("5") or answer == "TimeoutError" for _, answer in counts)
    sys.exit(has_failed or answer != "200" or "Traceback" in printed or after[2] > before[2] + 2)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], float(sys.argv[2]))
