"""A run in your editor: an HTTP server that fills holes, with the standard library's http.server alone.

    python -m lab.serve                       the newest run under out/, at http://127.0.0.1:8012
    curl 127.0.0.1:8012/infill -d '{"input_prefix": "def mean(xs):\\n    return ", "input_suffix": "\\n"}'

    GET  /                 a page on which to type a prefix and a suffix
    POST /infill           llama.cpp's protocol, which llama.vim and llama.vscode speak
    POST /v1/completions   OpenAI's: fills a hole if "suffix" is given, else continues the text; "stream", too
    GET  /health, /v1/models

    connection -> Handler (a thread each): reads and checks a request -> Job
               -> Server.complete (one thread, with the model and a PromptCache): one job at a time
               -> infills and timings -> Handler -> JSON

A newer job from the same client cancels all that differ from it: an editor asks anew at each key. Whatever
JSON is sent, the answer is a completion, or a status from 400 on and a sentence: {"error":{"message":...}}.
"""
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from data import newlines
from sample import (NOT_STOPPED, REPEATS, Infill, Parser, PromptCache, best_first, collect, generate,
                    infill_prompt, load_model, newest_run, one_line_errors, pick_device, where_suffix_repeats,
                    within)

LARGEST = 2**23  # bytes of a request's body
# A page that shows an infill at each key. (409: of a request that a newer one has overtaken.)
PAGE = b"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>nanogap</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
body { margin: 1rem auto; max-width: 50rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
textarea, output { display: block; box-sizing: border-box; width: 100%; min-height: 3em;
  font: 1rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
output { background: #fff3d6; color: #1b1b1b; font-weight: bold; }
</style>
<label>Before the hole <textarea id="prefix" rows="8">def mean(xs):\n    return </textarea></label>
<label>The model's infill <output id="infill"></output></label>
<label>After the hole <textarea id="suffix" rows="8"> / len(xs)\n</textarea></label>
<script>
const [prefix, suffix, infill] = ["prefix", "suffix", "infill"].map(id => document.getElementById(id));
(document.oninput = async () => {
  const body = JSON.stringify({input_prefix: prefix.value, input_suffix: suffix.value});
  const {content, error} = await (await fetch("/infill", {method: "POST", body})).json();
  if (error?.code !== 409) infill.textContent = error ? error.message : content;
})();
</script>
"""


class Refused(ValueError):
    """Its args: the status code of an answer, and the sentence."""


@dataclass
class Job:
    """A hole to fill or, with suffix None, a text to continue."""
    client: tuple        # address, User-Agent and OpenAI's "user"
    prefix: str
    suffix: str
    n: int               # completions
    max_new_tokens: int
    stop: list           # texts: a completion ends before the first of them
    sampling: dict       # generate's temperature, top_k, top_p and seed


class Server(ThreadingHTTPServer):
    """Serves a run's folder at host and port (0: any that is free), once serve_forever is called."""
    request_queue_size = 128  # connections not yet accepted; the default, 5, loses some of 50 at once

    def __init__(self, host, port, ckpt, device="auto"):
        self.host, self.name = host.lower(), Path(ckpt).resolve().name
        self.model, self.tok, _ = load_model(ckpt, pick_device(device))
        self.cache = PromptCache(self.model.config)
        self.newest = {}                      # client -> its newest job
        self.worker = ThreadPoolExecutor(1)   # takes the jobs in the order of their arrival
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: cannot listen there ({error})") from None

    def complete(self, job, is_gone, send=None):
        """A job, in the worker -> a list of Infill, the best first; the prompt's number of tokens; timings as
        llama.cpp names them. is_gone() tells whether the client has closed the connection; send is called
        with each new piece of a single completion's text. Raises Refused if cancelled."""
        def check_wanted():
            if self.newest.get(job.client, job) != job:
                raise Refused(409, "cancelled: a newer request came from the same client")
            if is_gone():
                raise Refused(400, "cancelled: the client has closed the connection")

        def cut(text):
            text = text[:min((i for i in map(text.find, job.stop) if i >= 0), default=None)]
            return text[:where_suffix_repeats(text, job.suffix or "")]

        check_wanted()
        prompt, eot = self.prompt(job), self.tok.eot
        cache = self.cache if job.n == 1 else None
        if cache:
            cache.cut_back_to(prompt)
        idx = torch.tensor([prompt], device=next(self.model.parameters()).device)  # (1, T)
        steps, ids, times, sent = [], [], [time.monotonic()], 0
        unsure = max(map(len, job.stop), default=1) - 1  # last characters, which may begin a stop text
        for step in generate(self.model, idx, job.max_new_tokens, stop=eot, n=job.n, allowed=eot + 1,
                             cache=cache, **job.sampling):
            steps.append(step)
            times.append(time.monotonic())
            check_wanted()
            if job.n == 1:
                ids += step[0].tolist()
                text = self.tok.decode(ids, "ignore")
                if cut(text) != text:
                    break
                if send and len(text) - unsure > sent:
                    send(text[sent:len(text) - unsure])
                    sent = len(text) - unsure
        infills = best_first(collect(steps, self.tok), self.tok)
        for sample in infills:
            whole, sample.text = sample.text, cut(sample.text)
            if sample.text != whole:
                sample.ended = REPEATS
        if send and len(infills[0].text) > sent:
            send(infills[0].text[sent:])
        n_computed = len(prompt) - (cache.reused if cache else 0)
        timings = {}
        for name, n, seconds in (("prompt", n_computed, times[1] - times[0]),
                                 ("predicted", len(steps), times[-1] - times[1])):
            timings |= {f"{name}_n": n, f"{name}_ms": 1000 * seconds,
                        f"{name}_per_second": n / max(seconds, 1e-9)}
        return infills, len(prompt), timings

    def prompt(self, job):
        """A job -> its prompt's ids, trimmed to leave room for max_new_tokens."""
        size = self.model.config.block_size
        most = size * max(map(len, self.tok.vocabulary))  # characters that may fit: why encode a million?
        if job.suffix is not None:
            return infill_prompt(self.model, self.tok, job.prefix[-most:], job.suffix[:most],
                                 job.max_new_tokens)
        ids = self.tok.encode(job.prefix[-most:]) or [self.tok.eot]  # <EOT>: a document begins
        return ids[-(size - job.max_new_tokens):]


class Handler(BaseHTTPRequestHandler):
    """A connection, and the requests that come over it one after the other."""
    protocol_version = "HTTP/1.1"   # connections stay open, and Expect: 100-continue is answered
    server_version = "nanogap"
    disable_nagle_algorithm = True  # else the body would wait until the client has confirmed the headers
    timeout = 10.0                  # seconds in which a client must go on to send, or accept a piece

    def do_GET(self):
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "nanogap"}
        self.respond({"/": lambda: self.answer(200, PAGE, "text/html"),
                      "/health": lambda: self.answer(200, {"status": "ok"}),
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
            content = error_content(error)
            self.answer(content["error"]["code"], content)
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(2**16):  # a client that still sends would be cut off before it reads this
                pass

    def check_caller(self):
        """Raises Refused if a web page other than ours sent the request. A browser names the page in Origin;
        and in Host the name that it looked up, which may be a page's own that leads to this machine (DNS
        rebinding; an address is no such name)."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        name, is_open = host.partition(":")[0].lower(), self.server.host == "0.0.0.0"
        is_ours = name in ("localhost", "127.0.0.1", self.server.host) or (
            is_open and re.fullmatch("[0-9.]+", name))
        if not is_ours and not is_open:
            raise Refused(403, f"Host {short(name)}: expected localhost, or what --host says")
        if origin and not (is_ours and origin == f"http://{host}"):
            raise Refused(403, f"Origin {short(origin)}: expected no other web page to ask")

    def infill(self):
        """llama.cpp's. Its input_extra, text of other files, is left out: a small context has no room."""
        body = self.read_json()
        prefix = get(body, "input_prefix", str, "") + get(body, "prompt", str, "")
        job = self.job(body, prefix, get(body, "input_suffix", str, ""), "n_cmpl", "n_predict", 64)
        if get(body, "stream", bool, False):
            raise ValueError("stream true: expected false, or /v1/completions, which can")
        wanted = get(body, "response_fields", list, None)
        infills, n_prompt, timings = self.run(job)
        shared = {"model": self.server.name, "stop": True, "timings": timings,
                  "tokens_cached": n_prompt + timings["predicted_n"],
                  "generation_settings": {"n_ctx": self.server.model.config.block_size}}
        answers = [{"content": sample.text, "index": i} | shared for i, sample in enumerate(infills)]
        if wanted is not None:  # llama.vim's, for example: content, timings/prompt_n
            flat = {f"timings/{name}": value for name, value in timings.items()}
            answers = [{name: value for name, value in (answer | flat).items() if name in wanted}
                       for answer in answers]
        self.answer(200, answers[0] if job.n == 1 else answers)

    def completions(self):
        """OpenAI's; streamed, it is server-sent events."""
        body = self.read_json()
        prefix, suffix = get(body, "prompt", str, ""), get(body, "suffix", str, None)
        if suffix is None:
            prefix, suffix = read_sentinels(prefix)
        job = self.job(body, prefix, suffix, "n", "max_tokens", 16)
        head = {"id": f"cmpl-{time.time_ns()}", "object": "text_completion",
                "created": int(time.time()), "model": self.server.name}

        def choice(text, ended=None, index=0):
            reason = ended and ("length" if ended == NOT_STOPPED else "stop")
            return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

        def send(content):
            self.wfile.write(b"data: %s\n\n" % compact(content))

        if not get(body, "stream", bool, False):
            infills, n_prompt, timings = self.run(job)
            choices = [choice(sample.text, sample.ended, i) for i, sample in enumerate(infills)]
            n_new = timings["predicted_n"]
            return self.answer(200, head | {"choices": choices, "usage": {
                "prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}})
        if job.n > 1:
            raise ValueError(f"n {job.n}: expected 1 with stream")
        self.send_head(200, {"Content-Type": "text/event-stream", "Connection": "close"})  # at the end
        try:
            infills, *_ = self.run(job, lambda piece: send(head | {"choices": [choice(piece)]}))
        except ValueError as error:
            return send(error_content(error))
        send(head | {"choices": [choice("", infills[0].ended)]})
        self.wfile.write(b"data: [DONE]\n\n")

    def job(self, body, prefix, suffix, n_name, max_name, max_default):
        """What both protocols share -> Job. Raises ValueError for bad values. A completion has at most a
        quarter of the context, so that the text has the rest."""
        client = (self.client_address[0], self.headers.get("User-Agent"), get(body, "user", str, ""))
        n, most = get(body, n_name, int, 1, 1, 16), self.server.model.config.block_size // 4
        max_new_tokens = get(body, max_name, int, max_default)  # negative: as many as there can be
        stop = body.get("stop")
        stop = [stop] if isinstance(stop, str) else get(body, "stop", list, [])
        if len(stop) > 64 or not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop {short(stop)}: expected up to 64 texts")
        sampling = {"temperature": get(body, "temperature", float, 0.0 if n == 1 else 0.8, 0, 100),
                    "top_k": max(0, get(body, "top_k", int, 0)),
                    "top_p": max(1e-6, get(body, "top_p", float, 1.0, 0, 1)),
                    "seed": get(body, "seed", int, 1, -1, 2**63 - 1)}
        return Job(client, prefix, suffix, n, most if max_new_tokens < 0 else min(max_new_tokens, most),
                   [newlines(text) for text in stop if text], sampling)

    def run(self, job, send=None):
        """A job -> what Server.complete returns, from the worker."""
        if job.max_new_tokens == 0:  # llama.vim, so that llama.cpp reads input_extra in advance
            return [Infill("", NOT_STOPPED, 0.0)] * job.n, 0, {"prompt_n": 0, "predicted_n": 0}
        newest = self.server.newest
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
            self.connection.settimeout(self.timeout)

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
            raise Refused(408, f"the body did not come within {self.timeout:g} s") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise ValueError(f"the body is {short(body)}: expected a JSON object")
        return body

    def answer(self, code, content, kind="application/json"):
        body = content if isinstance(content, bytes) else compact(content)
        self.send_head(code, {"Content-Type": kind, "Content-Length": len(body)}
                       | ({"Connection": "close"} if code >= 400 else {}))
        self.wfile.write(body)

    def send_head(self, code, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self):
        with suppress(OSError):  # the client has gone
            super().handle()

    def log_message(self, *_):
        """Prints nothing, in place of a line a request."""


def get(body, name, kind, default, low=None, high=None):
    """A field of the body; the default where it is missing or null. As elsewhere, 40.0 is a whole number, and
    a list of one text is this text. A text's line ends become \\n. Raises ValueError for a wrong one."""
    value = body.get(name)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) not in ((int, float) if kind is float else (kind,)):
        expected = {str: "a text", int: "a whole number", bool: "true or false", list: "a list"}
        raise ValueError(f"{name} {short(value)}: expected {expected.get(kind, 'a number')}")
    if low is not None and not low <= value <= high:  # NaN, too
        raise ValueError(f"{name} {short(value)}: expected {low} to {high}")
    return newlines(value) if kind is str else value


def read_sentinels(prompt):
    """"<PRE> prefix <SUF>suffix <MID>", as editors write it for Code Llama, or the same without its three
    spaces -> prefix, suffix. Any other prompt -> prompt, None."""
    for space in (" ", ""):
        pre, suf, mid = f"<PRE>{space}", f"{space}<SUF>", f"{space}<MID>"
        if prompt.startswith(pre) and prompt.endswith(mid):
            prefix, is_there, suffix = prompt[len(pre):-len(mid)].partition(suf)
            if is_there:
                return prefix, suffix
    return prompt, None


def compact(content):
    """JSON in one line without spaces: llama.vim looks for "content":" in it."""
    return json.dumps(content, separators=(",", ":")).encode()


def error_content(error):
    code, message = error.args if isinstance(error, Refused) else (400, str(error))
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
    parser.add_argument("--port", type=within(0, 65535), default=8012,
                        help="default: 8012, where llama.vim asks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    ckpt = args.ckpt or newest_run()
    with Server(args.host, args.port, ckpt, args.device) as server:
        print(f"{ckpt} at http://{args.host}:{server.server_port}: POST /infill or /v1/completions; "
              "Ctrl-C ends", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
