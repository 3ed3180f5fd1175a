"""The server, over real connections: what the editors' plugins send and need, and what else may come."""
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import run_main, save_run, small_model
from lab import serve
from sample import collect, generate, infill

PREFIX, TYPED, SUFFIX = "def mean(xs):\n    total = sum(xs)\n", "    return", "\n\nprint(mean([1, 2]))\n"
T = 128  # the model's context
POST = b"POST /infill HTTP/1.1\r\nHost: localhost\r\n"


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
def no_traceback(capsys):
    """Whatever a test sends, the server prints nothing."""
    yield
    assert capsys.readouterr() == ("", "")


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
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)) as connection:
        body = json.dumps(body) if isinstance(body, dict) else body
        body = body.encode() if isinstance(body, str) else body
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
        response = connection.getresponse()
        raw = response.read()
        content = json.loads(raw) if response.headers["Content-Type"] == "application/json" else None
        return SimpleNamespace(status=response.status, content=content, response=response, raw=raw)


def completions(server, body):
    return ask(server, "/v1/completions", body).content["choices"]


def connected(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def received(connection):
    """The bytes that come up to the connection's end."""
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def expected_infill(server, prefix, suffix, **settings):
    return infill(server.model, server.tok, prefix, suffix, **{"max_new_tokens": T // 4} | settings)


def at_once(*functions):
    """The functions' results, each in a thread of its own."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result() for future in [threads.submit(function) for function in functions]]


def hole(**fields):
    """What llama.vim sends at the end of TYPED: the lines before, the line so far, and what follows."""
    return {"input_prefix": PREFIX, "prompt": TYPED, "input_suffix": SUFFIX} | fields


def test_a_worked_example(server):
    """What llama.vim's curl gets; it drops an answer with a space behind the colon. The connection stays."""
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX, max_new_tokens=8)
    body = json.dumps(hole(n_predict=8)).encode()
    request = POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with connected(server) as connection:
        connection.sendall(request + request.replace(b"localhost", b"localhost\r\nConnection: close"))
        answers = received(connection)
    assert answers.count(b'\r\n\r\n{"content":%s,' % json.dumps(best.text).encode()) == 2


def test_what_the_plugins_read(server):
    """llama.vscode reads the context's size; llama.vim timings under names of their own, in one of three
    forms: prompt_n, prompt_ms and prompt_per_second, and so for predicted."""
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX)
    got = ask(server, "/infill", hole(n_predict=-1, top_k=40, top_p=0.9, samplers=["x"], id_slot=0)).content
    assert got["content"] == best.text and got["generation_settings"]["n_ctx"] == T
    n_new = got["timings"]["predicted_n"]
    assert 0 < n_new <= T // 4 and got["tokens_cached"] == n_new + len(
        server.tok.encode(PREFIX + TYPED) + server.tok.encode(SUFFIX)) + 3
    for part in ("prompt", "predicted"):
        n, ms, speed = (got[f"timings/{part}_{name}"] for name in ("n", "ms", "per_second"))
        assert n == got["timings"][f"{part}_n"] and speed == pytest.approx(1000 * n / ms)


def test_warming_up_is_answered_at_once_and_cancels_nothing(server, slow):
    """llama.vim sends n_predict 0 with its input_extra while another request may be under way."""
    warming = hole(n_predict=0, input_extra=[{"text": "x = 1\n", "filename": "a.py"}])
    got, (warmed, n_tokens) = at_once(
        lambda: ask(server, "/infill", hole(n_predict=32)),
        lambda: wait_for(lambda: slow) or (ask(server, "/infill", warming), len(slow)))
    assert got.status == 200 and warmed.content["content"] == "" and n_tokens < len(slow)


