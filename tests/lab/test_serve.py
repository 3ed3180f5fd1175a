"""The server, over real connections: what the editors' plugins send and need, and what else may come."""
import http.client
import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import save_run, small_model
from lab import serve
from sample import collect, generate, infill

PREFIX, TYPED, SUFFIX = "def mean(xs):\n    total = sum(xs)\n", "    return", "\n\nprint(mean([1, 2]))\n"
T = 128  # the model's context


@contextmanager
def running(folder):
    """The server of a run, at a free port, in a thread."""
    with serve.Server("127.0.0.1", 0, folder, "cpu") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tok):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", small_model(tok.n_vocab, T), tok, "fim_spm")


@pytest.fixture(scope="module")
def server(run_folder):
    with running(run_folder) as server:
        yield server


@pytest.fixture(autouse=True)
def no_traceback(capfd):
    """Whatever a test sends, the server prints nothing."""
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def slow(server):
    """Each token takes 30 ms -> a list with an entry for each."""
    tokens = []
    hook = server.model.register_forward_hook(lambda *_: time.sleep(0.03) or tokens.append(1))
    yield tokens
    hook.remove()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ask(server, path, body=None, headers=()):
    """One request over a connection of its own -> status, content, http.client's response, raw body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        body = body.encode() if isinstance(body, str) else body
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
        response = connection.getresponse()
        raw = response.read()
        content = json.loads(raw) if response.headers["Content-Type"] == "application/json" else None
        return SimpleNamespace(status=response.status, content=content, response=response, raw=raw)
    finally:
        connection.close()


def send_raw(server, data):
    """The bytes that come back, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def expected_infill(server, prefix, suffix, **settings):
    """What sample.py gives; the server leaves out a last character of which only the first bytes came."""
    settings = {"max_new_tokens": T // 4, "order": "spm", "spm_layout": "swapped"} | settings
    infills = infill(server.model, server.tok, prefix, suffix, **settings)
    return [replace(sample, text=sample.text.rstrip("\ufffd")) for sample in infills]


def hole(**fields):
    """What llama.vim sends at the end of TYPED: the lines before, the line so far, and what follows."""
    return {"input_prefix": PREFIX, "prompt": TYPED, "input_suffix": SUFFIX} | fields


def test_a_worked_example(server):
    """Byte for byte: what llama.vim's curl gets. It drops an answer with a space behind the colon."""
    body = json.dumps({"input_prefix": PREFIX, "input_suffix": SUFFIX, "prompt": TYPED, "n_predict": 8,
                       "response_fields": ["content"]})
    request = f"POST /infill HTTP/1.1\r\nHost: 127.0.0.1:8012\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX, max_new_tokens=8)
    answer = b'{"content":%s}' % json.dumps(best.text).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        for _ in range(2):  # the connection stays open
            connection.sendall(request.encode())
            head, got = connection.recv(2**16), b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(2**16)
            head, _, got = head.partition(b"\r\n\r\n")
            while len(got) < len(answer):
                got += connection.recv(2**16)
            assert got == answer and b"\n" not in got
            lines = head.decode().split("\r\n")
            assert lines[0] == "HTTP/1.1 200 OK" and f"Content-Length: {len(answer)}" in lines
            assert "Content-Type: application/json" in lines


def test_what_the_plugins_read(server):
    """llama.vscode reads the whole answer, with the context's size; llama.vim the fields that it names."""
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX)
    whole = ask(server, "/infill", hole(n_predict=-1, top_k=40, top_p=0.9, samplers=["infill"], id_slot=0))
    assert whole.status == 200 and whole.content["content"] == best.text
    assert whole.content["generation_settings"]["n_ctx"] == T
    assert whole.content["timings"]["predicted_n"] <= T // 4 and whole.content["timings"]["prompt_ms"] > 0
    names = ["content", "timings/predicted_n", "timings/prompt_ms", "tokens_cached", "no such field"]
    chosen = ask(server, "/infill", hole(n_predict=-1, response_fields=names))
    assert list(chosen.content) == ["content", "tokens_cached", "timings/prompt_ms", "timings/predicted_n"]
    assert chosen.content["content"] == best.text


