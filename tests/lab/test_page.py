"""The pages for a browser: what they show, against plain runs of the objectives and the model; any text is
harmless in them; they are whole, small and load nothing; what pointing and keys do, in a real browser."""
import base64
import json
import re
import shutil
import subprocess
import threading
import zlib
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import objectives
from conftest import save_run, small_model
from data import Tokenizer
from lab import attention, page
from lab.page import OTHER_SUFFIX, draw_infill, draw_objectives, objective_rows
from objectives import IGNORE, OBJECTIVES, TEXT, fim_example, fim_prompt, rows_of_every_objective
from sample import infill

UNIQUE = "abcdefghijklmnopqrstuvwxyz:\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # a character tells its place
PREFIX, SUFFIX = "def mean(xs):\n    total = sum(xs)\n    return total / ", "\n\nprint(mean([1, 2, 3]))\n"


class Page(HTMLParser):
    """A page, read as a browser reads it: its data and the number of its scripts.

    Fails where elements are not closed in order, an id occurs twice, or something would be loaded."""

    def __init__(self, path):
        super().__init__()
        text = path.read_text("utf-8")
        assert text.startswith("<!DOCTYPE html>") and len(text.encode()) <= 300_000
        self.open, self.ids, self.n_scripts, self.json = [], [], 0, ""
        self.feed(text)
        self.close()
        assert self.open == [] and len(set(self.ids)) == len(self.ids)
        self.data = json.loads(self.json)
        for row in self.data["rows"]:
            if "attention" in row:  # an array (L, H, n, T), in ten-thousandths
                row["attention"] = np.array(json.loads(zlib.decompress(base64.b64decode(row["attention"]))))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not attributes.keys() & {"src", "href", "srcset"}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.n_scripts += tag == "script"
        if tag != "meta":
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == ("script", "data"):
            self.json += text
        else:
            assert not re.search(r"url\(|@import|fetch|https?:", text)


# One text under every objective

@pytest.fixture(scope="module", params=range(20))
def rows(request, tok):
    """(text, tokenizer, {name: (its tokens on the page, inputs, targets of a plain run)}) for a seed."""
    text, tok = (TEXT, tok) if request.param % 2 else (UNIQUE, Tokenizer.bytes())
    on_page = {row["name"]: row["tokens"] for row in objective_rows(text, tok, seed=request.param)}
    return text, tok, {name: (on_page[name], inputs, targets) for name, _, inputs, targets in
                       rows_of_every_objective(text, tok, seed=request.param)}


def test_the_page_has_each_objectives_inputs_targets_and_what_the_loss_counts(rows):
    _, tok, rows = rows
    assert rows.keys() == OBJECTIVES.keys()
    for tokens, inputs, targets in rows.values():
        assert [token["id"] for token in tokens] == inputs.tolist()
        assert [token["text"] for token in tokens] == [
            tok.names.get(i, tok.decode([i])) for i in inputs.tolist()]
        assert [token["target"] for token in tokens] == [
            None if i == IGNORE else [tok.names.get(i, tok.decode([i])), i] for i in targets.tolist()]


def test_each_token_knows_its_place_in_the_text_and_a_mask_what_it_hides(rows):
    text, _, rows = rows
    for tokens, *_ in rows.values():
        for token in tokens:
            piece = text[token["start"]:token["end"]]
            assert piece == {"sentinel": "", "mask": token["hides"]}.get(token["part"], token["text"])
            assert (token["hides"] is not None) == (token["part"] == "mask")
    # where letters do not tell the place, neighbours do: NTP is the text in order, MEAP hides its tokens
    places = [(token["start"], token["end"]) for token in rows["ntp"][0]]
    assert [0, *(end for _, end in places)] == [*(start for start, _ in places), len(text)]
    assert [(token["start"], token["end"]) for token in rows["meap"][0]] == places


def test_the_parts_are_those_of_the_fim_example_and_follow_each_other_in_the_text(rows):
    text, tok, rows = rows
    for name in ("fim_psm", "fim_spm", "fim"):
        tokens, inputs, targets = rows[name]
        parts = [[token for token in tokens if token["part"] == part]
                 for part in ("prefix", "middle", "suffix")]
        ids = [[token["id"] for token in part] for part in parts]
        row = [*inputs.tolist(), int(targets[-1])]
        layouts = {"fim_psm": [("psm", "joint")], "fim_spm": [("spm", "swapped")],
                   "fim": [("psm", "joint"), ("spm", "joint")]}[name]
        assert row in [fim_example(*ids, tok, *layout) for layout in layouts]
        in_order = [token for part in parts for token in part]
        assert all(a["end"] == b["start"] for a, b in zip(in_order, in_order[1:]))