def test_several_completions_the_best_first(server):
    infills = expected_infill(server, PREFIX + TYPED, SUFFIX, n=3, temperature=0.8, seed=1)
    expected = list(enumerate(best.text for best in infills))
    answers = ask(server, "/infill", hole(n_predict=-1, n_cmpl=3)).content
    assert [(answer["index"], answer["content"]) for answer in answers] == expected
    choices = completions(server, {"prompt": PREFIX + TYPED, "suffix": SUFFIX, "max_tokens": T, "n": 3})
    assert [(choice["index"], choice["text"]) for choice in choices] == expected


def test_openais_completions(server):
    """With a suffix an infill; without, the text goes on. Sentinels written out are a suffix, too."""
    tok, (best,) = server.tok, expected_infill(server, PREFIX, SUFFIX)
    for body in ({"prompt": PREFIX, "suffix": SUFFIX}, {"prompt": f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>"},
                 {"prompt": f"<PRE>{PREFIX}<SUF>{SUFFIX}<MID>", "suffix": None, "stop": None}):
        answer = ask(server, "/v1/completions", body | {"max_tokens": 10**6}).content
        assert answer["choices"] == [{"text": best.text, "index": 0, "logprobs": None,
                                      "finish_reason": "length" if best.ended == "did not stop" else "stop"}]
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["usage"]["prompt_tokens"] == len(tok.encode(PREFIX) + tok.encode(SUFFIX)) + 3
    for text in (PREFIX, "", "<PRE> a <SUF>b", "a <MID>"):
        idx = torch.tensor([tok.encode(text) or [tok.eot]])
        (ids, _), = collect(generate(server.model, idx, 16, 0, stop=tok.eot, allowed=tok.eot + 1), tok)
        answer = ask(server, "/v1/completions", {"prompt": text}).content  # 16 tokens, as at OpenAI's
        assert answer["choices"][0]["text"] == tok.decode(ids, "ignore")
        assert answer["usage"]["completion_tokens"] == len(ids)


def streamed(server, body):
    """Server-sent events: lines "data: " and JSON, an empty line after each, at the end [DONE]."""
    got = ask(server, "/v1/completions", body | {"stream": True})
    assert got.response.headers["Content-Type"] == "text/event-stream"
    *events, end = got.raw.decode().split("\n\n")
    assert end == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-1])
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]