def test_warming_up_is_answered_at_once_and_cancels_nothing(server, slow):
    """llama.vim sends n_predict 0 with its input_extra while another request may be under way."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, "/infill", hole(n_predict=32))))
    thread.start()
    wait_for(lambda: slow)
    warming = hole(n_predict=0, input_extra=[{"text": "x = 1\n", "filename": "a.py"}], response_fields=[""])
    assert ask(server, "/infill", warming).content == {}
    assert ask(server, "/infill", hole(n_predict=0)).content["content"] == ""
    assert not answers  # which takes a second
    thread.join()
    assert answers[0].status == 200


def test_several_completions_the_best_first(server):
    expected = expected_infill(server, PREFIX + TYPED, SUFFIX, n=3, temperature=0.8, seed=1)
    texts = [best.text for best in expected]
    assert len(set(texts)) == 3
    answers = ask(server, "/infill", hole(n_predict=-1, n_cmpl=3)).content
    assert [(answer["index"], answer["content"]) for answer in answers] == list(enumerate(texts))
    body = {"prompt": PREFIX + TYPED, "suffix": SUFFIX, "max_tokens": T, "n": 3}
    choices = ask(server, "/v1/completions", body).content["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(texts))


def test_openais_completions(server):
    """With a suffix an infill; without, the text goes on. Sentinels written out are a suffix, too."""
    best, = expected_infill(server, PREFIX, SUFFIX)
    for body in ({"prompt": PREFIX, "suffix": SUFFIX}, {"prompt": f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>"},
                 {"prompt": f"<PRE>{PREFIX}<SUF>{SUFFIX}<MID>", "suffix": None, "stop": None}):
        answer = ask(server, "/v1/completions", body | {"max_tokens": 10**6}).content
        assert answer["choices"] == [{"text": best.text, "index": 0, "logprobs": None,
                                      "finish_reason": "length" if best.ended == "did not stop" else "stop"}]
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["usage"]["prompt_tokens"] == len(server.tok.encode(PREFIX) + server.tok.encode(SUFFIX)) + 3
    tok, eot = server.tok, server.tok.eot
    for text in (PREFIX, "", "<PRE> a <SUF>b", "a <MID>"):
        idx = torch.tensor([tok.encode(text) or [eot]])
        (ids, _), = collect(generate(server.model, idx, 16, 0, stop=eot, allowed=eot + 1), tok)
        answer = ask(server, "/v1/completions", {"prompt": text}).content  # 16 tokens, as at OpenAI's
        assert answer["choices"][0]["text"] == tok.decode(ids).rstrip("\ufffd")
        assert answer["usage"]["completion_tokens"] == len(ids)


def streamed(server, body):
    """Server-sent events: lines "data: " and JSON, an empty line after each, at the end [DONE]."""
    got = ask(server, "/v1/completions", body | {"stream": True})
    assert got.response.headers["Content-Type"] == "text/event-stream"
    *events, end = got.raw.decode().split("\n\n")
    assert end == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-1])
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]


def test_streamed_pieces_join_to_the_completion(server):
    for fields in ({"suffix": SUFFIX}, {}, {"temperature": 3, "seed": 5}):  # hot: halves of characters
        body = {"prompt": PREFIX, "max_tokens": T} | fields
        whole = ask(server, "/v1/completions", body).content["choices"][0]
        pieces = streamed(server, body)
        assert "".join(piece["text"] for piece in pieces) == whole["text"] and len(pieces) > 3
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [whole["finish_reason"]]


def test_a_completion_ends_before_the_first_stop_text(server):
    """In a stream, too, whose pieces may each hold a part of it."""
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": T}
    text = ask(server, "/v1/completions", body).content["choices"][0]["text"]
    stop = [text[12:17], text[20:23], "not in it"]
    expected = text[:min(text.find(stop[0]), text.find(stop[1]))]
    for given in (stop, stop[0]):
        choice = ask(server, "/v1/completions", body | {"stop": given}).content["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[:text.find(stop[0])], "stop")
        assert "".join(piece["text"] for piece in streamed(server, body | {"stop": given})) == choice["text"]
    assert text[:text.find(stop[0])] == expected
    several = ask(server, "/infill", hole(n_cmpl=4, stop=["e", "t"])).content
    assert not any("e" in answer["content"] or "t" in answer["content"] for answer in several)


def test_a_completion_ends_where_it_repeats_the_suffix(server, monkeypatch):
    """As in sample.infill, but the rest is not even generated."""
    ids = server.tok.encode("(xs)\n    return total\n\n\ndef more(xs):\n")
    steps = [(torch.tensor([i]), torch.tensor([-1.0])) for i in ids]
    monkeypatch.setattr(serve, "generate", lambda *_, **__: iter(steps))
    body = {"prompt": "total = sum", "suffix": "\n    return total\n"}
    got = ask(server, "/v1/completions", body).content
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("(xs)", "stop")
    assert got["usage"]["completion_tokens"] < len(ids) - 5
    assert streamed(server, body)[-1]["finish_reason"] == "stop"


def test_typing_on_computes_only_what_is_new(server):
    """SPM: the suffix and the prefix so far are in the cache."""
    ask(server, "/infill", hole(prompt="    ret"))
    n_typed = len(server.tok.encode(PREFIX + TYPED)) - len(server.tok.encode(PREFIX))
    got = ask(server, "/infill", hole(n_predict=-1)).content
    assert got["timings"]["prompt_n"] <= n_typed + 2 < len(server.tok.encode(PREFIX + SUFFIX))
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX)
    assert got["content"] == best.text
    assert ask(server, "/infill", hole(prompt="", n_predict=-1)).content["content"] != best.text


def test_a_newer_request_of_the_same_client_cancels_the_older(server, slow):
    """Its answer is an error, which plugins drop. Other clients wait for their turn."""
    answers = {}

    def editor(name, n_predict):
        body = hole(prompt=name, n_predict=n_predict)
        answers[name] = ask(server, "/infill", body, {"User-Agent": name[:3]})

    threads = []
    for name, n_predict in (("vim 1", 32), ("emacs", 4), ("vim 2", 4), ("vim 3", 4)):
        threads.append(threading.Thread(target=editor, args=(name, n_predict)))
        threads[-1].start()
        wait_for(lambda name=name: any(job.prefix.endswith(name) for job in list(server.newest.values())))
    for thread in threads:
        thread.join()
    assert {name: got.status for name, got in answers.items()} == {
        "vim 1": 409, "emacs": 200, "vim 2": 409, "vim 3": 200}
    assert "a newer request came" in answers["vim 1"].content["error"]["message"]
    assert answers["vim 3"].content["content"] == expected_infill(
        server, PREFIX + "vim 3", SUFFIX, max_new_tokens=4)[0].text
    assert not server.newest


def test_a_stream_that_is_cancelled_ends_with_an_error(server, slow):
    got = []
    body = {"prompt": PREFIX, "max_tokens": T, "stream": True}
    thread = threading.Thread(target=lambda: got.append(ask(server, "/v1/completions", body)))
    thread.start()
    wait_for(lambda: slow)
    ask(server, "/v1/completions", {"prompt": PREFIX, "max_tokens": 1})
    thread.join()
    assert b'{"error":{"code":409' in got[0].raw.split(b"\n\n")[-2] and b"[DONE]" not in got[0].raw


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_its_job(server, slow, stream):
    body = json.dumps({"prompt": PREFIX, "max_tokens": T, "stream": stream})
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nUser-Agent: gone\r\n"
                           f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: slow)
    assert ask(server, "/v1/completions", {"prompt": PREFIX, "max_tokens": 1}).status == 200
    assert len(slow) < T // 4  # tokens of both


def test_fifty_requests_at_once(server):
    for agent, allowed in (("editor {}", {200}), ("the same", {200, 409})):
        statuses = []

        def request(i, agent=agent, statuses=statuses):
            body, headers = hole(prompt=f"    x{i}", n_predict=2), {"User-Agent": agent.format(i)}
            statuses.append(ask(server, "/infill", body, headers).status)

        threads = [threading.Thread(target=request, args=(i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == 50 and 200 in statuses and set(statuses) <= allowed
    assert not server.newest


def test_long_texts_are_trimmed_to_the_hole(server, documents):
    """A million characters, of code or of one letter, and the answer is that for the ends at the hole."""
    code = "".join(documents[:8])
    code *= 10**6 // len(code) + 1
    near = server.tok.decode(server.tok.encode(code[-4000:]))
    best, = expected_infill(server, near, code[:4000])
    got = ask(server, "/infill", {"input_prefix": code, "input_suffix": code, "n_predict": -1})
    assert got.content["content"] == best.text
    assert ask(server, "/v1/completions", {"prompt": "x" * 10**6, "max_tokens": 1}).status == 200


def test_half_a_surrogate_is_answered(server):
    """As where JavaScript cuts a text within an emoji. Two halves, escaped, are the whole."""
    for text in (r'"\ud83d x"', r'"x = \ude00"', r'"\ude00\ud83d"'):
        assert ask(server, "/infill", f'{{"input_prefix": {text}, "n_predict": 2}}').status == 200
    one, other = (ask(server, "/infill", f'{{"input_prefix": "{text}"}}').content["content"]
                  for text in (r"x = \ud83d\ude00", "x = 😀"))
    assert one == other


def test_health_and_models(server):
    assert ask(server, "/health").raw == b'{"status":"ok"}'
    model, = ask(server, "/v1/models?limit=1").content["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")


@pytest.mark.parametrize("path, body, status, message", [
    ("/infill", "", 400, "not JSON"), ("/infill", "{", 400, "not JSON"),
    ("/infill", b"\xff", 400, "not JSON"), ("/infill", "[" * 10**5, 400, "not JSON"),
    ("/infill", "[1]", 400, "expected a JSON object"),
    ("/infill", "null", 400, "expected a JSON object"),
    ("/infill", {"input_prefix": 5}, 400, "input_prefix 5: expected a text"),
    ("/infill", {"prompt": ["a"]}, 400, 'prompt ["a"]: expected a text'),
    ("/infill", {"input_suffix": {"a": "b" * 1000}}, 400, "bbb...: expected a text"),
    ("/infill", {"n_predict": "9"}, 400, 'n_predict "9": expected a whole number'),
    ("/infill", {"n_predict": True}, 400, "n_predict true: expected a whole number"),
    ("/infill", {"n_predict": 1.5}, 400, "n_predict 1.5: expected a whole number"),
    ("/infill", {"n_predict": -2}, 400, "n_predict -2: expected -1"),
    ("/infill", {"n_cmpl": 99}, 400, "n_cmpl 99: expected 1 to 16"),
    ("/infill", {"stream": True}, 400, "stream true: expected false"),
    ("/infill", {"response_fields": "content"}, 400, "expected a list"),
    ("/infill", '{"n_predict": %s}' % ("9" * 5000), 400, "not JSON"),
    ("/infill", {"temperature": -1}, 400, "temperature -1: expected 0 to 100"),
    ("/infill", '{"temperature": NaN}', 400, "temperature nan: expected 0 to 100"),
    ("/infill", '{"top_p": 1e999}', 400, "top_p inf: expected"), ("/infill", {"top_k": -1}, 400, "top_k -1"),
    ("/infill", {"seed": 2**70}, 400, "seed"), ("/infill", {"stop": [""]}, 400, "stop"),
    ("/infill", {"stop": 5}, 400, "stop 5: expected a list"),
    ("/infill", {"stop": ["a"] * 65}, 400, "64 texts"),
    ("/v1/completions", {"prompt": None, "suffix": 1}, 400, "suffix 1: expected a text"),
    ("/v1/completions", {"max_tokens": []}, 400, "max_tokens []: expected a whole number"),
    ("/v1/completions", {"stream": "yes"}, 400, 'stream "yes": expected true or false'),
    ("/v1/completions", {"stream": True, "n": 2}, 400, "n 2: expected 1 with stream"),
    ("/v1/completions", {"user": {}}, 400, "user {}: expected a text"),
    ("/v1/chat/completions", {}, 404, "expected /infill or /v1/completions"),
    ("/infill", None, 404, "expected /health or /v1/models"),
    ("/" + "x" * 1000, None, 404, "xxx...: expected")])
def test_a_bad_request_is_refused_in_one_sentence(path, body, status, message, server):
    got = ask(server, path, body)
    assert (got.status, got.content["error"]["code"]) == (status, status)
    assert message in got.content["error"]["message"] and len(got.content["error"]["message"]) < 200
    assert got.response.headers["Connection"] == "close"
    assert ask(server, "/health").status == 200


@pytest.mark.parametrize("request_, status", [
    (b"PUT /infill HTTP/1.1\r\nHost: localhost\r\n\r\n", 405), (b"hello\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 400), (b"GET /" + b"x" * 70_000 + b"\r\n\r\n", 414),
    (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    (b"POST /infill HTTP/1.1\r\nHost: localhost\r\n\r\n{}", 411),
    (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}", 411),
    (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", 411),
    (b"GET /health HTTP/1.1\r\n\r\n", 403)])
def test_what_is_no_request_is_refused(request_, status, server, monkeypatch):
    monkeypatch.setattr(serve, "WAIT", 0.2)  # the connection is not closed from here
    answer = send_raw(server, request_)
    assert b"HTTP/1.1 %d " % status in answer or b'{"error":{"code":%d,' % status in answer
    assert ask(server, "/health").status == 200


@pytest.mark.parametrize("headers, status", [
    ({"Host": "localhost:8012"}, 200), ({"Host": "127.0.0.1"}, 200), ({"Host": "LOCALHOST:1"}, 200),
    ({"Host": "evil.example:8012"}, 403), ({"Host": "192.168.0.9"}, 403), ({"Host": ""}, 403),
    ({"Host": "localhost.evil.example"}, 403), ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403), ({"Origin": "http://localhost:3000"}, 403)])
def test_web_pages_cannot_ask(headers, status, server):
    """Origin is what a browser sends for a page; a foreign Host is a page's own name that leads here."""
    bodies = {"/infill": hole(n_predict=1), "/v1/completions": {"max_tokens": 1}, "/health": None}
    for path, body in bodies.items():
        got = ask(server, path, body, headers)
        assert got.status == status and "Access-Control-Allow-Origin" not in got.response.headers


