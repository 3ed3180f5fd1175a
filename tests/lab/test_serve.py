"""The server, over real connections: what the editors' plugins send and need, and what else may come."""
import http.client
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
import torch

from conftest import run_main, save_run, small_model
from lab import serve
from sample import collect, generate, infill

PREFIX, TYPED, SUFFIX = "def mean(xs):\n    total = sum(xs)\n", "    return", "\n\nprint(mean([1, 2]))\n"
T = 128  # the model's context
POST = b"POST /infill HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory, tok):
    """The server of a run, at a free port, in a thread."""
    run = save_run(tmp_path_factory.mktemp("runs") / "tiny", small_model(tok.n_vocab, T), tok, "fim_spm")
    with serve.Server("127.0.0.1", 0, run, "cpu") as server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever, poll_interval=0.01)
        yield server
        server.shutdown()


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


def ask(server, path, body=None, headers=(), sends_on=True):
    """One request, after which some clients close their half of the connection -> the response."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)) as connection:
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
        if not sends_on:
            connection.sock.shutdown(socket.SHUT_WR)
        response = connection.getresponse()
        response.raw = response.read()
        response.content = json.loads(response.raw) if "json" in response.headers["Content-Type"] else None
        return response


def completions(server, body):
    return ask(server, "/v1/completions", body).content["choices"]


def expected_infill(server, prefix, suffix, **settings):
    return infill(server.model, server.tok, prefix, suffix, **{"max_new_tokens": T // 4} | settings)


def at_once(*functions):
    """The functions' results, each in a thread of its own."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result() for future in [threads.submit(function) for function in functions]]


def hole(**fields):
    """What llama.vim sends at the end of TYPED: the lines before, the line so far, and what follows."""
    return {"input_prefix": PREFIX, "prompt": TYPED, "input_suffix": SUFFIX} | fields


def test_what_the_plugins_read(server, tok):
    """llama.vim drops an answer with a space behind the first colon, and reads timings under names of their
    own: n, ms and per_second of both parts. llama.vscode reads the context's size."""
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX)
    answer = ask(server, "/infill", hole(n_predict=-1, top_k=40, top_p=0.9, samplers=["x"]), sends_on=False)
    assert answer.raw.startswith(b'{"content":%s,' % json.dumps(best.text).encode())
    got, n_new = answer.content, answer.content["timings"]["predicted_n"]
    assert got["generation_settings"]["n_ctx"] == T and 0 < n_new <= T // 4
    assert got["tokens_cached"] - n_new == len(tok.encode(PREFIX + TYPED) + tok.encode(SUFFIX)) + 3
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
    got = ask(server, "/v1/completions", body | {"stream": True}, sends_on=False)
    assert got.headers["Content-Type"] == "text/event-stream"
    *events, done, end = got.raw.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event[len("data: "):])["choices"][0] for event in events]


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


@pytest.mark.parametrize("end", [{"suffix": "\r\n    return total\r\n"}, {"stop": "\r\n    "}])
def test_nothing_is_generated_after_the_end(end, server, monkeypatch):
    """Like sample.infill, a completion ends where it repeats the suffix. \r\n: of an editor's file."""
    ids = server.tok.encode("(xs)\n    return total\n\n\ndef more(xs):\n")
    steps = [(torch.tensor([i]), torch.tensor([-1.0])) for i in ids]
    monkeypatch.setattr(serve, "generate", lambda *_, **__: iter(steps))
    got = ask(server, "/v1/completions", {"prompt": "total = sum"} | end).content
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("(xs)", "stop")
    assert got["usage"]["completion_tokens"] < len(ids) - 5
    assert streamed(server, {"prompt": "total = sum"} | end)[-1]["finish_reason"] == "stop"


def test_typing_on_computes_only_what_is_new(server):
    """SPM: the suffix and the prefix so far are in the cache."""
    ask(server, "/infill", hole(prompt="    ret"))
    got = ask(server, "/infill", hole(n_predict=-1)).content
    n_typed, n_text = (len(server.tok.encode(text)) for text in (TYPED, PREFIX + SUFFIX))
    assert got["timings"]["prompt_n"] <= n_typed + 2 < n_text
    assert got["content"] == expected_infill(server, PREFIX + TYPED, SUFFIX)[0].text


