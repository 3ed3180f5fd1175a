"""README's recipe for an objective of one's own, followed to the letter; what README names is there."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TINY = ("--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --block-size 32 --batch-size 2 "
        "--eval-tokens 256 --device cpu --data text.txt --cache-dir cache --out run").split()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A copy of the repository's code, with the function and the line of README's recipe in objectives.py."""
    folder = tmp_path_factory.mktemp("student")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "lab", folder / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("conftest.py", "test_objectives.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    (folder / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(200)), "utf-8")

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    functions = [block for block in blocks if "def meap_run" in block]
    entries = re.findall(r'^ *"meap_run": meap_run,$', README, re.MULTILINE)
    if not functions or not entries:
        pytest.fail('README.md has no ```python block with "def meap_run", or no line "meap_run": meap_run,')
    text = (folder / "objectives.py").read_text("utf-8")
    start = "OBJECTIVES = {\n"
    assert text.count(start) == 1
    text = text.replace(start, f"{functions[0]}\n\n{start}    {entries[0].strip()}\n")
    (folder / "objectives.py").write_text(text, "utf-8")
    return folder


def run(folder, *command):
    result = subprocess.run([sys.executable, "-X", "utf8", *command], cwd=folder, capture_output=True)
    output = (result.stdout + result.stderr).decode("utf-8", "replace")
    assert result.returncode == 0, output
    return output


def test_the_recipes_objective_is_drawn(student):
    sections = run(student, "objectives.py").split("\n\n")
    drawn, = (section for section in sections if section.strip().startswith("meap_run run_ratio=0.15"))
    assert "<MASK>" in drawn


def test_the_recipes_objective_is_trained_with_its_own_flag(student):
    output = run(student, "train.py", "--objective", "meap_run", "--run-ratio", "0.3", "--steps", "5", *TINY)
    assert "meap_run, run_ratio 0.3" in output and (student / "run" / "ckpt.pt").is_file()


def test_the_recipes_objective_keeps_what_every_objective_keeps(student):
    """The tests that run over whatever stands in OBJECTIVES: text, shapes, purity, the drawing."""
    tests = "tests/test_objectives.py"
    output = run(student, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "meap_run", tests)
    assert " passed" in output


def test_what_readme_names_exists():
    """The map's lines, which begin with names of files; the scripts in commands; the targets of links."""
    words = []
    for line in README.splitlines():
        for word in re.split(r"[\s`|]+", line.strip(" `|-*")):
            if not re.fullmatch(r"[\w./-]+(\.py|\.md|/)", word):
                break
            words.append(word)
    scripts = re.findall(r"\bpython ([\w/]+\.py)", README)
    scripts += [module.replace(".", "/") + ".py" for module in re.findall(r"\bpython -m (lab\.\w+)", README)]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link]
    assert {"model.py", "data.py", "objectives.py", "train.py", "sample.py"} <= set(words), "the map"
    folders = [ROOT, *(ROOT / name for name in ("lab", "tests", "docs"))]  # a line may leave its folder out
    missing = [name for name in words if not any((folder / name).exists() for folder in folders)]
    missing += [name for name in scripts + links if not (ROOT / name).exists()]
    assert not missing, f"README.md names what does not exist: {', '.join(sorted(set(missing)))}"
