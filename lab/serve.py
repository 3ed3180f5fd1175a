"""A run in your editor: an HTTP server that fills holes, with the standard library's http.server alone.

    python -m lab.serve                       the newest run under out/, at http://127.0.0.1:8012
    curl 127.0.0.1:8012/infill -d '{"input_prefix": "def mean(xs):\\n    return ", "input_suffix": "\\n"}'

    GET  /                 a page on which to type a prefix and a suffix
    POST /infill           llama.cpp's protocol, which llama.vim and llama.vscode speak
    POST /v1/completions   OpenAI's: fills a hole if "suffix" is given, else continues the text; "stream", too
    GET  /health, /v1/models

Each request has a thread, which makes a job of it; one more thread does one job at a time. A newer job
cancels older ones of the same client, except its equals: an editor asks anew at each key. What is refused is
answered with a status from 400 on and {"error":{"message": a sentence}}.
"""
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch

from data import newlines
from sample import (NOT_STOPPED, Parser, PromptCache, best_first, collect, generate, infill_prompt,
                    load_model, newest_run, one_line_errors, pick_device, where_suffix_repeats, within)

LARGEST = 2**23  # bytes of a request's body
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "texts"}
compact = partial(json.dumps, separators=(",", ":"))  # llama.vim looks for "content":" in an answer
PAGE = Path(__file__).parent / "pages" / "serve.html"


class Server(ThreadingHTTPServer):
    """Serves a run's folder at host and port (0: any that is free), once serve_forever is called."""
    request_queue_size = 128  # connections not yet accepted; the default, 5, loses some of 50 at once

    def __init__(self, host, port, ckpt, device="auto"):
        self.host, self.name = host.lower(), Path(ckpt).resolve().name
        self.model, self.tok, _ = load_model(ckpt, pick_device(device))
        self.cache = PromptCache(self.model.config)
        self.newest = {}  # client (address, User-Agent, OpenAI's "user") -> its newest job
        self.worker = ThreadPoolExecutor(1)  # takes the jobs in the order of their arrival
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: cannot listen there ({error})") from None

    def complete(self, job, send):
        """What Handler.job returns -> [(text, OpenAI's finish_reason)], the best first; timings as llama.cpp
        names them. send: called with each piece of text; expects n = 1. Raises ValueError if cancelled."""
        def check_newest():
            if self.newest.get(job.client, job) != job:
                raise ValueError("cancelled: a newer request came from the same client", 409)

        def cut(sample):
            text = sample.text[:min((i for i in map(sample.text.find, job.stop) if i >= 0), default=None)]
            text = text[:where_suffix_repeats(text, job.suffix)]
            is_whole = text == sample.text and sample.ended == NOT_STOPPED
            return text, "length" if is_whole else "stop"

        check_newest()
        is_one = job.settings["n"] == 1
        cache = self.cache if is_one else PromptCache(self.model.config)
        cache.cut_back_to(job.prompt)
        idx = torch.tensor([job.prompt], device=next(self.model.parameters()).device)  # (1, T)
        steps, times, n_sent = [], [time.monotonic()], 0
        n_unsure = max(map(len, job.stop), default=1) - 1  # last characters, which may begin a stop text
        for step in generate(self.model, idx, stop=self.tok.eot, allowed=self.tok.eot + 1, cache=cache,
                             **job.settings):
            steps.append(step)
            times.append(time.monotonic())
            check_newest()
            answers = list(map(cut, best_first(collect(steps, self.tok), self.tok)))
            text, reason = answers[0]
            if is_one and reason == "stop":
                break
            n_before, n_sent = n_sent, max(n_sent, len(text) - n_unsure)
            send(text[n_before:n_sent])
        send(text[n_sent:])
        n_prompt, prompt_s = len(job.prompt) - cache.reused, times[1] - times[0]
        n_new, new_s = len(steps), max(times[-1] - times[1], 1e-9)
        return answers, {
            "prompt_n": n_prompt, "prompt_ms": 1000 * prompt_s, "prompt_per_second": n_prompt / prompt_s,
            "predicted_n": n_new, "predicted_ms": 1000 * new_s, "predicted_per_second": n_new / new_s}