@pytest.mark.parametrize("fields", [{"suffix": SUFFIX}, {}, {"temperature": 3, "seed": 5}])
def test_streamed_pieces_join_to_the_completion(server, fields):
    body = {"prompt": PREFIX, "max_tokens": T} | fields
    whole, = completions(server, body)
    pieces = streamed(server, body)
    assert "".join(piece["text"] for piece in pieces) == whole["text"] and len(pieces) > 3
    reasons = [piece["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole["finish_reason"]]


def test_a_completion_ends_before_the_first_stop_text(server):
    """In a stream, too, whose pieces may each hold a part of it."""
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": T}
    text = completions(server, body)[0]["text"]
    first = text[12:17]
    for stop in ([text[20:23], first, "not in it"], first):
        choice, = completions(server, body | {"stop": stop})
        assert (choice["text"], choice["finish_reason"]) == (text[:text.find(first)], "stop")
        assert "".join(piece["text"] for piece in streamed(server, body | {"stop": stop})) == choice["text"]
    several = completions(server, body | {"n": 4, "stop": ["e", "t"]})
    assert not any("e" in choice["text"] or "t" in choice["text"] for choice in several)


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
    got = ask(server, "/infill", hole(n_predict=-1)).content
    n_typed, n_text = (len(server.tok.encode(text)) for text in (TYPED, PREFIX + SUFFIX))
    assert got["timings"]["prompt_n"] <= n_typed + 2 < n_text
    assert got["content"] == expected_infill(server, PREFIX + TYPED, SUFFIX)[0].text


def test_a_newer_request_of_the_same_client_cancels_the_older(server, slow):
    """Its answer is an error, which plugins drop. Other clients wait for their turn."""
    def editor(seed, name, n_predict):
        def newest():
            return [job.settings["seed"] for job in list(server.newest.values())]
        wait_for(lambda: seed == 0 or seed - 1 in newest())
        return ask(server, "/infill", hole(seed=seed, n_predict=n_predict), {"User-Agent": name})

    got = at_once(*(partial(editor, *request) for request in (
        (0, "vim", 32), (1, "emacs", 4), (2, "vim", 4), (3, "vim", 4))))
    assert [answer.status for answer in got] == [409, 200, 409, 200]
    assert "a newer request came" in got[0].content["error"]["message"]
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX, max_new_tokens=4)
    assert got[3].content["content"] == best.text
    wait_for(lambda: not server.newest)


@pytest.mark.parametrize("path, name", [("/infill", "content"), ("/v1/completions", "choices")])
def test_equal_requests_are_all_answered(server, slow, path, name):
    """minuet-ai sends three at once, for three suggestions."""
    body = {"prompt": PREFIX, "input_suffix": SUFFIX, "n_predict": 8, "max_tokens": 8}
    got = at_once(*[lambda: ask(server, path, body).content[name]] * 3)
    assert got[0] == got[1] == got[2]


def test_a_stream_that_is_cancelled_ends_with_an_error(server, slow):
    body = {"prompt": PREFIX, "max_tokens": T, "stream": True}
    got, _ = at_once(lambda: ask(server, "/v1/completions", body),
                     lambda: wait_for(lambda: slow) or completions(server, {"max_tokens": 1}))
    assert b'{"error":{"code":409' in got.raw.split(b"\n\n")[-2] and b"[DONE]" not in got.raw


def sent_by_hand(connection, **body):
    body = json.dumps({"prompt": PREFIX, "max_tokens": T} | body)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                       f"User-Agent: by hand\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


@pytest.mark.parametrize("stream, end", [(False, b"}"), (True, b"data: [DONE]\n\n")])
def test_a_client_that_will_send_no_more_is_answered(stream, end, server):
    with connected(server) as connection:
        sent_by_hand(connection, stream=stream)
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(end)


def test_closing_the_connection_cancels_a_stream(server, slow):
    with connected(server) as connection:
        sent_by_hand(connection, stream=True)
        wait_for(lambda: slow)
    assert completions(server, {"prompt": PREFIX, "max_tokens": 1}) and len(slow) < T // 4  # tokens of both


@pytest.mark.parametrize("agent, allowed", [("editor {}", {200}), ("the same", {200, 409})])
def test_fifty_requests_at_once(server, agent, allowed):
    got = at_once(*(partial(ask, server, "/infill", hole(prompt=f"    x{i}", n_predict=2),
                            {"User-Agent": agent.format(i)}) for i in range(50)))
    assert 200 in {answer.status for answer in got} <= allowed
    wait_for(lambda: not server.newest)


def test_line_ends_of_any_kind_give_the_same_completion(server):
    """An editor may send the \\r\\n of its file; the model was trained on \\n."""
    body = json.dumps({"prompt": PREFIX, "suffix": SUFFIX, "stop": ["x\n"], "max_tokens": T})
    one, *others = (ask(server, "/v1/completions", body.replace(r"\n", end)).content
                    for end in (r"\n", r"\r\n", r"\r"))
    assert all((other["choices"], other["usage"]) == (one["choices"], one["usage"]) for other in others)


@pytest.mark.parametrize("path, fields, same_as", [
    ("/infill", {"top_k": -1, "temperature": 1}, {"top_k": 0, "temperature": 1}),
    ("/infill", {"top_k": 40.0, "temperature": 1}, {"top_k": 40, "temperature": 1}),
    ("/infill", {"n_predict": 8.0}, {"n_predict": 8}), ("/infill", {"n_predict": -2}, {"n_predict": T}),
    ("/infill", {"top_p": 0, "temperature": 1}, {"top_k": 1, "temperature": 1}),
    ("/infill", {"stop": [""]}, {}), ("/infill", {"prompt": [TYPED]}, {}),
    ("/v1/completions", {"prompt": [TYPED], "stop": ""}, {})])
def test_what_llama_cpp_and_openai_take(path, fields, same_as, server):
    one, other = (ask(server, path, hole() | given) for given in (fields, same_as))
    name = "content" if path == "/infill" else "choices"
    assert one.status == other.status == 200 and one.content[name] == other.content[name]


def test_long_texts_are_trimmed_to_the_hole(server, documents):
    """A million characters, of code or of one letter, and the answer is that for the ends at the hole."""
    code = "".join(documents[:8]) * 10
    best, = expected_infill(server, server.tok.decode(server.tok.encode(code[-4000:])), code[:4000])
    got = ask(server, "/infill", {"input_prefix": code, "input_suffix": code, "n_predict": -1})
    assert len(code) > 10**6 and got.content["content"] == best.text
    assert completions(server, {"prompt": "x" * 10**6, "max_tokens": 1})


BAD = {"/infill": [
    ("", "no JSON"), (b"\xff", "no JSON"), ("[" * 10**5, "no JSON"), ("[1]", "no JSON object"),
    ({"input_prefix": 5}, "input_prefix 5: expected a text"), ({"prompt": [1]}, "prompt 1: expected a text"),
    ({"prompt": ["a", "b"]}, 'prompt ["a","b"]: expected a text'), ({"stop": 5}, "stop 5: expected texts"),
    ({"input_suffix": {"a": "b" * 1000}}, "bbb: expected a text"), ({"stop": [None]}, "stop [null]:"),
    ({"n_predict": "9"}, 'n_predict "9": expected a whole number'), ({"n_predict": True}, "n_predict true"),
    ({"n_predict": 1.5}, "n_predict 1.5"), ({"n_cmpl": 99}, "n_cmpl 99: expected 1 to 16"),
    ('{"n_predict": %s}' % ("9" * 5000), "no JSON"), ({"seed": 2**70}, "seed"), ({"top_p": -1}, "top_p -1"),
    ({"stream": True}, "stream true: expected false"), ('{"temperature": NaN}', "temperature NaN:"),
    ({"temperature": -1}, "temperature -1: expected 0 to 100"), ('{"top_p": 1e999}', "top_p Infinity:"),
    ('{"temperature": 1%s}' % ("0" * 999), "expected 0 to 100")], "/v1/completions": [
    ({"prompt": None, "suffix": 1}, "suffix 1: expected a text"), ({"max_tokens": []}, "max_tokens []:"),
    ({"stream": "yes"}, 'stream "yes": expected true'), ({"stream": True, "n": 2}, "n 2: expected 1 with")]}


@pytest.mark.parametrize("status, path, body, message", [
    *[(400, path, *bad) for path in BAD for bad in BAD[path]],
    (404, "/v1/chat/completions", {}, "expected GET / or GET /health"),
    (404, "/infill", None, "or POST /infill"), (404, "/" + "x" * 1000, None, "xxx: expected")])
def test_a_bad_request_is_refused_in_one_sentence(status, path, body, message, server):
    got = ask(server, path, body)
    assert (got.status, got.content["error"]["code"]) == (status, status)
    assert message in got.content["error"]["message"] and len(got.content["error"]["message"]) < 200
    assert got.response.headers["Connection"] == "close" and ask(server, "/health").status == 200


@pytest.mark.parametrize("sent, expected", [
    (b"", b""), (b"GET /hea", b""), (b"GET /health HTTP/1.1\r\nA: ", b""), (b"hello\r\n\r\n", b'"code":400'),
    (b"GET /\xff HTTP/1.1\r\n\r\n", b'"code":404'), (POST + b"\r\n{}", b'"code":413'),
    (POST + b"Content-Length: 9\r\n\r\n{", b'"code":408'), (b"PUT" + POST[4:] + b"\r\n", b'"code":501'),
    (POST + b"Content-Length: -1\r\n\r\n{}", b'"code":413'), (b"x" * 70_000, b'"code":414')])
def test_what_is_no_request_is_refused_and_a_slow_client_left(sent, expected, server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    with connected(server) as connection:
        connection.sendall(sent)
        assert ask(server, "/infill", hole(n_predict=1)).status == 200  # meanwhile
        answer = received(connection)
    assert expected in answer and bool(expected) == bool(answer)


@pytest.mark.parametrize("listens, host, origin, status", [
    ("127.0.0.1", "localhost:8012", None, 200), ("0.0.0.0", "my-machine:8012", None, 200),
    ("127.0.0.1", "localhost:8012", "http://localhost:8012", 200), ("127.0.0.1", "localhost", "null", 403),
    ("127.0.0.1", "localhost:8012", "http://localhost:3000", 403),  # another page on this machine
    ("0.0.0.0", "10.0.0.9:1", "http://10.0.0.9:1", 200), ("my-pc", "my-pc:1", "http://my-pc:1", 200),
    *[(listens, host, "http://evil.example", 403) for listens in ("127.0.0.1", "0.0.0.0")
      for host in ("localhost", "evil.example", "")],
    ("127.0.0.1", "localhost.evil.example", "http://localhost.evil.example", 403)])
def test_web_pages_of_others_cannot_ask(listens, host, origin, status, server, monkeypatch):
    """Origin is what a browser sends for a page; a foreign Host is a page's own name that leads here."""
    monkeypatch.setattr(server, "host", listens)
    for path, body in {"/infill": hole(n_predict=1), "/v1/completions": {"max_tokens": 1}}.items():
        got = ask(server, path, body, {"Host": host} | ({"Origin": origin} if origin else {}))
        assert got.status == status and "Access-Control-Allow-Origin" not in got.response.headers


def test_what_can_be_got(server):
    """The page asks /infill as an editor does, and loads nothing from elsewhere."""
    assert ask(server, "/health").raw == b'{"status":"ok"}'
    model, = ask(server, "/v1/models?limit=1").content["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    page = ask(server, "/")
    assert page.response.headers["Content-Type"] == "text/html" and page.raw.startswith(b"<!DOCTYPE html>")
    assert {name for name in hole() if b"%s:" % name.encode() in page.raw} == {"input_prefix", "input_suffix"}
    assert b'fetch("/infill"' in page.raw and b"//" not in page.raw


def test_a_body_of_100_mb_is_refused_before_it_is_read(server):
    with connected(server) as connection:
        connection.sendall(POST + b"Content-Length: 100000000\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413 ")  # at once
        connection.sendall(bytes(10**8))  # a client that goes on to send can still read the answer
    assert ask(server, "/infill", bytes(serve.LARGEST + 1)).content["error"]["code"] == 413


def test_a_model_that_saw_no_gap_continues_and_refuses_holes(tmp_path, tok):
    with running(save_run(tmp_path / "left", small_model(tok.n_vocab, T), tok)) as server:
        assert ask(server, "/v1/completions", {"prompt": PREFIX}).content["choices"][0]["text"]
        for path in ("/infill", "/v1/completions"):
            got = ask(server, path, {"prompt": "a", "suffix": "b"})
            assert got.status == 400 and "not trained to infill" in got.content["error"]["message"]


@pytest.mark.parametrize("arguments, code, message", [
    ("--port {port}", 1, "--port {port}: cannot listen there"), ("--port 70000", 2, "--port: 70000:"),
    ("--device abacus", 2, "--device abacus"), ("--ckpt none", 1, "no such checkpoint")])
def test_a_mistake_at_the_start_is_one_line(arguments, code, message, server, run_folder, capsys):
    port = server.server_port
    shown = run_main(serve.main, capsys, "--ckpt", str(run_folder), *arguments.format(port=port).split())
    assert shown.code == code and message.format(port=port) in shown.err


def test_the_command_says_where_it_serves(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(serve.Server, "serve_forever", lambda server: print(*server.server_address))
    serve.main(["--ckpt", str(run_folder), "--port", "0", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert re.fullmatch(rf"{run_folder} at http://127.0.0.1:(\d+): .*\n127.0.0.1 \1\n", shown)
