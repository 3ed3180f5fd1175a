"""The pages for a browser: what they show, against plain runs of the objectives and the model; any text is
harmless in them; they are whole, small and load nothing."""
import base64
import json
import re
import zlib
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import objectives
from conftest import run_main, save_run, small_model
from data import Tokenizer
from lab import attention, page
from lab.page import draw_infill, objective_rows, some_holes
from objectives import IGNORE, OBJECTIVES, TEXT, fim_example, fim_prompt, rows_of_every_objective
from sample import infill

UNIQUE = "abcdefghijklmnopqrstuvwxyz:\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # a character tells its place
PREFIX, SUFFIX = "def mean(xs):\n    total = sum(xs)\n    return total / ", "\n\nprint(mean([1, 2, 3]))\n"


class Page(HTMLParser):
    """A page, read as a browser reads it: its data and the number of its scripts. Fails where elements are
    not closed in order, an id occurs twice, or something would be loaded."""

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
        self.open += [(tag, attributes.get("id"))] if tag not in ("meta", "input") else []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        is_data = self.open and self.open[-1] == ("script", "data")
        self.json += text if is_data else ""
        assert is_data or not re.search(r"url\(|@import|fetch|https?:", text)


@pytest.fixture(scope="module", params=range(12))
def rows(request, tok):
    """(text, tokenizer, {name: (its tokens on the page, inputs, targets of a plain run)}) for a seed."""
    text, tok = (TEXT, tok) if request.param % 2 else (UNIQUE, Tokenizer.bytes())
    on_page = {row["name"]: row["tokens"] for row in objective_rows(text, tok, seed=request.param)}
    return text, tok, {name: (on_page[name], inputs, targets) for name, _, inputs, targets in
                       rows_of_every_objective(text, tok, seed=request.param)}


def test_each_token_has_its_ids_and_place_and_a_mask_what_it_hides(rows):
    text, tok, rows = rows
    for tokens, inputs, targets in rows.values():
        assert [token["id"] for token in tokens] == inputs.tolist()
        assert [token["target"] for token in tokens] == [
            None if i == IGNORE else [tok.names.get(i, tok.decode([i])), i] for i in targets.tolist()]
        for token in tokens:
            piece = text[token["start"]:token["end"]]
            assert token["text"] == tok.names.get(token["id"], tok.decode([token["id"]]))
            assert piece == {"sentinel": "", "mask": token["hides"]}.get(token["part"], token["text"])
            assert (token["hides"] is not None) == (token["part"] == "mask")
    # where letters do not tell the place, neighbours do: NTP is the text in order, MEAP hides its tokens
    ntp, meap = ([(token["start"], token["end"]) for token in rows[name][0]] for name in ("ntp", "meap"))
    assert [0, *(end for _, end in ntp)] == [*(start for start, _ in ntp), len(text)] and meap == ntp


def test_the_parts_are_those_of_the_example_and_follow_each_other_in_the_text(rows):
    text, tok, rows = rows
    for name, layouts in {"fim_psm": [("psm", "joint")], "fim_spm": [("spm", "swapped")],
                          "fim": [("psm", "joint"), ("spm", "joint")]}.items():
        tokens, inputs, targets = rows[name]
        parts = [[t for t in tokens if t["part"] == part] for part in ("prefix", "middle", "suffix")]
        ids, in_order = [[token["id"] for token in part] for part in parts], sum(parts, [])
        assert [*inputs.tolist(), int(targets[-1])] in [fim_example(*ids, tok, *layout) for layout in layouts]
        assert all(a["end"] == b["start"] for a, b in zip(in_order, in_order[1:]))
    prompt, end, answer = text.partition(":\n")
    for part, expected in (("prompt", prompt + end), ("answer", answer)):
        assert "".join(token["text"] for token in rows["sft"][0] if token["part"] == part) == expected


def test_an_objective_of_ones_own_may_put_in_tokens_and_masks_without_a_target(tok, monkeypatch):
    noise = np.array([tok.mask, 65, tok.mask]), np.full(3, IGNORE)
    monkeypatch.setitem(OBJECTIVES, "noise", lambda ids, tok, rng: noise)
    tokens = objective_rows(TEXT, tok)[-1]["tokens"]
    assert [(token["text"], token["part"], token["hides"]) for token in tokens if not token["target"]] == [
        ("<MASK>", "mask", tok.decode(tok.encode(TEXT)[:1])), ("A", "text", None), ("<MASK>", "mask", None)]


