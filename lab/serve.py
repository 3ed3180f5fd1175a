"""A run in your editor: an HTTP server that fills holes, with the standard library's http.server alone.

    python -m lab.serve                       the newest run under out/, at http://127.0.0.1:8012
    curl 127.0.0.1:8012/infill -d '{"input_prefix": "def mean(xs):\\n    return ", "input_suffix": "\\n"}'

    POST /infill           llama.cpp's protocol, which llama.vim and llama.vscode speak
    POST /v1/completions   OpenAI's: fills a hole if "suffix" is given, else continues the text; "stream", too
    GET  /health           {"status":"ok"}
    GET  /v1/models        the run's name

    connection -> Handler (a thread each): reads and checks a request -> Job
               -> Server.complete (one thread, with the model and a PromptCache): one job at a time
               -> Result -> Handler -> JSON

A newer job from the same client cancels the older one: an editor asks anew at each key. Whatever is sent, the
answer is a completion, or a status from 400 on with one sentence: {"error":{"message":...}}.
"""
import io
import itertools
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from cli import Parser, checkpoint_fits, newest_run, one_line_errors, pick_device
from objectives import check_range
from sample import (CUT, NOT_STOPPED, Infill, PromptCache, best_first, collect, generate, infill_prompt,
                    load_model, trained_orders, where_suffix_repeats)

WAIT = 10.0      # seconds in which a client must send its request, or accept a piece of the answer
LARGEST = 2**23  # bytes of a request's body


class Refused(ValueError):
    """A request whose answer is this status code and sentence."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


@dataclass
class Job:
    """A hole to fill or, with suffix None, a text to continue."""
    client: tuple               # address, User-Agent and OpenAI's "user"
    prefix: str
    suffix: str
    n: int                      # completions
    max_new_tokens: int
    stop: list                  # texts: a completion ends before the first of them
    sampling: dict              # generate's temperature, top_k, top_p and seed
    is_cancelled: bool = False  # by a newer job of the same client


@dataclass
class Result:
    infills: list          # sample.Infill, the best first
    n_prompt: int = 0      # tokens of the prompt,
    n_reused: int = 0      # and how many of them the PromptCache held already
    n_new: int = 0         # tokens of the longest completion
    prompt_s: float = 0.0  # seconds up to the first new token
    new_s: float = 0.0     # seconds for the others


class Server(ThreadingHTTPServer):
    """Serves a run's folder at host and port (0: any that is free), once serve_forever is called."""
    request_queue_size = 128  # connections not yet accepted; the default, 5, loses some of 50 at once

    def __init__(self, host, port, ckpt, device="auto"):
        self.host, self.name = host, Path(ckpt).resolve().name
        self.model, self.tok, checkpoint = load_model(ckpt, pick_device(device))
        with checkpoint_fits(ckpt):
            self.knobs = checkpoint["config"]["knobs"]
            self.orders = trained_orders(self.knobs)
        self.most_characters = self.model.config.block_size * max(map(len, self.tok.vocabulary))
        self.cache = PromptCache(self.model.config)
        self.newest = {}                      # client -> its newest job
        self.worker = ThreadPoolExecutor(1)   # takes the jobs in the order of their arrival
        self.numbers = itertools.count(1)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: cannot listen there ({error})") from None

    def complete(self, job, is_gone, send=None):
        """A job -> Result, in the worker. is_gone() tells whether the client has closed the connection; send
        is called with each new piece of a single completion's text. Raises Refused if cancelled."""
        def check_wanted():
            if job.is_cancelled or is_gone():
                raise Refused(409, "cancelled: a newer request came from the same client")

        check_wanted()
        prompt = self.prompt(job)
        cache = self.cache if job.n == 1 else None
        if cache:
            cache.cut_back_to(prompt)
        idx = torch.tensor([prompt], device=next(self.model.parameters()).device)  # (1, T)
        eot, steps, ids, times, sent = self.tok.eot, [], [], [time.monotonic()], 0
        unsure = max(map(len, job.stop), default=1) - 1  # last characters, which may begin a stop text
        for step in generate(self.model, idx, job.max_new_tokens, stop=eot, n=job.n, allowed=eot + 1,
                             cache=cache, **job.sampling):
            steps.append(step)
            times.append(time.monotonic())
            check_wanted()
            if job.n == 1:
                ids += step[0].tolist()
                text = whole_characters(self.tok.decode(ids))
                if before_stop(text, job.stop) != text:
                    break
                if where_suffix_repeats(text, job.suffix or "") is not None:
                    break  # what follows would be cut
                if send and len(text) - unsure > sent:
                    send(text[sent:len(text) - unsure])
                    sent = len(text) - unsure
        infills = best_first(collect(steps, self.tok), self.tok)
        for sample in infills:
            text = whole_characters(sample.text)
            sample.text = before_stop(text, job.stop)
            if sample.ended == NOT_STOPPED:
                sample.text = sample.text[:where_suffix_repeats(sample.text, job.suffix or "")]
                sample.ended = NOT_STOPPED if sample.text == text else CUT
        if send and len(infills[0].text) > sent:
            send(infills[0].text[sent:])
        return Result(infills, len(prompt), cache.reused if cache else 0, len(steps),
                      times[1] - times[0], times[-1] - times[1])

    def prompt(self, job):
        """A job -> its prompt's ids, trimmed to leave room for max_new_tokens."""
        prefix = job.prefix[-self.most_characters:]  # more cannot fit: no need to encode a million
        if job.suffix is None:
            ids = self.tok.encode(prefix) or [self.tok.eot]  # a document follows the <EOT> of another
            return ids[-(self.model.config.block_size - job.max_new_tokens):]
        return infill_prompt(self.model, self.tok, prefix, job.suffix[:self.most_characters],
                             job.max_new_tokens, self.orders[-1], self.knobs["spm_layout"])


