"""The pages for a browser: what they show, against plain runs of the objectives and the model; any text is
harmless in them; they are whole and load nothing."""
import json
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import objectives
from conftest import run_main, save_run, small_model
from data import Tokenizer
from lab import attention, page
from objectives import IGNORE, OBJECTIVES, TEXT, fim_example, fim_prompt, rows_of_every_objective
from sample import load_model

UNIQUE = "abcdefghijklmnopqrstuvwxyz:\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # a character tells its place
PREFIX, SUFFIX = "def mean(xs):\n    total = sum(xs)\n    return total / ", "\n\nprint(mean([1, 2, 3]))\n"


class Page(HTMLParser):
    """A page's data and ids. Fails where elements are not closed in order, an id occurs twice, something
    would be loaded, or the data have a <, which may end their script or keep it from ending."""

    def __init__(self, path):
        super().__init__()
        text = path.read_text("utf-8")
        data = re.fullmatch(r'(?s)<!DOCTYPE html>.* id="data"[^>]*>([^<]*)</script>.*', text)[1]
        assert not re.search(r"\b(src|href|srcset)\b|url\(|@import|fetch|https?:", text.replace(data, ""))
        self.rows, self.open, self.ids = json.loads(data), [], []
        self.feed(text)
        self.close()
        assert self.open == [] and len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.open += [tag] if tag not in ("meta", "input") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=range(12))
def rows(request, tok):
    """(text, tokenizer, {name: (its tokens on the page, inputs, targets of a plain run)}) for a seed."""
    text, tok = (TEXT, tok) if request.param % 2 else (UNIQUE, Tokenizer.bytes())
    on_page = {row["name"]: row["tokens"] for row in page.objective_rows(text, tok, seed=request.param)}
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


def test_an_objective_of_ones_own_may_put_in_any_tokens(tok, monkeypatch):
    noise = np.array([tok.mask, 65]), np.full(2, IGNORE)
    monkeypatch.setitem(OBJECTIVES, "noise", lambda ids, tok, rng: noise)
    tokens = page.objective_rows(TEXT, tok)[-1]["tokens"]
    assert [(token["text"], token["part"], token["target"]) for token in tokens] == [
        ("<MASK>", "mask", None), ("A", "text", None)]


def test_the_command_writes_what_objectives_py_draws(tmp_path, capsys):
    objectives.main()
    sections = capsys.readouterr().out.strip().split("\n\n")
    page.main(["objectives", str(tmp_path / "page.html")])
    drawn = Page(tmp_path / "page.html")
    assert "targets" in drawn.ids  # it is this page's template
    for name, section, row in zip(OBJECTIVES, sections, drawn.rows, strict=True):
        heading, _, *lines = section.splitlines()
        inputs = [text for line in lines if line.startswith("input") for text in line.split()[1:]]
        assert inputs == [token["text"].replace(" ", "·").replace("\n", "⏎") for token in row["tokens"]]
        assert heading == f"{name} {row['knobs']}" and row["name"] == name


@pytest.fixture(scope="module")
def model(tok):
    model = small_model(tok.n_vocab, block_size=128, n_layer=3, n_head=4)
    model.transformer.wte.weight.data[tok.mask] *= 9  # often the likeliest id, which an infill may not have
    return model


def text_of(row, part):
    return "".join(text for text, p in zip(row["tokens"], row["parts"]) if p == part)


@pytest.mark.parametrize("order, spm_layout", [("psm", "joint"), ("spm", "swapped"), ("spm", "labelled"),
                                               ("spm", "joint")])
def test_an_infill_with_its_probabilities_and_attention(order, spm_layout, model, tok):
    model.prompt = partial(fim_prompt, tok=tok, order=order, spm_layout=spm_layout)
    row = page.infill_row(model, tok, PREFIX, SUFFIX)
    assert [text_of(row, part) for part in ("prefix", "suffix")] == [PREFIX, SUFFIX]
    ids = model.prompt(tok.encode(PREFIX), tok.encode(SUFFIX))
    for n in range(len(row["p"])):  # one token more at each turn: nothing later can be seen
        idx = torch.tensor([ids])
        p = model(idx)[0][0, -1].softmax(0).detach().numpy()
        ids.append(int(p[:tok.eot + 1].argmax()))  # no sentinel
        assert (row["p"][n], row["p_eot"][n]) == pytest.approx((p[ids[-1]], p[tok.eot]), abs=1e-4)
        at = np.array(row["attention"])[:, :, n] / 10_000  # (L, H, T)
        expected = np.zeros(at.shape)
        expected[..., :idx.shape[1]] = attention.weights(model, idx)[0, :, :, -1]
        np.testing.assert_allclose(at, expected, atol=0.00006)
    assert row["tokens"] == [tok.names.get(i, tok.decode([i], "backslashreplace")) for i in ids]
    assert row["parts"][-n - 2:] == ["sentinel" if spm_layout != "joint" or order == "psm" else "prefix",
                                     *["middle"] * (n + 1)]
    assert n + 1 == 32 or ids[-1] == tok.eot


def draw(folder, model, tok, *arguments):
    """Runs the command with a run in PSM order in folder -> the page's data."""
    run = save_run(folder / "run", model, tok, "fim_psm")
    page.main(["infill", str(folder / "page.html"), "--ckpt", str(run), *arguments])
    return Page(folder / "page.html").rows


@pytest.mark.parametrize("arguments, shown", [
    (["--prefix", PREFIX, "--suffix", SUFFIX], None), ([], 3), ([], 8)], ids=["typed", "right", "none right"])
def test_the_command_draws_an_infill_before_two_suffixes(arguments, shown, model, tok, tmp_path, monkeypatch):
    """Of a typed text, or of the first of eight functions that is filled rightly, else the last."""
    holes = page.some_holes(9)
    monkeypatch.setattr(page, "passes", lambda text, document: document == "".join(holes[3]) and shown == 3)
    prefix, suffix = arguments[1::2] or holes[shown][::2]
    rows = draw(tmp_path, model, tok, *arguments)
    model, tok, _ = load_model(tmp_path / "run")
    assert rows == [page.infill_row(model, tok, prefix, after) for after in (suffix, holes[0][2])]


def test_any_text_is_harmless_and_visible(model, tmp_path):
    """Even with a vocabulary whose tokens are the marks that end a script, or start one that does not end."""
    marks = ["</script>", "<script>", "<!--"]
    tok = Tokenizer([bytes([i]) for i in range(256)] + [mark.encode() for mark in marks],
                    "|".join([*marks, r"[\s\S]"]))
    visible = "</script><script>alert(1)</script><!--<script> ]]>&lt;{{data}}"
    row, _ = draw(tmp_path, model, tok, "--prefix", visible + "é", "--suffix", visible)
    assert row["tokens"].count("</script>") == 4
    assert text_of(row, "prefix") == visible + r"\xc3\xa9" and text_of(row, "suffix") == visible


@pytest.mark.parametrize("flags, message", [
    ("infill nowhere/a.html --ckpt run --prefix a", "nowhere/a.html"), ("", "required"),
    ("infill page.html --ckpt run", "this model was not trained to infill")])
def test_a_mistake_is_one_line_and_writes_nothing(flags, message, model, tok, tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path / "run", model, tok, "fim" if "nowhere" in flags else "ntp")
    monkeypatch.chdir(tmp_path)
    shown = run_main(page.main, capsys, *flags.split())
    assert shown.code in (1, 2) and message in shown.err and [*tmp_path.iterdir()] == [run]
