"""The lecture's notebook is the lecture, its cells ran, and what the lecture names is there."""
import json
import os
import re
from pkgutil import resolve_name

import pytest

from lab import claims, notebook
from lab.corpora import CORPORA
from objectives import OBJECTIVES

TEXT = (notebook.DOCS / "lecture.md").read_text("utf-8")
NOTEBOOK = json.loads((notebook.DOCS / "lecture.ipynb").read_text("utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
WORDS = re.sub(r"(?ms)^```.*?^```$", "", TEXT)


def test_the_notebook_has_the_lectures_text_and_code_in_order():
    """Else: python -m lab.notebook"""
    assert CELLS == [(cell["cell_type"], cell["source"]) for cell in notebook.cells(TEXT)]
    joined = "\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in CELLS)
    assert joined.split() == re.sub(r"(?m)^!.*\(lecture/.*\)$", "", TEXT).split()


def test_each_cell_ran_once_from_top_to_bottom():
    """Else: python -m lab.notebook --execute"""
    ran = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == [*range(1, len(ran) + 1)]
    assert not [output for cell in ran for output in cell["outputs"] if output["output_type"] == "error"]


def test_what_the_lecture_names_exists():
    for module, names in re.findall(r"(?m)^from ([\w.]+) import (.+)$", TEXT):
        for name in names.split(", "):
            resolve_name(f"{module}:{name}")
    for name in re.findall(r"`(\w+(?:\.\w+)*)`", WORDS):
        assert name in {*OBJECTIVES, *CORPORA} if "." not in name else resolve_name(name)
    of_claims = [f"claims/{name}.png" for name in (*claims.PICTURES, "verdicts")]
    of_claims += [f"claims.md#{name}" for name in claims.CLAIMS]  # the page is written by a run of hours
    for link in {*re.findall(r"\]\((.*?)\)", WORDS)}.difference(of_claims):
        page, _, anchor = link.partition("#")
        text = (notebook.DOCS / page).read_text("utf-8", "ignore").lower().replace(" ", "-")
        assert not anchor or f"#-{anchor}\n" in text


@pytest.mark.skipif("NANOGAP_NOTEBOOK" not in os.environ, reason="takes minutes: set NANOGAP_NOTEBOOK=1")
def test_all_cells_run():
    pytest.importorskip("nbclient")
    notebook.execute({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": notebook.cells(TEXT)})
