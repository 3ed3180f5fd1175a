"""The real llama.vim in a real Vim, driven by keys in tmux, completes from lab.serve:

    git clone https://github.com/ggml-org/llama.vim
    python tests/lab/try_vim.py llama.vim out/fim_spm

A suggestion appears while one types in a function, Tab takes it, the file holds it, and the function's
doctest passes (with the toy that README trains). It needs Vim 9, tmux and curl. pytest does not run it.
"""
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEFORE = '''def sum_even(xs):
    """The sum of the squares of the even numbers in xs.

    >>> sum_even([2, 3, 4])
    20
    >>> sum_even([5, 6])
    36
    """
    total = 0
    for x in xs:
'''
TYPED, AFTER = "        if x % 2 == 0:", "\n    return total\n"
SOCKET = "nanogap-try-vim"


def tmux(*arguments, check=True):
    command = ["tmux", "-L", SOCKET, *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


def screen():
    return tmux("capture-pane", "-p").rstrip()


def wait_for(condition, seconds=5.0):
    """-> the condition's first true value, or its last one."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def suggestion(typed):
    """What the cursor's line shows after the typed text."""
    line = screen().splitlines()[int(tmux("display-message", "-p", "#{cursor_y}"))]
    return line[len(typed):].strip() if line.startswith(typed) else ""


def main(plugin, run):
    with tempfile.TemporaryDirectory() as folder:
        draft, vimrc = Path(folder, "draft.py"), Path(folder, "vimrc")
        server = subprocess.Popen([sys.executable, "-m", "lab.serve", "--ckpt", run, "--port", "0"],
                                  stdout=subprocess.PIPE, text=True)
        try:
            url, = re.findall(r"http://[\d.]+:\d+", server.stdout.readline())
            draft.write_text(BEFORE + AFTER)
            vimrc.write_text(f"set nocompatible noswapfile nomore\nset runtimepath+={plugin}\n"
                             f"let g:llama_config = {{'endpoint_fim': '{url}/infill', 'show_info': 0}}\n")
            line = BEFORE.count("\n") + 1
            tmux("-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "40",
                 f"vim -u {vimrc} +{line} {draft}")
            wait_for(lambda: "return total" in screen())
            tmux("send-keys", "Enter", f"{line}G", "i")
            typed = ""
            while len(typed) < len(TYPED):  # key by key, until a suggestion appears
                typed += TYPED[len(typed)]
                tmux("send-keys", "-l", typed[-1])
                if typed.strip() and wait_for(lambda typed=typed: suggestion(typed), 1.5):
                    break
            shown = suggestion(typed)
            print(screen(), f"\n\nsuggested after {typed.strip()!r}: {shown!r}")
            tmux("send-keys", "Tab")
            wait_for(lambda: False, 0.5)
            tmux("send-keys", "Escape", ":wq", "Enter")
            wait_for(lambda: not tmux("list-sessions", check=False))
            text = draft.read_text()
            doctest = subprocess.run([sys.executable, "-m", "doctest", draft])
        finally:
            server.terminate()
            tmux("kill-server", check=False)
    print(f"\nthe file, after Tab and :wq:\n\n{text}")
    taken = text.removeprefix(BEFORE + typed).lstrip()
    is_right = shown and taken.startswith(shown) and doctest.returncode == 0
    print("ok" if is_right else "FAILED")
    sys.exit(not is_right)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if missing := [name for name in ("vim", "tmux", "curl") if not shutil.which(name)]:
        sys.exit(f"not at hand: {', '.join(missing)}")
    main(Path(sys.argv[1]).resolve(strict=True), sys.argv[2])