def test_prompts_and_answers_are_parts_of_their_own(rows):
    text, _, rows = rows
    prompt, end, answer = text.partition(":\n")
    for part, expected in (("prompt", prompt + end), ("answer", answer)):
        assert "".join(token["text"] for token in rows["sft"][0] if token["part"] == part) == expected


def test_an_objective_of_ones_own_may_put_in_tokens_and_masks_without_a_target(tok, monkeypatch):
    def noise(ids, tok, rng):
        return np.array([tok.mask, 65, tok.mask, *ids[3:-1]]), np.full(len(ids) - 1, IGNORE)

    monkeypatch.setitem(OBJECTIVES, "noise", noise)
    start = [(token["text"], token["part"], token["start"], token["hides"], token["target"])
             for token in objective_rows(TEXT, tok)[-1]["tokens"][:3]]
    first = tok.decode(tok.encode(TEXT)[:1])
    assert start == [("<MASK>", "mask", 0, first, None), ("A", "text", 0, None, None),
                     ("<MASK>", "mask", 0, None, None)]


def test_the_command_writes_what_objectives_py_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)
    objectives.main()
    sections = capsys.readouterr().out.strip().split("\n\n")
    page.main(["objectives", str(tmp_path / "page.html")])
    drawn = Page(tmp_path / "page.html")
    assert drawn.n_scripts == 2 and [row["name"] for row in drawn.data["rows"]] == list(OBJECTIVES)
    for section, row in zip(sections, drawn.data["rows"]):
        heading, loss, *lines = section.splitlines()
        assert heading == f"{row['name']} {row['knobs']}"
        n_counted = sum(token["target"] is not None for token in row["tokens"])
        assert loss == f"loss on {n_counted} targets of {len(row['tokens'])}"
        inputs = [text for line in lines if line.startswith("input") for text in line.split()[1:]]
        assert inputs == [token["text"].replace(" ", "·").replace("\n", "⏎") for token in row["tokens"]]
    assert {token["part"] for row in drawn.data["rows"] for token in row["tokens"]} == {
        "text", "prefix", "middle", "suffix", "prompt", "answer", "sentinel", "mask"}


# What an infill attends to

@pytest.fixture(scope="module")
def model(tok):
    return small_model(tok.n_vocab, block_size=128, n_head=4)


def layout(tok, order, spm_layout):
    return partial(fim_prompt, tok=tok, order=order, spm_layout=spm_layout)


@pytest.fixture
def drawn(tmp_path, model, tok):
    """Draws the page of an infill -> its data."""
    def call(prefix, suffix, model=model, tok=tok, prompt=None, **settings):
        prompt = layout(tok, "spm", "joint") if prompt is None else prompt
        draw_infill(tmp_path / "page.html", model, tok, prefix, suffix, **{"max_new_tokens": 12} | settings,
                    prompt=prompt)
        return Page(tmp_path / "page.html").data
    return call


def text_of(data, part, row=0):
    return "".join(text for text, p in zip(data["rows"][row]["tokens"], data["parts"]) if p == part)


@pytest.mark.parametrize("order, spm_layout", [("psm", "joint"), *(("spm", layout) for layout in (
    "swapped", "labelled", "joint"))])
def test_an_infill_with_its_probabilities_and_attention_before_its_own_and_another_suffix(
        order, spm_layout, drawn, model, tok):
    prompt = layout(tok, order, spm_layout)
    data = drawn(PREFIX, SUFFIX, prompt=prompt, temperature=0.0)
    filled, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=12, prompt=prompt)
    assert tok.decode(data["ids"]) == filled.text
    assert [text_of(data, part) for part in ("prefix", "suffix")] == [PREFIX, SUFFIX]

    prefix, suffix = tok.encode(PREFIX), tok.encode(SUFFIX)
    other = (tok.encode(OTHER_SUFFIX) * 9)[:len(suffix)]
    assert text_of(data, "suffix", row=1) == tok.decode(other) and text_of(data, "prefix", row=1) == PREFIX
    for row, after in zip(data["rows"], (suffix, other)):
        ids = prompt(prefix, after)
        for n, token in enumerate(data["ids"]):  # one token more at each turn: nothing later can be seen
            idx = torch.tensor([ids])
            with torch.no_grad():
                p = model(idx)[0][0, -1].softmax(0).numpy()
            assert (row["p"][n], row["p_eot"][n]) == pytest.approx((p[token], p[tok.eot]), abs=1e-4)
            for layer, heads in enumerate(attention.weights(model, idx)[0, :, :, -1].numpy()):
                for head, expected in enumerate(heads):
                    weights = row["attention"][layer, head, n] / 10_000
                    np.testing.assert_allclose(weights[:len(ids)], expected, atol=0.00006)
                    assert abs(weights[:len(ids)].sum() - 1) < 0.003 and not weights[len(ids):].any()
            ids.append(token)


