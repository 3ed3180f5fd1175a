"""README's recipe for an objective of one's own, followed to the letter; what the texts name is there."""
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lab.course import copy_project
from sample import read_arguments
from train import settings_parser

ROOT = Path(__file__).resolve().parent.parent
README, USAGE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/usage.md"))
BLOCK = r"(?s)```\w*\n.*?```"
RECIPE = re.search(r"(?m)```python\n([^`]*^def (\w+)\(ids, tok, rng[^`]*)```", README)
NAME = RECIPE[2] if RECIPE else "no recipe"
TINY = ("--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --block-size 32 --batch-size 2 --steps 3 "
        "--eval-tokens 256 --device cpu --data text.txt --cache-dir cache --out run").split()


def commands():
    """The commands in blocks of sh and in `code`, each as its words."""
    for text in (README, USAGE):
        lines = "".join(re.findall(r"(?s)```sh\n(.*?)```", text)).replace("\\\n", " ").splitlines()
        lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", re.sub(BLOCK, "", text))]
        parts = (part for line in lines for part in line.split(" && "))
        yield from (shlex.split(part, True) for part in parts if re.match("(python|torchrun) ", part))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A copy of the project, with the recipe's function and its line in OBJECTIVES."""
    folder = tmp_path_factory.mktemp("student") / "project"
    copy_project(folder)
    (folder / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(200)), "utf-8")
    assert RECIPE and f'"{NAME}": {NAME},' in README, "README.md has no recipe, or no line for OBJECTIVES"
    before, start, after = (folder / "objectives.py").read_text("utf-8").partition("OBJECTIVES = {\n")
    recipe = f'{RECIPE[1]}\n\n{start}    "{NAME}": {NAME},\n'
    (folder / "objectives.py").write_text(before + recipe + after, "utf-8")
    return folder


def test_the_recipes_objective_is_drawn_trained_with_its_own_flag_and_tested(student):
    """... by the tests, which "run over every entry of OBJECTIVES"."""
    trained = next(words[1:] for words in commands() if NAME in words)  # as README says
    tested = ["-m", "pytest", "-v", "tests/test_objectives.py", "-k", f"{NAME} or script"]
    for arguments in (["objectives.py"], [*trained, *TINY], tested):  # ASCII lacks the sign for a line end
        run = subprocess.run([sys.executable, *arguments], cwd=student, capture_output=True,
                             env=os.environ | {"PYTHONIOENCODING": "ascii"})
        shown = run.stdout.decode()
        assert run.returncode == 0 and NAME in shown, shown + run.stderr.decode()
        assert arguments[0] != "objectives.py" or "<MASK>" in shown.split("\n\n")[0]  # it is drawn first
    assert (student / "run" / "ckpt.pt").is_file()


@pytest.mark.parametrize("words", [words for words in commands() if NAME not in words], ids=shlex.join)
def test_each_command_parses(words):
    """Of the lab and the tests: the script exists. DIR is a checkout of something else."""
    words = [word.replace(".", "/") + ".py" if flag == "-m" else word for flag, word in pairwise(words)]
    script, *arguments = words[[word.endswith(".py") for word in words].index(True):]
    assert (ROOT / script).is_file() or script == "pytest.py" or script.startswith("DIR/")
    if script == "train.py" and "--help" not in arguments:
        settings_parser(dict(pairwise(arguments)).get("--objective", "ntp")).parse_args(arguments)
    elif script == "sample.py":
        read_arguments(arguments)


def test_what_readme_names_exists():
    """Files and folders in the text, and links; not what a command alone names."""
    text = re.sub(r"`([^`]+)`", lambda code: "" if " " in code[1] else code[0], re.sub(BLOCK, "", README))
    names = re.findall(r"(?<![\w/.:-])[\w/-]+\.(?:py|md|png|txt)\b|(?<=`)(?!out|cache)[\w/]+/(?=`)", text)
    names += [link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link]
    folders = ROOT, ROOT / "lab", ROOT / "tests", ROOT / "docs"  # a line may leave its folder out
    assert {"model.py", "data.py", "objectives.py", "train.py", "sample.py"} <= {*names}, "the map"
    assert not [name for name in names if not any((folder / name).exists() for folder in folders)]
