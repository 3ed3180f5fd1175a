"""What evaluate.py asks: tasks made of held-out text, or read from the files of public benchmarks. No model in here.

    infilling       text with a hole: Python functions whose doctests can judge what is put there   stdlib_problems
    needle          ... text ...  tabomi = "kerasu"  ... text ...  assert tabomi == "               needle_prompts
    multidoc        records = {"tabo": "kera", "mile": "vusa", ...}  assert records["mile"] == "    multidoc_prompts
    multineedle     ... a = "kerasu"  ... b = a  ... c = b  ... text ...  assert c == "             multineedle_prompts
    choice          a function without its docstring, and four docstrings                           docstring_questions

Everything is drawn from a seed, so that each checkpoint of one tokenizer gets the same questions. Readers raise
ValueError with the line number where a file is damaged, OSError where there is none.
"""
import ast
import os
import sysconfig
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import sandbox
from data import EVALUATION_MODULES, read_records, split_lines
from objectives import split_middle


class Problem(NamedTuple):
    """An infilling problem as the public benchmarks have them: text[start:end] is the hole, the canonical solution."""
    task_id: str           # kind/module/function/number
    text: str
    start: int
    end: int
    test: str = ""         # Python to run after the text
    module: str = "__main__"
    docstrings: dict = {}  # {name: docstring}, whose examples must then pass

    def passes(self, completion):
        """Whether the tests pass with the completion in the hole. Runs it, in the sandbox: a model wrote it."""
        program = self.text[:self.start] + completion + self.text[self.end:] + self.test
        return sandbox.run(program, self.module, self.docstrings).ok


def stdlib_problems(limit, seed, most=160):
    """Problems made of the standard library's functions with doctests, at most limit of each kind, as list[Problem].

    SingleLine: a line. MultiLine: two lines or more. RandomSpan: between two uniform characters of the body, up to ten
    for each function; RandomSpanLight: the first of them (FIM, section 2.2; claim 8). A hole has at most `most`
    characters, so that a small context holds it. It starts in a line that the doctests run, and they fail if it stays
    empty: what they do not see they could not judge. All that runs here is Python's own code, and without its holes."""
    rng, holes = np.random.default_rng(seed), defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for functions in tqdm(pool.map(functions_with_doctests, EVALUATION_MODULES), "infill: checking doctests",
                              len(EVALUATION_MODULES), unit="module", leave=False):
            for module, text, name, docstring, start, end, ran in functions:
                ends = [start + n for n in accumulate(map(len, split_lines(text[start:end])))]
                spans = {"SingleLine": ran, "MultiLine": [(a, e) for a, b in ran for e in ends if e > b],
                         "RandomSpan": np.sort(rng.integers(start, end + 1, (500, 2))).tolist()}
                for kind, places in spans.items():
                    fitting = [(a, b) for a, b in places if 0 < b - a <= most and text[a:b].strip() and
                               any(line <= a < line_end for line, line_end in ran)]
                    holes[kind] += [Problem(f"{kind}Infilling/{module}/{name}/{number}", text, a, b, "", module,
                                            {name: docstring})
                                    for number, (a, b) in enumerate(fitting[:10] if kind == "RandomSpan" else fitting)]
        holes["Light"] = [p._replace(task_id=p.task_id.replace("Infilling/", "InfillingLight/"))
                          for p in holes["RandomSpan"] if p.task_id.endswith("/0")]
        chosen = [problems[i] for problems in holes.values() for i in rng.permutation(len(problems))[:limit]]
        modules = {p.module: [q for q in chosen if q.module == p.module] for p in chosen}
        needed = set()
        for problems in tqdm(pool.map(that_need_filling, modules.values()), "infill: checking holes", len(modules),
                             unit="module", leave=False):
            needed.update(problems)
        return [p for p in chosen if p.task_id in needed]


def functions_with_doctests(file):
    """A file of the standard library -> [(module, source, name, docstring, start, end, ran)], its functions and methods
    whose docstrings hold examples that pass: where in the source the body behind the docstring stands, in characters,
    and (start, end) of each of its lines that the examples run."""
    def with_examples(node, prefix=""):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from with_examples(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef) and ">>>" in (ast.get_docstring(child) or "") and child.body[1:]:
                yield prefix + child.name, child

    text = Path(sysconfig.get_paths()["stdlib"], f"{file}.py").read_text("utf-8")
    module, nodes, functions = file.removesuffix("/__init__"), dict(with_examples(ast.parse(text))), []
    docstrings = {name: node.body[0].value.value for name, node in nodes.items()}
    outcome = sandbox.run(text, module, docstrings, trace=True, timeout=60)
    starts = list(accumulate(map(len, split_lines(text)), initial=0))
    for name, node in nodes.items():
        if outcome.passed.get(name):
            first, last = node.body[1].lineno, node.end_lineno
            ran = [(starts[line - 1], starts[line]) for line in outcome.lines[name] if first <= line <= last]
            functions.append((module, text, name, docstrings[name], starts[first - 1], starts[last], ran))
    return functions