def test_the_infill_is_drawn_as_sample_draws_it(drawn, model, tok):
    sampling = {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 4}
    filled, = infill(model, tok, PREFIX, SUFFIX, prompt=layout(tok, "spm", "joint"), max_new_tokens=12,
                     **sampling)
    assert tok.decode(drawn(PREFIX, SUFFIX, **sampling)["ids"]) == filled.text


def test_without_a_suffix_there_is_no_other_one(drawn):
    assert len(drawn(PREFIX, "")["rows"]) == 1 and len(drawn("", SUFFIX)["rows"]) == 2


def test_any_text_is_harmless_and_visible(drawn, tmp_path):
    """Even with a vocabulary whose tokens are the marks that end a script, or start one that does not end."""
    marks = ["</script>", "<script>", "<!--"]
    tok = Tokenizer([bytes([i]) for i in range(256)] + [mark.encode() for mark in marks],
                    "|".join([*marks, r"[\s\S]"]))
    visible = "</script><script>alert(1)</script><!--<script> ]]>&lt;{{data}}"
    data = drawn(visible + "\x1b[2J\u202e\0é", visible, tok=tok)
    assert data["rows"][0]["tokens"].count("</script>") == 4
    assert Page(tmp_path / "page.html").n_scripts == 2
    shown = r"\x1b[2J\xe2\x80\xae\x00\xc3\xa9"  # characters of several tokens: byte by byte
    assert text_of(data, "prefix") == visible + shown and text_of(data, "suffix") == visible


def test_a_page_that_would_be_too_large_leaves_out_the_smallest_weights(drawn, tok):
    large = small_model(tok.n_vocab, block_size=256, n_layer=4, n_head=12, n_embd=96)
    data = drawn(PREFIX * 20, SUFFIX * 9, model=large, max_new_tokens=64)
    kept = np.concatenate([row["attention"].ravel() for row in data["rows"]])
    kept = kept[kept > 0] / 10_000
    assert 0 < data["least"] <= kept.min() + 0.00005 and len(kept) > 1000
    assert drawn(PREFIX, SUFFIX)["least"] == 0


# In a browser

COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
CELLS = "[...document.querySelectorAll('section')].map(row => [...row.querySelectorAll('.token')])"