def before_stop(text, stop):
    """The text before the first stop text in it."""
    return text[:min((i for i in map(text.find, stop) if i >= 0), default=None)]


def whole_characters(text):
    """A decoded text without its last character if a token that is not there yet holds the rest of it."""
    return text.rstrip("\ufffd")


class Handler(BaseHTTPRequestHandler):
    """A connection, and the requests that come over it one after the other."""
    protocol_version = "HTTP/1.1"   # connections stay open, and Expect: 100-continue is answered
    server_version = "nanogap"
    disable_nagle_algorithm = True  # else the body would wait until the client has confirmed the headers

    def do_GET(self):
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "nanogap"}
        self.respond({"/health": lambda: self.answer(200, {"status": "ok"}),
                      "/v1/models": lambda: self.answer(200, {"object": "list", "data": [model]})})

    def do_POST(self):
        self.respond({"/infill": self.infill, "/v1/completions": self.completions})

    def respond(self, routes):
        path = self.path.partition("?")[0]
        try:
            self.check_caller()
            if path not in routes:
                raise Refused(404, f"{self.command} {short(path)}: expected {' or '.join(routes)}")
            routes[path]()
        except ValueError as error:
            self.refuse(getattr(error, "code", 400), str(error))

    def check_caller(self):
        """Raises Refused if a web page sent the request. A browser names the page in Origin; and in Host the
        name that it looked up, which may be a page's own that leads to this machine (DNS rebinding)."""
        name, ours = self.headers.get("Host", "").partition(":")[0].lower(), self.server.host.lower()
        if name not in ("localhost", "127.0.0.1", ours) and ours != "0.0.0.0":
            raise Refused(403, f"Host {short(name)}: expected localhost, or what --host says")
        if "Origin" in self.headers:
            raise Refused(403, f"Origin {short(self.headers['Origin'])}: expected no web page to ask")

    def infill(self):
        """llama.cpp's. Its input_extra, text of other files, is left out: a small context has no room."""
        body = self.read_json()
        prefix = get(body, "input_prefix", str, "") + get(body, "prompt", str, "")
        job = self.job(body, prefix, get(body, "input_suffix", str, ""), "n_cmpl", "n_predict", 64)
        if get(body, "stream", bool, False):
            raise ValueError("stream true: expected false, or /v1/completions, which can")
        wanted = get(body, "response_fields", list, None)
        result = self.run(job)
        n_computed = result.n_prompt - result.n_reused
        timings = {"prompt_n": n_computed, "prompt_ms": 1000 * result.prompt_s,
                   "prompt_per_second": n_computed / max(result.prompt_s, 1e-9),
                   "predicted_n": result.n_new, "predicted_ms": 1000 * result.new_s,
                   "predicted_per_second": result.n_new / max(result.new_s, 1e-9)}
        shared = {"model": self.server.name, "stop": True, "timings": timings,
                  "tokens_cached": result.n_prompt + result.n_new,
                  "generation_settings": {"n_ctx": self.server.model.config.block_size}}
        answers = [{"content": sample.text, "index": i} | shared for i, sample in enumerate(result.infills)]
        if wanted is not None:  # llama.vim's, for example: content, timings/prompt_n
            shared = {f"timings/{name}": value for name, value in timings.items()}
            answers = [{name: value for name, value in (answer | shared).items() if name in wanted}
                       for answer in answers]
        self.answer(200, answers[0] if job.n == 1 else answers)

    def completions(self):
        """OpenAI's; streamed, it is server-sent events."""
        body = self.read_json()
        prefix, suffix = get(body, "prompt", str, ""), get(body, "suffix", str, None)
        if suffix is None:
            prefix, suffix = read_sentinels(prefix)
        job = self.job(body, prefix, suffix, "n", "max_tokens", 16)
        head = {"id": f"cmpl-{next(self.server.numbers)}", "object": "text_completion",
                "created": int(time.time()), "model": self.server.name}

        def choice(text, ended=None, index=0):
            reason = ended and ("length" if ended == NOT_STOPPED else "stop")
            return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

        def send(content):
            self.wfile.write(b"data: %s\n\n" % compact(content))

        if not get(body, "stream", bool, False):
            result = self.run(job)
            choices = [choice(sample.text, sample.ended, i) for i, sample in enumerate(result.infills)]
            usage = {"prompt_tokens": result.n_prompt, "completion_tokens": result.n_new,
                     "total_tokens": result.n_prompt + result.n_new}
            return self.answer(200, head | {"choices": choices, "usage": usage})
        if job.n > 1:
            raise ValueError(f"n {job.n}: expected 1 with stream")
        self.close_connection = True  # which tells where the stream ends
        self.send_head(200, {"Content-Type": "text/event-stream"})
        try:
            result = self.run(job, lambda piece: send(head | {"choices": [choice(piece)]}))
        except Refused as error:
            return send(error_content(error.code, str(error)))
        send(head | {"choices": [choice("", result.infills[0].ended)]})
        self.wfile.write(b"data: [DONE]\n\n")

    def job(self, body, prefix, suffix, n_name, max_name, max_default):
        """What both protocols share -> Job. Raises ValueError for bad values. A completion has at most a
        quarter of the context, so that the text has the rest."""
        if suffix is not None and not self.server.orders:
            raise ValueError(f"the objective of {self.server.name} never saw a gap: expected fim_psm, "
                             "fim_spm, fim or fim_meap, or /v1/completions without suffix")
        client = (self.client_address[0], self.headers.get("User-Agent"), get(body, "user", str, ""))
        n, most = get(body, n_name, int, 1, 1, 16), self.server.model.config.block_size // 4
        max_new_tokens = get(body, max_name, int, max_default, -1, 10**9)
        max_new_tokens = most if max_new_tokens < 0 else min(max_new_tokens, most)
        stop = body.get("stop")
        stop = [stop] if isinstance(stop, str) else get(body, "stop", list, [])
        if len(stop) > 64 or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop {short(stop)}: expected up to 64 texts")
        sampling = {"temperature": get(body, "temperature", (int, float), 0.0 if n == 1 else 0.8, 0, 100),
                    "top_k": get(body, "top_k", int, 0, 0, 10**9),
                    "top_p": get(body, "top_p", (int, float), 1.0, 1e-6, 1),
                    "seed": get(body, "seed", int, 1, -1, 2**63 - 1)}
        return Job(client, prefix, suffix, n, max_new_tokens, stop, sampling)

    def run(self, job, send=None):
        """A job -> its Result, from the worker."""
        if job.max_new_tokens == 0:  # llama.vim, so that llama.cpp reads input_extra in advance
            return Result([Infill("", NOT_STOPPED, 0.0)] * job.n)
        newest = self.server.newest
        if job.client in newest:
            newest[job.client].is_cancelled = True
        newest[job.client] = job
        try:
            return self.server.worker.submit(self.server.complete, job, self.is_gone, send).result()
        finally:
            if newest.get(job.client) is job:
                del newest[job.client]

    def is_gone(self):
        """True if the client has closed the connection, which then reads as ended."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:  # open, and nothing sent
            return False
        finally:
            self.connection.settimeout(WAIT)

    def read_json(self):
        """The body, a JSON object, as a dict. Raises Refused or ValueError."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(411, f"Content-Length {short(length)}: expected the number of the body's bytes")
        if int(length) > LARGEST:
            raise Refused(413, f"a body of {length} bytes: expected at most {LARGEST}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except TimeoutError:
            raise Refused(408, f"the body did not come within {WAIT:g} s") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise ValueError(f"the body is {short(body)}: expected a JSON object")
        return body

    def answer(self, code, content):
        body = compact(content)
        self.send_head(code, {"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def send_head(self, code, headers):
        self.connection.settimeout(WAIT)
        self.send_response(code)
        for name, value in (headers | {"Connection": "close"} if self.close_connection else headers).items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, code, message):
        """Answers with an error and closes the connection."""
        self.close_connection = True
        self.answer(code, error_content(code, message))
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read(2**16):  # a client that still sends would be cut off before it reads the answer
            pass

    def send_error(self, code, message=None, explain=None):
        """Called by http.server, for what is not HTTP and for other methods than GET and POST."""
        code = {501: 405, 505: 400}.get(code, code)
        self.refuse(code, message or self.responses[code][0])

    def setup(self):
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(Incoming(self))

    def handle_one_request(self):
        self.deadline = time.monotonic() + WAIT
        try:
            super().handle_one_request()
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_):
        """Prints nothing, in place of a line a request."""


class Incoming(io.RawIOBase):
    """The bytes that a client sends. Raises TimeoutError after the handler's deadline, however slowly the
    bytes come: http.server's own timeout begins anew with every byte."""

    def __init__(self, handler):
        self.handler = handler

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.handler.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.handler.connection.settimeout(left)
        return self.handler.connection.recv_into(buffer)


def get(body, name, kind, default, low=None, high=None):
    """A field of the body; the default where it is missing or null. Raises ValueError for a wrong one."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        expected = {str: "a text", int: "a whole number", bool: "true or false", list: "a list"}
        raise ValueError(f"{name} {short(value)}: expected {expected.get(kind, 'a number')}")
    if low is not None:
        check_range(name, value, low, high)
    return value


def read_sentinels(prompt):
    """"<PRE> prefix <SUF>suffix <MID>", as editors write it for Code Llama, or the same without its three
    spaces -> prefix, suffix. Any other prompt -> prompt, None."""
    for pre, suf, mid in (("<PRE> ", " <SUF>", " <MID>"), ("<PRE>", "<SUF>", "<MID>")):
        if prompt.startswith(pre) and prompt.endswith(mid):
            prefix, is_there, suffix = prompt[len(pre):-len(mid)].partition(suf)
            if is_there:
                return prefix, suffix
    return prompt, None


def compact(content):
    """JSON in one line without spaces: llama.vim looks for "content":" in it."""
    return json.dumps(content, separators=(",", ":")).encode()


def error_content(code, message):
    return {"error": {"code": code, "message": message, "type": "invalid_request_error"}}


def short(value):
    """A value as a sentence can show it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: on every network")
    parser.add_argument("--port", type=int, default=8012, help="default 8012, where llama.vim asks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    check_range("--port", args.port, 0, 65535)
    ckpt = args.ckpt or newest_run()
    with Server(args.host, args.port, ckpt, args.device) as server:
        print(f"{ckpt} at http://{args.host}:{server.server_port}: POST /infill or /v1/completions; "
              "Ctrl-C ends", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