def that_need_filling(problems):
    """Problems of one module -> the task_ids of those whose doctests fail while the hole is empty."""
    docstrings = {name: docstring for p in problems for name, docstring in p.docstrings.items()}
    holes = {p.task_id: (p.start, p.end, *p.docstrings) for p in problems}
    outcome = sandbox.run(problems[0].text, problems[0].module, docstrings, holes, timeout=60 + 2 * len(problems))
    return [name for name, passed in outcome.passed.items() if not passed]


def read_fields(path, flag, **types):
    """Yields (place, record) of data.read_records, whose records have the fields that types names."""
    for place, record in read_records(path, flag):
        for name, kind in types.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise ValueError(f'{flag} {path}: {place} has no field "{name}" of type {kind.__name__}')
        yield place, record


def read_problems(path):
    """A file of the public HumanEval infilling benchmarks, .jsonl or .jsonl.gz, as list[Problem]."""
    fields = ("task_id", "prompt", "suffix", "canonical_solution", "test", "entry_point")
    return [Problem(r["task_id"], r["prompt"] + r["canonical_solution"] + r["suffix"], len(r["prompt"]),
                    len(r["prompt"] + r["canonical_solution"]), f"\n\n{r['test']}\ncheck({r['entry_point']})\n")
            for _, r in read_fields(path, "--problems", **dict.fromkeys(fields, str))]


def cut_texts(stream, tok, n, n_tokens, seed):
    """n held-out texts cut at two uniform characters: (prefix, middle, suffix) as ids, together about n_tokens and
    never more, the middle never empty."""
    rng, cuts = np.random.default_rng(seed), []
    for _ in range(50 * n if len(stream) > n_tokens else 0):
        start = rng.integers(len(stream) - n_tokens)
        ids = stream[start:start + n_tokens].tolist()
        if tok.eot in ids:
            continue
        parts = [tok.encode(part) for part in split_middle(tok.decode(ids[tok.whole_characters(ids)]), rng)]
        surplus = max(0, sum(map(len, parts)) - n_tokens)  # a token that was cut may encode longer
        if parts[1] and len(parts[2]) >= surplus:
            cuts.append((parts[0], parts[1], parts[2][:len(parts[2]) - surplus]))
        if len(cuts) == n:
            break
    return cuts


def invent(rng, n, syllables=3):
    """n distinct names, such as tabomi; 70 ** syllables are possible."""
    names = {}
    while len(names) < n:
        names["".join(rng.choice(list(letters)) for letters in ("bdfgklmnprstvz", "aeiou") * syllables)] = None
    return list(names)


def hide(stream, tok, n_tokens, needles, question, rng):
    """A prompt of n_tokens ids: held-out text with needles, {depth: line}, at the line ends nearest to these depths (0
    to 1), then the question. None where not a third of it would be text."""
    needles = {depth: tok.encode(line) for depth, line in sorted(needles.items())}
    question = tok.encode(question)
    n = n_tokens - len(question) - sum(map(len, needles.values()))
    if n < n_tokens // 3 or len(stream) <= n:
        return None
    start = rng.integers(len(stream) - n)
    text = stream[start:start + n].tolist()
    ends = np.array([0, *(i for i, token in enumerate(text, 1) if tok.decode_bytes([token]).endswith(b"\n"))])
    prompt, done = [], 0
    for depth, line in needles.items():
        place = max(done, int(ends[np.abs(ends - depth * n).argmin()]))
        prompt, done = prompt + text[done:place] + line, place
    return prompt + text[done:] + question


DEPTHS = (0, 0.25, 0.5, 0.75, 1)
ROOM = 12  # tokens for an answer, such as kerasu"