class Browser:
    """A tab of a browser, driven over its DevTools protocol: objects of JSON, a zero byte after each.

    complaints: what the page wrote to the console, its errors, and loads that failed."""

    def __init__(self, program, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,600",
                 f"--user-data-dir={folder}", "--remote-debugging-pipe"]  # it reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null', "sh", program, *flags], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.limit = threading.Timer(300, self.process.kill)  # one that hangs fails the test
        self.limit.start()
        self.session, self.n_calls, self.complaints = {}, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.session = {}
        self.call("Browser.close")
        self.process.wait()
        self.limit.cancel()

    def call(self, method, **params):
        self.n_calls += 1
        call = {"id": self.n_calls, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(call).encode() + b"\0")
        self.process.stdin.flush()
        return self.wait(lambda message: message.get("id") == self.n_calls)["result"]

    def wait(self, is_awaited):
        message = {}
        while not is_awaited(message):
            text = b""
            while not text.endswith(b"\0"):
                byte = self.process.stdout.read(1)
                assert byte, "the browser ended"
                text += byte
            message = json.loads(text[:-1])
            if message.get("method") in COMPLAINTS:
                self.complaints.append(message["params"])
        return message

    def open(self, path):
        """Opens the page -> its data."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")
        while not self.value("document.querySelector('main .token') !== null"):
            assert self.complaints == []  # otherwise it is still unpacking
        return Page(path).data

    def value(self, expression):
        """The value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point_at(self, element):
        x, y = self.value(f"""{element}.scrollIntoView({{block: "center"}}),
            (box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, *keys):
        for key in keys:
            code = {"windowsVirtualKeyCode": 9} if key == "Tab" else {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def tokens(self, name):
        """The (row, index) of each token of this class."""
        return [tuple(place) for place in self.value(f"""{CELLS}.flatMap((cells, row) => cells.flatMap(
            (cell, i) => cell.classList.contains("{name}") ? [[row, i]] : []))""")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = ("google-chrome", "chromium", "chromium-browser", "microsoft-edge")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        pytest.skip("there is no google-chrome, chromium or microsoft-edge to open the pages in")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def shown_objectives(browser, tok, tmp_path):
    draw_objectives(tmp_path / "page.html", TEXT, tok)
    return browser.open(tmp_path / "page.html")["rows"]


def visible(text):
    return text.replace(" ", "·").replace("\n", "⏎")


def same_piece(rows, r, i):
    """The (row, index) of each token that has a character of the text in common with token i of row r."""
    def characters(token):
        return {*range(token["start"], token["end"])}

    here = characters(rows[r]["tokens"][i])
    return [(row, j) for row, _ in enumerate(rows) for j, token in enumerate(rows[row]["tokens"])
            if (row, j) == (r, i) or characters(token) & here]


def test_pointing_at_a_token_lights_its_piece_of_the_text_in_every_row(browser, shown_objectives):
    rows = shown_objectives
    names = [row["name"] for row in rows]
    for name, part in {"ntp": "text", "meap": "mask", "fim_spm": "sentinel", "meap_sft": "answer"}.items():
        r = names.index(name)
        i, token = [(i, token) for i, token in enumerate(rows[r]["tokens"]) if token["part"] == part][-2]
        browser.point_at(f"{CELLS}[{r}][{i}]")
        assert browser.tokens("here") == [(r, i)]
        lit = browser.tokens("lit")
        assert lit == same_piece(rows, r, i)
        notes = browser.value("[...document.querySelectorAll('.note')].map(note => note.textContent)")
        assert [note == "not in this row" for note in notes] == [
            token["end"] > 0 and row not in [row for row, _ in lit] for row in range(len(rows))]
        role = part if part != "mask" else f"mask in place of {visible(token['hides'])}"
        loss = "no target: excluded from the loss" if token["target"] is None else (
            "target {} (id {}), counted by the loss".format(visible(token["target"][0]), token["target"][1]))
        line = f"{visible(token['text'])}: id {token['id']}, {role} in {name}; {loss}"
        assert browser.value("detail.textContent") == line
    assert loss == "no target: excluded from the loss"  # in the copy of meap_sft
    browser.point_at("document.querySelector('h1')")
    assert browser.tokens("lit") == [] and browser.value("detail.textContent") == ""
    assert browser.complaints == []


def test_tab_and_the_arrow_keys_move_along_a_row_and_to_the_same_piece_in_another(browser, shown_objectives):
    rows = shown_objectives

    def press(*keys):
        browser.press(*keys)
        (r, i), = browser.tokens("here")
        assert browser.value(f"document.activeElement === {CELLS}[{r}][{i}]")
        stops = browser.value(f"{CELLS}.map(cells => cells.flatMap((cell, i) => cell.tabIndex ? [] : [i]))")
        assert stops[r] == [i] and all(len(row) == 1 for row in stops)  # Tab stops once a row
        assert browser.tokens("lit") == same_piece(rows, r, i)
        return r, i

    assert press("Tab") == (0, 0) and press("ArrowLeft") == (0, 0)
    assert press("ArrowRight", "ArrowRight") == (0, 2)
    assert press("ArrowDown") == (1, 2)
    assert press("Tab") == (2, 0) and press("Home") == (2, 0)
    assert press("ArrowDown") == (2, 0)  # a sentinel: no piece of the text, so no other row has it
    assert press("End") == (2, len(rows[2]["tokens"]) - 1)
    assert browser.complaints == []


def test_a_token_of_the_infill_shades_what_it_attended_to(browser, drawn, tmp_path):
    drawn(PREFIX, SUFFIX, temperature=0.0)
    data = browser.open(tmp_path / "page.html")
    in_file = [i for part in ("sentinel", "prefix", "middle", "suffix")
               for i, p in enumerate(data["parts"]) if p == part]

    def check(n, layer, head):
        """That the page shows token n of the infill, and what it attended to at this layer and head."""
        assert browser.tokens("here") == [(0, at(n)), (1, at(n))]
        assert browser.value("caption.textContent").endswith(
            f"id {data['ids'][n]}, token {n + 1} of {len(data['ids'])} of the infill")
        colours = browser.value(
            f"{CELLS}.map(cells => cells.map(cell => getComputedStyle(cell).backgroundColor))")
        figures = browser.value("[...figures.rows].map(row => [...row.cells].map(cell => cell.textContent))")
        for row, shades, (title, *percents) in zip(data["rows"], colours, figures):
            weights = np.append(row["attention"][layer, head, n], 0) / 10_000
            opacities = [float(re.fullmatch(r"rgba\(.*, (.*)\)", shade)[1]) for shade in shades]
            np.testing.assert_allclose(np.square(opacities), weights[in_file], atol=0.005)
            sums = [weights[[p == part for p in data["parts"]]].sum()
                    for part in ("prefix", "middle", "suffix", "sentinel")]
            assert title == row["title"]
            assert [float(percent.rstrip("%")) for percent in percents] == pytest.approx(
                [100 * p for p in (row["p"][n], row["p_eot"][n], *sums)], abs=0.051)

    def at(n):
        return in_file.index(len(data["parts"]) - len(data["ids"]) + n)

    check(0, 0, 0)
    browser.point_at(f"{CELLS}[1][{at(3)}]")
    check(3, 0, 0)
    browser.press("Tab", "2", "Tab", "3")  # to the layer, then to the head
    check(3, 1, 2)
    browser.press("Tab", "End")
    check(len(data["ids"]) - 1, 1, 2)
    browser.press("ArrowLeft", "Tab", "ArrowLeft")  # and to the other row
    check(len(data["ids"]) - 3, 1, 2)
    assert browser.complaints == []


# The command line

@pytest.fixture(scope="module")
def run(tmp_path_factory, model, tok):
    return save_run(tmp_path_factory.mktemp("run"), model, tok, "fim")


@pytest.mark.parametrize("order", ["psm", "spm", None])
def test_the_command_draws_an_infill_as_the_model_was_trained_or_as_told(order, run, model, tok, tmp_path, capsys):
    path = tmp_path / "page.html"
    flags = ["--ckpt", str(run), "--max-new-tokens", "9", "--device", "cpu", "--prefix", PREFIX.replace("\n", "\\n")]
    page.main(["infill", str(path), *flags, "--suffix", SUFFIX, *(["--order", order] if order else [])])
    filled, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=9, prompt=layout(tok, order or "spm", "joint"))
    data = Page(path).data
    assert text_of(data, "prefix") == PREFIX and tok.decode(data["ids"]) == filled.text
    assert capsys.readouterr().out.startswith(f"{path}: ")


@pytest.mark.parametrize("flags, message", [
    ("infill page.html --n 2", "--n 2: expected one infill"), ("infill", "FILE.html"), ("", "objectives|infill"),
    ("infill nowhere/page.html", "nowhere/page.html: could not be written (No such file or directory)"),
    ("infill .", ".: could not be written (Is a directory)"),
    ("infill page.html --max-new-tokens 125", "--max-new-tokens 125: the model's context is 128"),
    ("objectives nowhere/page.html", "nowhere/page.html: could not be written"),
    ("objectives page.html --prefix a", "unrecognized arguments: --prefix a")])
def test_a_mistake_is_one_line_and_writes_nothing(flags, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        page.main(flags.split() + ["--ckpt", str(run), "--device", "cpu"] * flags.startswith("infill "))
    shown = capsys.readouterr()
    assert stop.value.code in (1, 2) and shown.err.count("\n") == 1 and shown.out == ""
    assert message in shown.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective, order, message", [
    ("ntp", [], "not trained to infill"), ("fim_psm", ["--order", "spm"], "--order spm: expected")])
def test_a_model_that_cannot_is_refused(objective, order, message, model, tok, tmp_path, capsys):
    run = save_run(tmp_path / objective, model, tok, objective)
    with pytest.raises(SystemExit):
        page.main(["infill", str(tmp_path / "page.html"), "--ckpt", str(run), "--device", "cpu", *order])
    assert message in capsys.readouterr().err and not (tmp_path / "page.html").exists()