def test_the_command_writes_what_objectives_py_draws(tmp_path, capsys):
    objectives.main()
    sections = capsys.readouterr().out.strip().split("\n\n")
    page.main(["objectives", str(tmp_path / "page.html")])
    drawn = Page(tmp_path / "page.html")
    assert drawn.n_scripts == 2 and "targets" in drawn.ids
    for name, section, row in zip(OBJECTIVES, sections, drawn.data["rows"], strict=True):
        heading, _, *lines = section.splitlines()
        inputs = [text for line in lines if line.startswith("input") for text in line.split()[1:]]
        assert inputs == [token["text"].replace(" ", "·").replace("\n", "⏎") for token in row["tokens"]]
        assert heading == f"{name} {row['knobs']}" and row["name"] == name


@pytest.fixture(scope="module")
def model(tok):
    return small_model(tok.n_vocab, block_size=128, n_layer=3, n_head=4)


def layout(tok, order, spm_layout):
    return partial(fim_prompt, tok=tok, order=order, spm_layout=spm_layout)


@pytest.fixture
def drawn(tmp_path, model, tok):
    """Draws the page of an infill -> its data."""
    def call(prefix, suffix, model=model, tok=tok, **settings):
        settings = {"max_new_tokens": 12, "prompt": layout(tok, "spm", "joint")} | settings
        draw_infill(tmp_path / "page.html", model, tok, prefix, suffix, **settings)
        return Page(tmp_path / "page.html").data
    return call


def text_of(row, part):
    return "".join(text for text, p in zip(row["tokens"], row["parts"]) if p == part)


@pytest.mark.parametrize("order, spm_layout, sampling", [
    ("psm", "joint", {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 4}), ("spm", "swapped", {}),
    ("spm", "labelled", {}), ("spm", "joint", {})])
def test_an_infill_with_its_probabilities_and_attention_before_its_own_and_another_suffix(
        order, spm_layout, sampling, drawn, model, tok):
    settings = {"prompt": layout(tok, order, spm_layout), "temperature": 0.0} | sampling
    data = drawn(PREFIX, SUFFIX, **settings)
    for row, suffix in zip(data["rows"], (SUFFIX, some_holes()[0][2]), strict=True):
        filled, = infill(model, tok, PREFIX, suffix, max_new_tokens=12, **settings)
        assert tok.decode(row["ids"], "ignore") == filled.text
        assert [text_of(row, part) for part in ("prefix", "suffix")] == [PREFIX, suffix]
        ids = settings["prompt"](tok.encode(PREFIX), tok.encode(suffix))
        for n, token in enumerate(row["ids"]):  # one token more at each turn: nothing later can be seen
            idx = torch.tensor([ids])
            p = model(idx)[0][0, -1].softmax(0).detach().numpy()
            assert (row["p"][n], row["p_eot"][n]) == pytest.approx((p[token], p[tok.eot]), abs=1e-4)
            expected = np.zeros(row["attention"][:, :, n].shape)  # (L, H, T)
            expected[..., :len(ids)] = attention.weights(model, idx)[0, :, :, -1]
            np.testing.assert_allclose(row["attention"][:, :, n] / 10_000, expected, atol=0.00006)
            ids.append(token)
    own = data["rows"][0]
    to_suffix = own["attention"][:, :, 0].mean(1)[:, [part == "suffix" for part in own["parts"][:-1]]]
    assert data["layer"] == to_suffix.max(1).argmax()  # where the page opens


