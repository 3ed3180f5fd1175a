"""lab.fill: what it prints for a file with a hole, and that writing leaves the rest of the file as it was."""
import os

import pytest

from conftest import run_main, save_run, small_model
from lab import fill
from sample import infill, load_model

PREFIX, SUFFIX = "def mean(xs):\n    total = sum(xs)\n    return ", "\n\nprint(mean([1, 2, 3]))\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tok):
    """A run of both orders: an infill is one in SPM."""
    return save_run(tmp_path_factory.mktemp("run"), small_model(tok.n_vocab, 128), tok, "fim")


@pytest.fixture
def cli(run, tmp_path, capsys, monkeypatch):
    """Runs lab.fill among the files of a test: see run_main."""
    monkeypatch.chdir(tmp_path)
    flags = "--ckpt", str(run), "--device", "cpu", "--max-new-tokens", "12"
    return lambda *arguments: run_main(fill.main, capsys, *flags, *arguments)


def expected_infill(run, prefix, suffix, **settings):
    model, tok, _ = load_model(run)
    return infill(model, tok, prefix, suffix, max_new_tokens=12, **settings)


@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\r\n")], ids=["Linux", "Windows"])
def test_the_file_is_printed_with_the_infill_in_its_hole(start, end, cli, run, tmp_path):
    (tmp_path / "draft.py").write_text(f"{start}{PREFIX}<FILL>{SUFFIX}", "utf-8", newline=end)
    best, = expected_infill(run, PREFIX, SUFFIX)
    shown = cli("draft.py")
    assert shown.out == PREFIX + best.text + SUFFIX + "\n"
    assert shown.err == f"({best.ended}, {best.mean_log_p:.2f} nats per token)\n"


def test_several_infills_are_ranked_and_the_best_is_written(cli, run, tmp_path):
    draft = tmp_path / "draft.py"
    draft.write_text(f"{PREFIX}<FILL>{SUFFIX}")
    infills = expected_infill(run, PREFIX, SUFFIX, n=3, temperature=0.8, seed=1)
    shown = cli("draft.py", "--write", "--n", "3")
    assert shown.out == "".join(f"{PREFIX}{sample.text}{SUFFIX}\n" for sample in infills)
    assert shown.err == "".join(f"({sample.ended}, {sample.mean_log_p:.2f} nats per token)\n"
                                for sample in infills
                                ) + f"(written: draft.py; before: {tmp_path}/draft.py.orig)\n"
    assert draft.read_bytes().decode() == PREFIX + infills[0].text + SUFFIX


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["Linux", "Windows"])
def test_writing_an_infill_leaves_the_rest_of_the_file_as_it_was(end, tmp_path):
    """Byte for byte, with its permissions and line ends, also through a link; the old file is kept beside."""
    old = f"\ufeff# é\n{PREFIX}<FILL>{SUFFIX}".replace("\n", end).encode()
    draft, link = tmp_path / "draft.py", tmp_path / "link.py"
    draft.write_bytes(old)
    draft.chmod(0o755)
    link.symlink_to(draft)
    (tmp_path / "draft.py.orig").write_text("of an earlier hole")
    kept = fill.write_infill(link, " / len(xs)\n# ½\n")
    assert draft.read_bytes() == old.replace(b"<FILL>", f" / len(xs){end}# ½{end}".encode())
    assert draft.stat().st_mode & 0o777 == 0o755 and link.is_symlink()
    assert kept == f"{tmp_path}/draft.py.orig1" and (tmp_path / "draft.py.orig1").read_bytes() == old
    assert (tmp_path / "draft.py.orig").read_text() == "of an earlier hole"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(step, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "draft.py").write_text("x = <FILL>\n")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        fill.write_infill(tmp_path / "draft.py", "1")
    assert (tmp_path / "draft.py").read_text() == "x = <FILL>\n"


@pytest.mark.parametrize("arguments, code, message", [
    ("zero.py", 2, "zero.py: expected one <FILL> where the hole is, found 0"), ("two.py", 2, "found 2"),
    ("latin.py", 2, "latin.py: expected UTF-8 text"), ("missing.py", 1, "missing.py"), ("", 2, "FILE")])
def test_a_mistake_is_one_line(arguments, code, message, cli, tmp_path):
    for name, text in {"zero": "x", "two": "<FILL>\n<FILL>", "latin": "é<FILL>"}.items():
        (tmp_path / f"{name}.py").write_text(text, "latin-1")
    shown = cli(*arguments.split())
    assert shown.code == code and message in shown.err and not shown.out