def test_a_newer_request_of_the_same_client_cancels_the_older(server):
    """The older gets an error, which plugins drop. minuet-ai sends three equal requests, all answered."""
    def newest():
        return {job.settings["seed"] for job in list(server.newest.values())}

    def editor(seed, name):
        wait_for(lambda: seed == 50 or {seed - 1, seed} & newest())
        return ask(server, "/infill", hole(seed=seed, n_predict=4), {"User-Agent": name})

    requests = [(50, "vim"), (51, "emacs"), (52, "vim"), *[(53, "vim")] * 3]
    with server.model.register_forward_hook(lambda *_: wait_for(lambda: 53 in newest())):
        got = at_once(*(partial(editor, *request) for request in requests))
    assert [answer.status for answer in got] == [409, 200, 409, 200, 200, 200]
    best, = expected_infill(server, PREFIX + TYPED, SUFFIX, max_new_tokens=4)
    assert {answer.content["content"] for answer in got[3:]} == {best.text}


def test_a_stream_that_is_cancelled_ends_with_an_error(server, slow):
    body = {"prompt": PREFIX, "max_tokens": T, "stream": True}
    got, _ = at_once(lambda: ask(server, "/v1/completions", body),
                     lambda: wait_for(lambda: slow) or completions(server, {"max_tokens": 1}))
    assert b'{"error":{"code":409' in got.raw.split(b"\n\n")[-2] and b"[DONE]" not in got.raw


def test_closing_the_connection_cancels_a_stream(server, slow):
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as connection:
        connection.request("POST", "/v1/completions", '{"stream": true, "max_tokens": 99, "user": "x"}')
        wait_for(lambda: slow)
    assert completions(server, {"prompt": PREFIX, "max_tokens": 1}) and len(slow) < T // 4  # tokens of both


def test_fifty_requests_at_once(server):
    got = at_once(*(partial(ask, server, "/infill", hole(prompt=f"    x{i}", n_predict=2),
                            {"User-Agent": f"editor {i}"}) for i in range(50)))
    assert {answer.status for answer in got} == {200}


@pytest.mark.parametrize("path, fields, same_as", [
    ("/v1/completions", {"prompt": PREFIX.replace("\n", "\r\n")}, {"prompt": PREFIX}),  # of the editor's file
    ("/infill", {"top_k": -1, "temperature": 1}, {"top_k": 0, "temperature": 1}),
    ("/infill", {"top_k": 40.0, "temperature": 1}, {"top_k": 40, "temperature": 1}),
    ("/infill", {"top_p": 0, "temperature": 1}, {"top_k": 1, "temperature": 1}),
    ("/infill", {"n_predict": -2}, {"n_predict": T}), ("/infill", {"stop": [""], "prompt": [TYPED]}, {}),
    ("/v1/completions", {"prompt": [TYPED], "stop": ""}, {})])
def test_what_llama_cpp_and_openai_take(path, fields, same_as, server):
    one, other = (ask(server, path, hole() | given) for given in (fields, same_as))
    name = "content" if path == "/infill" else "choices"
    assert one.status == other.status == 200 and one.content[name] == other.content[name]


def test_long_texts_are_trimmed_to_the_hole(server, documents):
    """A million characters, of code or of one letter, and the answer is that for the ends at the hole."""
    code = "".join(documents[:8]) * 10
    best, = expected_infill(server, code[-4000:], code[:4000])
    got = ask(server, "/infill", {"input_prefix": code, "input_suffix": code, "n_predict": -1})
    assert len(code) > 10**6 and got.content["content"] == best.text
    assert completions(server, {"prompt": "x" * 10**6, "max_tokens": 1})


@pytest.mark.parametrize("status, path, body, message", [
    *[(400, "/infill", *bad) for bad in (
        ("", "no JSON"), (b"\xff", "no JSON"), ("[" * 10**5, "no JSON"), ("[1]", "no JSON object"),
        ({"prompt": ["a", "b"]}, 'prompt ["a","b"]: expected a text'), ({"prompt": [1]}, "prompt 1:"),
        ({"input_suffix": {"a": "b" * 1000}}, "bbb: expected a text"), ({"stop": [None]}, "stop [null]:"),
        ({"n_predict": True}, "true: expected a whole number"), ({"n_predict": 1.5}, "n_predict 1.5"),
        ({"n_cmpl": 99}, "n_cmpl 99: expected 1 to 16"), ({"seed": 2**70}, "seed"), ({"top_p": -1}, "top_p"),
        ('{"temperature": NaN}', "temperature NaN: expected 0 to 100"), ({"stream": True}, "stream true:"))],
    (400, "/v1/completions", {"stream": True, "n": 2}, "expected false, but for one completion"),
    (404, "/v1/chat/completions", {}, "or GET /health"), (413, "/infill", bytes(serve.LARGEST + 1), "Length"),
    (404, "/infill", None, "or POST /infill"), (404, "/" + "x" * 1000, None, "xxx: expected")])
