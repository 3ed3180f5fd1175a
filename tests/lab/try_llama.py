"""A run of GPT-2's kind in llama.cpp: exported, taken to GGUF by its own converter, served by its own server.

    pip install transformers gguf sentencepiece                  # for convert_hf_to_gguf.py
    cmake -B build && cmake --build build -t llama-server        # in a checkout of llama.cpp: ten minutes
    python tests/lab/try_llama.py out/toy_gpt2 path/to/llama.cpp

It prints how many of 20 holes llama-server fills greedily as we do, prompts given as ids and as text. The
converter knows splitting patterns from a list, in which ours is not. Here it is told that of Llama 3, which
differs in endings such as 's and in runs of line ends alone. llama.cpp needs merges: a run with `--tokenizer
bytes` has none. pytest does not run it.
"""
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import prepare  # noqa: E402
from lab.evaluate import continuations  # noqa: E402
from lab.gpt2 import save_gpt2  # noqa: E402
from lab.tasks import random_span_holes  # noqa: E402
from objectives import fim_prompt  # noqa: E402
from sample import load_model  # noqa: E402

CONVERT = """import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
convert_hf_to_gguf.main()"""
URL = "http://127.0.0.1:8013"


def ask(path, **content):
    request = Request(URL + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
    return json.load(urlopen(request, timeout=60))


def wait_for_server():
    for _ in range(300):
        with suppress(URLError):  # it still loads the model
            return urlopen(f"{URL}/health").close()
        time.sleep(0.1)
    sys.exit("llama-server did not answer within 30 s")


def main(run, llama_cpp, n=20, n_tokens=32):
    model, tok, checkpoint = load_model(run)
    layout = checkpoint["config"]["knobs"].get("spm_layout")
    order = "spm" if layout == "labelled" else "psm"  # llama.cpp has no other SPM
    _, _, stream, _ = prepare("stdlib", tok=tok)
    holes = random_span_holes(stream, tok, n, 1, model.config.block_size - n_tokens - 4)
    prompts = [fim_prompt(prefix, suffix, tok, order, layout) for prefix, _, suffix in holes]
    ours = [[i for i in ids if i != tok.eot] for [(ids, _)] in continuations(model, tok, prompts, n_tokens)]
    greedy = {"n_predict": n_tokens, "temperature": 0}
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(model, tok, folder)
        gguf = Path(folder, "model.gguf")
        subprocess.run([sys.executable, "-c", CONVERT, llama_cpp, folder, "--outfile", gguf, "--outtype",
                        "f32"], check=True)
        server = subprocess.Popen(
            [Path(llama_cpp, "build/bin/llama-server"), "-m", gguf, "--port", URL[-4:], "-np", "1", "-c",
             str(model.config.block_size), "-ctk", "f32", "-ctv", "f32", "-fa", "off",
             *["--spm-infill"] * (order == "spm")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_server()
            same_ids = same_text = 0
            for (prefix, _, suffix), prompt, ids in zip(holes, prompts, ours):
                before, after = tok.decode(prefix), tok.decode(suffix)
                by_ids = ask("/completion", prompt=prompt, return_tokens=True, **greedy)["tokens"]
                by_text = ask("/infill", input_prefix=before, input_suffix=after, **greedy)["content"]
                same_ids += [i for i in by_ids if i != tok.eot] == ids
                same_text += by_text == tok.decode(ids)
        finally:
            server.terminate()
            server.wait()
    print(f"{order}: with prompts as ids {same_ids} of {n} greedy infills have our tokens; with "
          f"prompts as text {same_text} have our text")
    return same_ids == n


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(not main(*sys.argv[1:]))