def test_a_body_of_100_mb_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413 ")  # at once
        for _ in range(100):  # a client that goes on to send can still read the answer
            connection.sendall(bytes(10**6))
    assert ask(server, "/infill", bytes(serve.LARGEST + 1)).content["error"]["code"] == 413


def test_curl_waits_for_100_continue(server):
    body = json.dumps(hole(n_predict=2, response_fields=["content"])).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(b"POST /infill HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(2**16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("first, drop", [
    (b"", b""), (b"GET /hea", b""), (b"GET /health HTTP/1.1\r\nA: ", b"b"),
    (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{", b""),
    (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n", b" ")])
def test_a_slow_client_is_left_after_a_while(first, drop, server, monkeypatch):
    """Even if a byte comes now and then; meanwhile others are answered."""
    monkeypatch.setattr(serve, "WAIT", 0.3)
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(first)
        assert ask(server, "/infill", hole(n_predict=1)).status == 200
        connection.settimeout(0.02)
        answer, is_open = b"", True
        while is_open and time.monotonic() - start < 10:
            try:
                connection.sendall(drop)
                piece = connection.recv(2**16)
                answer, is_open = answer + piece, bool(piece)
            except TimeoutError:
                pass
            except OSError:
                is_open = False
    assert not is_open and time.monotonic() - start > 0.2
    assert answer.startswith(b"HTTP/1.1 408 ") == first.startswith(b"POST")


def test_a_client_that_leaves_early_is_forgotten(server):
    for sent in (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
                 b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3, b"G"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    assert ask(server, "/health").status == 200


def test_a_model_that_saw_no_gap_continues_and_refuses_holes(tmp_path, tok):
    with running(save_run(tmp_path / "left", small_model(tok.n_vocab, T), tok)) as server:
        assert ask(server, "/v1/completions", {"prompt": PREFIX}).content["choices"][0]["text"]
        for path, body in (("/infill", hole()), ("/v1/completions", {"prompt": "a", "suffix": "b"})):
            got = ask(server, path, body)
            assert got.status == 400 and "left never saw a gap" in got.content["error"]["message"]


@pytest.mark.parametrize("arguments, code, message", [
    ("--port {port}", 1, "--port {port}: cannot listen there"), ("--port x", 2, "--port"),
    ("--port 70000", 2, "--port 70000: expected 0"), ("--device abacus", 2, "--device abacus"),
    ("--port 0 --host 203.0.113.1", 1, "--host 203.0.113.1"), ("--ckpt none", 1, "no such checkpoint")])
def test_a_mistake_at_the_start_is_one_line(arguments, code, message, server, run_folder, capfd):
    port = str(server.server_port)
    with pytest.raises(SystemExit) as stop:
        serve.main(["--ckpt", str(run_folder), *arguments.format(port=port).split()])
    shown = capfd.readouterr().err
    assert stop.value.code == code and message.format(port=port) in shown and shown.count("\n") == 1


def test_the_command_serves_the_newest_run(run_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, time_ in (("older", 1e9), ("newest", 2e9)):
        shutil.copytree(run_folder, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "ckpt.pt", (time_, time_))
    addresses = []
    monkeypatch.setattr(serve.Server, "serve_forever", lambda server: addresses.append(server.server_address))
    serve.main(["--port", "0", "--device", "cpu"])
    (host, port), = addresses
    shown = capfd.readouterr().out
    assert host == "127.0.0.1" and shown.startswith(f"out/newest at http://127.0.0.1:{port}:")