def test_a_bad_request_is_refused_in_one_sentence(status, path, body, message, server):
    got = ask(server, path, body)
    assert (got.status, got.content["error"]["code"]) == (status, status)
    assert message in got.content["error"]["message"] and len(got.content["error"]["message"]) < 200


@pytest.mark.parametrize("sent, expected", [
    (b"", b""), (b"GET /hea", b""), (b"hello\r\n\r\n", b"400"), (POST + b"\r\n{}", b" 413 "),
    (b"GET /\xff HTTP/1.1\r\n\r\n", b" 404 "), (POST + b"Content-Length: 9\r\n\r\n{", b""),
    *[(POST + b"Content-Length: %d\r\n\r\n{}" % length, b" 413 ") for length in (-1, 10**8)]])
def test_what_is_no_request_is_refused_and_a_slow_client_left(sent, expected, server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(sent)
        assert ask(server, "/infill", hole(n_predict=1)).status == 200  # meanwhile
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert expected in answer and bool(expected) == bool(answer)


@pytest.mark.parametrize("listens, host, origin, status", [
    ("0.0.0.0", "my-machine:8012", None, 200), ("127.0.0.1", "localhost:1", "http://localhost:1", 200),
    ("0.0.0.0", "10.0.0.9:1", "http://10.0.0.9:1", 200), ("my-pc", "my-pc:1", "http://my-pc:1", 200),
    *[("127.0.0.1", host, "http://evil.example", 403) for host in ("localhost", "evil.example", "")],
    ("127.0.0.1", "localhost.evil.example", "http://localhost.evil.example", 403),
    ("127.0.0.1", "localhost:8012", "http://localhost:3000", 403)])  # another page on this machine
def test_web_pages_of_others_cannot_ask(listens, host, origin, status, server, monkeypatch):
    """Origin is what a browser sends for a page; a foreign Host is a page's own name that leads here."""
    monkeypatch.setattr(server, "host", listens)
    got = ask(server, "/infill", hole(n_predict=1), {"Host": host} | ({"Origin": origin} if origin else {}))
    assert got.status == status and "Access-Control-Allow-Origin" not in got.headers


def test_what_can_be_got(server):
    """The page asks /infill as an editor does, and loads nothing from elsewhere."""
    assert ask(server, "/health").raw == b'{"status":"ok"}'
    assert ask(server, "/v1/models?limit=1").content["data"] == [{"id": "tiny", "object": "model"}]
    page = ask(server, "/")
    assert page.headers["Content-Type"] == "text/html" and page.raw.startswith(b"<!DOCTYPE html>")
    assert {name for name in hole() if b"%s:" % name.encode() in page.raw} == {"input_prefix", "input_suffix"}
    assert b'fetch("/infill"' in page.raw and b"//" not in page.raw


def test_a_model_that_saw_no_gap_continues_and_refuses_holes(server, monkeypatch):
    monkeypatch.delattr(server.model, "prompt")  # sample.load_model gives it to models that infill alone
    assert completions(server, {"prompt": PREFIX})[0]["text"]
    got = ask(server, "/v1/completions", {"prompt": "a", "suffix": "b"})
    assert got.status == 400 and "not trained to infill" in got.content["error"]["message"]


def test_the_command_says_where_it_serves_and_that_a_port_is_taken(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve.Server, "serve_forever", lambda server: print(*server.server_address))
    run, port = save_run(tmp_path / "mine", server.model, server.tok), str(server.server_port)
    free, taken = (run_main(serve.main, capsys, "--ckpt", str(run), "--port", at, "--device", "cpu")
                   for at in ("0", port))
    assert re.fullmatch(r"mine at http://127.0.0.1:(\d+) .*\n127.0.0.1 \1\n", free.out)
    assert taken.code == 1 and f"--port {port}: cannot listen there" in taken.err