def test_any_text_is_harmless_and_visible(drawn, tmp_path):
    """Even with a vocabulary whose tokens are the marks that end a script, or start one that does not end."""
    marks = ["</script>", "<script>", "<!--"]
    tok = Tokenizer([bytes([i]) for i in range(256)] + [mark.encode() for mark in marks],
                    "|".join([*marks, r"[\s\S]"]))
    visible = "</script><script>alert(1)</script><!--<script> ]]>&lt;{{data}}"
    row = drawn(visible + "\x1b[2J\u202e\0é", visible, tok=tok)["rows"][0]
    assert row["tokens"].count("</script>") == 4
    assert Page(tmp_path / "page.html").n_scripts == 2
    shown = r"\x1b[2J\xe2\x80\xae\x00\xc3\xa9"  # characters of several tokens: byte by byte
    assert text_of(row, "prefix") == visible + shown and text_of(row, "suffix") == visible


def test_a_page_that_would_be_too_large_leaves_out_the_smallest_weights(drawn, tok):
    large = small_model(tok.n_vocab, block_size=256, n_head=16, n_embd=64)
    data = drawn(PREFIX * 9, SUFFIX * 9, model=large, max_new_tokens=64)
    kept = np.concatenate([row["attention"][row["attention"] > 0] for row in data["rows"]]) / 10_000
    assert 0 < data["least"] <= kept.min() + 0.00005 and len(kept) > 1000
    assert drawn("", SUFFIX)["least"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, tok):
    save_run(tmp_path_factory.getbasetemp() / "psm", model, tok, "fim_psm")
    return save_run(tmp_path_factory.getbasetemp() / "both", model, tok, "fim")


@pytest.mark.parametrize("order", ["psm", None])
def test_the_command_draws_an_infill_as_in_training_or_as_told(order, run, model, tok, tmp_path):
    path, prompt = tmp_path / "page.html", layout(tok, order or "spm", "joint")
    page.main(["infill", str(path), "--ckpt", str(run), "--max-new-tokens", "9", "--device", "cpu",
               "--prefix", PREFIX, "--suffix", SUFFIX, *(["--order", order] if order else [])])
    filled, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=9, prompt=prompt)
    assert tok.decode(Page(path).data["rows"][0]["ids"], "ignore") == filled.text


@pytest.mark.parametrize("filled, expected", [([(1, 2)], 0), ([(2, 2), (5, 5)], 2), ([(2, 2), (2, 3)], 2),
                                              ([(2, 2), (2, 3), (5, 5)], 5)])
def test_without_a_text_it_draws_a_function_filled_rightly(filled, expected, tok, tmp_path, monkeypatch):
    """filled: (a hole that the model fills with its own middle, the hole before whose suffix it does so)."""
    (prefixes, middles, suffixes), prompt = zip(*some_holes()), layout(tok, "psm", "joint")
    answers = {tuple(prompt(tok.encode(prefixes[k]), tok.encode(suffixes[of]))): tok.encode(middles[k])
               for k, of in filled}
    monkeypatch.setattr(page, "generate", lambda model, idx, *_, **__: (
        (torch.tensor([i]), torch.zeros(1)) for i in [*answers.get(tuple(idx[0].tolist()), []), tok.eot]))
    run, path = save_run(tmp_path, small_model(tok.n_vocab, 512), tok, "fim_psm"), tmp_path / "page.html"
    page.main(["infill", str(path), "--ckpt", str(run)])
    data, n = Page(path).data, sum(k == of for k, of in filled)
    assert [text_of(data["rows"][0], "prefix"), *(text_of(row, "suffix") for row in data["rows"])] == [
        prefixes[expected], suffixes[expected], suffixes[expected + 1]]
    assert f"{'right' if n else 'wrong'}ly before its own suffix; of 8 tried, {n} are right" in data["about"]


@pytest.mark.parametrize("flags, message", [
    ("infill page.html --n 2", "--n 2: expected one infill"), ("", "infill"),
    ("infill nowhere/a.html --prefix a --ckpt {}/both", "nowhere/a.html: could not be written (No such file"),
    ("infill page.html --ckpt {}/psm --order spm", "--order spm: expected a model of fim or fim_meap"),
    ("objectives page.html --prefix a", "unrecognized arguments: --prefix a")])
def test_a_mistake_is_one_line_and_writes_nothing(flags, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run_main(page.main, capsys, *flags.format(run.parent).split())
    assert shown.code in (1, 2) and message in shown.err and shown.out == "" and not [*tmp_path.iterdir()]