class Handler(BaseHTTPRequestHandler):
    """A connection, with one request."""
    protocol_version = "HTTP/1.1"   # Expect: 100-continue is answered
    disable_nagle_algorithm = True  # else a piece would wait until the client has confirmed the one before
    timeout = 10.0                  # seconds in which a client must go on to send, or accept a piece

    def do_GET(self):
        routes = {"GET /": lambda: self.answer(PAGE.read_bytes(), content_type="text/html"),
                  "GET /health": lambda: self.answer({"status": "ok"}),
                  "GET /v1/models": lambda: self.answer({
                      "object": "list", "data": [{"id": self.server.name, "object": "model"}]}),
                  "POST /infill": self.infill, "POST /v1/completions": self.completions}
        route = f"{self.command} {self.path.partition('?')[0]}"
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        try:
            # A browser names in Origin the page that sends a POST, in Host the name that it looked up:
            # perhaps a foreign page's own, for this machine (DNS rebinding). An address is no such name.
            is_ours = re.fullmatch(rf"(localhost|{re.escape(self.server.host)}|[0-9.]+)(:\d+)?", host)
            if origin and not (is_ours and origin == f"http://{host}"):
                raise ValueError(f"Origin {compact(origin):.60}: expected no other web page to ask", 403)
            if route not in routes:
                raise ValueError(f"{compact(route):.60}: expected {' or '.join(routes)}", 404)
            routes[route]()
        except ValueError as error:
            content = error_content(*error.args)
            self.answer(content, content["error"]["code"])
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(2**16):  # a client that still sends would be cut off before it reads this
                pass

    do_POST = do_GET

    def infill(self):
        """llama.cpp's. Its input_extra, text of other files, is left out: a small context has no room."""
        body = self.read_json()
        prefix = get(body, "input_prefix", str, "") + get(body, "prompt", str, "")
        job = self.job(body, prefix, get(body, "input_suffix", str, ""), "n_cmpl", "n_predict", 64)
        answers, timings = self.run(job)
        shared = {"timings": timings, "tokens_cached": len(job.prompt) + timings["predicted_n"],
                  "generation_settings": {"n_ctx": self.server.model.config.block_size},
                  **{f"timings/{name}": value for name, value in timings.items()}}  # so llama.vim reads them
        contents = [{"content": text, "index": i} | shared for i, (text, _) in enumerate(answers)]
        self.answer(contents[0] if len(contents) == 1 else contents)

    def completions(self):
        """OpenAI's; streamed, it is server-sent events."""
        body = self.read_json()
        prefix, suffix = get(body, "prompt", str, ""), get(body, "suffix", str)
        match = re.fullmatch("(?s)<PRE>( ?)(.*)\\1<MID>", prefix)
        if suffix is None and match:  # "<PRE> prefix <SUF>suffix <MID>", as for Code Llama, or without spaces
            prefix, _, suffix = match[2].partition(f"{match[1]}<SUF>")
        job = self.job(body, prefix, suffix, "n", "max_tokens", 16)
        head = {"id": f"cmpl-{time.time_ns()}", "object": "text_completion",
                "created": int(time.time()), "model": self.server.name}

        def completion(*answers):
            return head | {"choices": [{"text": text, "index": i, "logprobs": None, "finish_reason": reason}
                                       for i, (text, reason) in enumerate(answers)]}

        def send(content):
            self.wfile.write(f"data: {compact(content)}\n\n".encode())

        if not job.stream:
            answers, timings = self.run(job)
            n_prompt, n_new = len(job.prompt), timings["predicted_n"]
            return self.answer(completion(*answers) | {"usage": {
                "prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}})
        self.answer(b"", content_type="text/event-stream")
        try:
            [(_, reason)], _ = self.run(job, lambda text: text and send(completion((text, None))))
            send(completion(("", reason)))
            self.wfile.write(b"data: [DONE]\n\n")
        except ValueError as error:
            send(error_content(*error.args))

    def job(self, body, prefix, suffix, n_name, max_name, max_default):
        """What both protocols share -> a job. suffix None: the prefix is continued. Raises ValueError."""
        model, tok, size = self.server.model, self.server.tok, self.server.model.config.block_size
        n, most = get(body, n_name, int, 1, 1, 16), get(body, max_name, int, max_default)
        most = size // 4 if most < 0 else min(most, size // 4)  # the text has the rest of the context
        settings = {"n": n, "max_new_tokens": most, "seed": get(body, "seed", int, 1, -1, 2**63 - 1),
                    "temperature": get(body, "temperature", float, 0.0 if n == 1 else 0.8, 0, 100),
                    "top_k": max(0, get(body, "top_k", int, 0)),
                    "top_p": max(1e-6, get(body, "top_p", float, 1.0, 0, 1))}
        stream = get(body, "stream", bool)
        if stream and (n > 1 or n_name == "n_cmpl"):
            raise ValueError("stream true: expected false, but for one completion of /v1/completions")
        longest = size * max(map(len, tok.vocabulary))  # characters that may fit: why encode a million?
        prefix, suffix = prefix[-longest:], suffix and suffix[:longest]
        if suffix is None:  # <EOT>: a document begins
            prompt = (tok.encode(prefix) or [tok.eot])[most - size:]
        else:
            prompt = infill_prompt(model, tok, prefix, suffix, most)
        stop = [newlines(text) for text in get(body, "stop", list, [])[:64] if text]
        client = self.client_address[0], self.headers.get("User-Agent"), get(body, "user", str)
        return SimpleNamespace(client=client, prompt=prompt, suffix=suffix or "", stop=stop, stream=stream,
                               settings=settings)

    def run(self, job, send=lambda text: None):
        """A job -> what Server.complete returns, from the worker."""
        if job.settings["max_new_tokens"] == 0:  # llama.vim, so that llama.cpp reads input_extra in advance
            return [("", "length")] * job.settings["n"], {"prompt_n": 0, "predicted_n": 0}
        if len(self.server.newest) > 999:  # clients that will not come again
            self.server.newest.clear()
        self.server.newest[job.client] = job
        return self.server.worker.submit(self.server.complete, job, send).result()

    def read_json(self):
        """The body, a JSON object, as a dict. Raises ValueError."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length) or int(length) > LARGEST:
            raise ValueError(f"Content-Length {compact(length):.60}: expected 0 to {LARGEST} bytes", 413)
        try:
            return dict(json.loads(self.rfile.read(int(length))))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"the body is no JSON object ({error})") from None

    def answer(self, content, code=200, content_type="application/json"):
        """content: bytes, or what becomes JSON. The connection ends with the answer."""
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else compact(content).encode())

    def handle(self):
        with suppress(OSError):  # the client has gone
            super().handle()

    def log_message(self, *_):
        """Prints nothing, in place of a line a request."""


def get(body, name, kind, default=None, low=None, high=None):
    """A field of the body, or the default. As elsewhere, null is none, 40.0 is a whole number, and a text may
    stand for a list of one, or the reverse. A text's line ends become \\n. Raises ValueError."""
    value = body.get(name)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if kind is list and isinstance(value, str):
        value = [value]
    is_right = type(value) in ((int, float) if kind is float else (kind,))
    if not is_right or kind is list and not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} {compact(value):.60}: expected {KINDS[kind]}")
    if low is not None and not low <= value <= high:  # NaN, too
        raise ValueError(f"{name} {compact(value):.60}: expected {low} to {high}")
    return newlines(value) if kind is str else value


def error_content(message, code=400):
    """What a ValueError holds, a sentence and perhaps a status code -> an answer's content."""
    return {"error": {"code": code, "message": message, "type": "invalid_request_error"}}


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: on every network")
    parser.add_argument("--port", type=within(0, 65535), default=8012, help="default: 8012, as in llama.vim")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    with Server(args.host, args.port, args.ckpt or newest_run(), args.device) as server:
        print(f"{server.name} at http://{args.host}:{server.server_port} (Ctrl-C ends)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
