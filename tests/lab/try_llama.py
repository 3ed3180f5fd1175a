"""A run of GPT-2's kind in llama.cpp: exported, taken to GGUF by its own converter, and asked to infill.

    pip install llama-cpp-python transformers gguf sentencepiece     # compiles for ten minutes
    python tests/lab/try_llama.py out/toy_gpt2 path/to/llama.cpp     # a checkout, for convert_hf_to_gguf.py

It prints whether llama.cpp finds the sentinels, encodes text as we do, and greedily writes the tokens that
we write. The converter knows splitting patterns from a list, in which ours is not. Here it is told GPT-2's:
so llama.cpp encodes as we do for a run with `--tokenizer bytes` alone, and prompts go in as ids. pytest does
not run it.
"""
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.evaluate import continuations  # noqa: E402
from lab.gpt2 import save_gpt2  # noqa: E402
from lab.tasks import random_span_holes  # noqa: E402
from data import prepare  # noqa: E402
from objectives import fim_prompt  # noqa: E402
from sample import load_model  # noqa: E402

CONVERT = """import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()"""


def main(run, llama_cpp_folder, n=20, n_tokens=32):
    model, tok, checkpoint = load_model(run)
    order = "psm" if checkpoint["config"]["knobs"]["spm_rate"] < 1 else "spm"
    layout = checkpoint["config"]["knobs"]["spm_layout"]
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(model, tok, folder)
        gguf = Path(folder, "model.gguf")
        subprocess.run([sys.executable, "-c", CONVERT, llama_cpp_folder, folder, "--outfile", str(gguf),
                        "--outtype", "f32"], check=True, capture_output=True)
        import llama_cpp
        llm = llama_cpp.Llama(str(gguf), n_ctx=model.config.block_size, type_k=llama_cpp.GGML_TYPE_F32,
                              type_v=llama_cpp.GGML_TYPE_F32, verbose=False)
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        found = [getattr(llama_cpp, f"llama_vocab_fim_{name}")(vocab) for name in ("pre", "suf", "mid")]
        found, expected = [*found, llm.token_eos()], [tok.pre, tok.suf, tok.mid, tok.eot]
        print(f"<PRE> <SUF> <MID> <EOT>: {found}, ours {expected}")
        _, _, stream = prepare("stdlib", cache_dir="cache", tok=tok)
        holes = random_span_holes(stream, tok, n, 1, model.config.block_size - n_tokens - 4)
        encoded = [llm.tokenize(tok.decode(prefix).encode(), add_bos=False) for prefix, _, _ in holes]
        same = sum(ids == tok.encode(tok.decode(prefix)) for ids, (prefix, _, _) in zip(encoded, holes))
        print(f"{same} of {n} prefixes are encoded to the same ids")
        prompts = [fim_prompt(prefix, suffix, tok, order, layout) for prefix, _, suffix in holes]
        equal = 0
        for prompt, [(ours, _)] in zip(prompts, continuations(model, tok, prompts, n_tokens)):
            llm.reset()
            theirs = []
            for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
                theirs.append(token)
                if token == tok.eot or len(theirs) == n_tokens:
                    break
            equal += theirs == ours
        print(f"{order}, {layout}: {equal} of {n} greedy infills have the same tokens")
        return equal == n and found == expected


if __name__ == "__main__":
    missing = [name for name in ("llama_cpp", "transformers", "gguf") if not importlib.util.find_spec(name)]
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if missing:
        print(f"skipped: needs {', '.join(missing)}")
    else:
        sys.exit(not main(*sys.argv[1:]))