def needle_prompts(block_size, tok, stream, limit, seed):
    """Needle in a haystack, as ((length, depth), prompt ids, answer, another value): an assignment in held-out text,
    asked for at its end. limit prompts, over quarters of the context and five depths."""
    rng, made = np.random.default_rng(seed), []
    cells = [(block_size * quarter // 4, depth) for depth in DEPTHS for quarter in (1, 2, 3, 4)]
    for i in range(limit):
        length, depth = cells[i % len(cells)]
        name, value, other = invent(rng, 3)
        prompt = hide(stream, tok, length - ROOM, {depth: f'{name} = "{value}"\n'}, f'\nassert {name} == "', rng)
        made += [((length, depth), prompt, f'{value}"', f'{other}"')] if prompt else []
    return made


def multidoc_prompts(block_size, tok, limit, seed):
    """One record among k, as ((k, position), prompt ids, answer, another record's value): the key-value task of Lost in
    the Middle (Liu et al., 2023, section 3). k is 5, 10 and 20, as far as the context goes, with limit prompts each."""
    rng, made = np.random.default_rng(seed), []
    for k, positions in ((5, (1, 3, 5)), (10, (1, 5, 10)), (20, (1, 5, 10, 15, 20))):
        for i in range(limit):
            names = invent(rng, 2 * k, syllables=2)  # keys, then values
            asked = positions[i % len(positions)] - 1
            other = (asked + rng.integers(1, k)) % k
            records = "".join(f'"{key}": "{value}",\n' for key, value in zip(names[:k], names[k:]))
            prompt = tok.encode(f'records = {{\n{records}}}\nassert records["{names[asked]}"] == "')
            if len(prompt) <= block_size - ROOM:
                made.append(((k, asked + 1), prompt, f'{names[k + asked]}"', f'{names[k + other]}"'))
    return made


def multineedle_prompts(block_size, tok, stream, limit, seed):
    """A chain of two or three assignments in held-out text, as (number, prompt ids, answer, another value). That value
    stands in the text, too, under another name, and limit prompts are made of each number."""
    rng, made = np.random.default_rng(seed), []
    for number in (2, 3):
        for _ in range(limit):
            value, other, other_name, *names = invent(rng, 3 + number)
            lines = [f"{name} = {source}\n" for name, source in zip(names, [f'"{value}"', *names])]
            needles = dict(zip(np.sort(rng.random(number)).tolist(), lines))
            needles[rng.random()] = f'{other_name} = "{other}"\n'
            prompt = hide(stream, tok, block_size - ROOM, needles, f'\nassert {names[-1]} == "', rng)
            made += [(number, prompt, f'{value}"', f'{other}"')] if prompt else []
    return made


def read_documents(path):
    """A file of Lost in the Middle: list of (question, answers, texts, position of the gold one from 1, or 0)."""
    found = []
    for place, r in read_fields(path, "--documents", question=str, answers=list, ctxs=list):
        if not r["answers"] or not all(isinstance(answer, str) for answer in r["answers"]):
            raise ValueError(f'--documents {path}: {place}: expected "answers" to be texts')
        if not all(isinstance(ctx, dict) and isinstance(ctx.get("text"), str) for ctx in r["ctxs"]):
            raise ValueError(f'--documents {path}: {place}: expected each of "ctxs" to have a "text"')
        gold = [i for i, ctx in enumerate(r["ctxs"], 1) if ctx.get("isgold")]
        texts = [f"Document [{i}](Title: {ctx.get('title', '')}) {ctx['text']}" for i, ctx in enumerate(r["ctxs"], 1)]
        found.append((r["question"], r["answers"], texts, gold[0] if gold else 0))
    return found


def docstring_questions(stream, tok, limit, seed):
    """(context, four choices, label): a held-out function without its docstring, and four first lines of docstrings."""
    functions, stream = [], np.asarray(stream)
    for ids in np.split(stream, np.flatnonzero(stream == tok.eot) + 1):
        text = tok.decode(ids.tolist())
        try:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # no Python
            continue
        lines = split_lines(text)
        for node in nodes:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if 20 <= len(first) <= 120 and len(node.body) > 1:
                code = lines[node.lineno - 1:node.body[0].lineno - 1] + lines[node.body[0].end_lineno:node.end_lineno]
                functions.append(("".join(code)[:600], node.name, first))
    rng, questions = np.random.default_rng(seed), []
    docstrings = sorted({first for _, _, first in functions})
    for i in rng.permutation(len(functions))[:limit] if len(docstrings) >= 4 else ():
        code, name, first = functions[i]
        choices = [first, *rng.choice([other for other in docstrings if other != first], 3, replace=False).tolist()]
        order = rng.permutation(4).tolist()
        questions.append((f'{code}\n{name}.__doc__ = "', [choices[j] for j in order], order.index(0)))
    return questions


def read_questions(path):
    """A .jsonl with context, choices and label (the number of the right choice, from 0): list of the three."""
    found = []
    for place, r in read_fields(path, "--questions", context=str, choices=list, label=int):
        if not all(isinstance(choice, str) and choice for choice in r["choices"]):
            raise ValueError(f'--questions {path}: {place}: expected "choices" to be texts')
        if not 0 <= r["label"] < len(r["choices"]):
            raise ValueError(f'--questions {path}: {place}: expected "label" to be 0 to {len(r["choices"]) - 1}')
        found.append((r["context"], r["choices"], r["label"]))
    return found
