"""What evaluate.py asks: tasks made of held-out text, or read from the files of public benchmarks.

    infill        functions with a hole, whose doctests judge a completion                stdlib_problems
    stopping      text with a hole: a line, or between two uniform characters             single_line_holes,
                                                                                          random_span_holes
    needle        ... tabomi = "kerasu"  ... text ...  assert tabomi == "                 needle_prompts
    records       records = {"tabo": "kera", "mile": "vusa"}  assert records["mile"] == " records_prompts
    multineedle   ... a = "kerasu"  ... b = a  ... c = b  ... assert c == "               multineedle_prompts
    multidoc      the questions of Lost in the Middle                                     read_documents
    choice        a function without its docstring, and four docstrings                   docstring_questions

Everything is drawn from a seed, so that each checkpoint of one tokenizer gets the same questions. Readers
raise ValueError with the line number where a file is damaged, OSError where there is none.
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

from data import EVALUATION_MODULES, read_records, split_lines
from lab import sandbox
from objectives import split


class Problem(NamedTuple):
    """An infilling problem, as in the public benchmarks: text[start:end], the true solution, is the hole."""
    task_id: str           # kind/module/function/number
    text: str
    start: int
    end: int
    test: str = ""         # Python to run after the text
    module: str = "__main__"
    docstrings: dict = {}  # {name: docstring}, whose examples must then pass

    def passes(self, completion):
        """Whether the tests pass with a completion, which a model wrote, in the hole. Runs in the sandbox."""
        program = self.text[:self.start] + completion + self.text[self.end:] + self.test
        return sandbox.run(program, self.module, self.docstrings).ok


def stdlib_problems(limit, seed, longest=160):
    """Problems made of the standard library's functions with doctests, at most limit of each kind, as
    list[Problem].

    SingleLine: a line. MultiLine: two lines or more. RandomSpan: between two uniform characters of the body,
    up to ten for each function; Light: the first of them. (The kinds are the FIM paper's benchmarks, made of
    HumanEval there.) A hole has at most `longest` characters, so that a small context holds it; it starts in
    a line that the doctests run, and the doctests fail if it stays empty. All that runs here is Python's own
    code, whole or with a hole left empty."""
    rng, holes = np.random.default_rng(seed), defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with_doctests = pool.map(functions_with_doctests, EVALUATION_MODULES)
        n = len(EVALUATION_MODULES)
        for functions in tqdm(with_doctests, "infill: checking doctests", n, unit="module", leave=False):
            for module, text, name, docstring, start, end, ran in functions:
                ends = [start + n for n in accumulate(map(len, split_lines(text[start:end])))]
                spans = {"SingleLine": ran, "MultiLine": [(a, e) for a, b in ran for e in ends if e > b],
                         "RandomSpan": np.sort(rng.integers(start, end + 1, (500, 2))).tolist()}
                for kind, places in spans.items():
                    fitting = [(a, b) for a, b in places if 0 < b - a <= longest and text[a:b].strip() and
                               any(line <= a < line_end for line, line_end in ran)]
                    for number, (a, b) in enumerate(fitting[:10] if kind == "RandomSpan" else fitting):
                        task_id = f"{kind}Infilling/{module}/{name}/{number}"
                        holes[kind].append(Problem(task_id, text, a, b, "", module, {name: docstring}))
        holes["Light"] = [p._replace(task_id=p.task_id.replace("Infilling/", "InfillingLight/"))
                          for p in holes["RandomSpan"] if p.task_id.endswith("/0")]
        chosen = [problems[i] for problems in holes.values() for i in rng.permutation(len(problems))[:limit]]
        modules = {p.module: [q for q in chosen if q.module == p.module] for p in chosen}
        needed = set()
        checked = pool.map(that_need_filling, modules.values())
        for problems in tqdm(checked, "infill: checking holes", len(modules), unit="module", leave=False):
            needed.update(problems)
        return [p for p in chosen if p.task_id in needed]


def functions_with_doctests(file):
    """A file of the standard library -> [(module, source, name, docstring, start, end, ran)], its functions
    and methods whose docstrings hold examples that pass: where in the source the body behind the docstring
    stands, in characters, and (start, end) of each of its lines that the examples run."""
    def with_examples(node, prefix=""):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from with_examples(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef) and child.body[1:]:
                if ">>>" in (ast.get_docstring(child) or ""):
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
    text, module = problems[0].text, problems[0].module
    outcome = sandbox.run(text, module, docstrings, holes, timeout=60 + 2 * len(problems))
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
    problems = []
    for _, r in read_fields(path, "--problems", **dict.fromkeys(fields, str)):
        before, solution = r["prompt"], r["canonical_solution"]
        test = f"\n\n{r['test']}\ncheck({r['entry_point']})\n"
        problems.append(Problem(r["task_id"], before + solution + r["suffix"], len(before),
                                len(before + solution), test))
    return problems


def single_line_holes(stream, tok, n, seed, n_prefix=120, n_suffix=80, n_middle=40):
    """n holes in the documents of a stream, each one line, as (prefix, middle, suffix): lists of exactly
    n_prefix, at most n_middle and exactly n_suffix ids. The middle ends with its line end; blank lines are no
    holes. Fewer than n, if the stream has no more in 50 n draws."""
    rng, holes = np.random.default_rng(seed), []
    ends = np.flatnonzero(stream == tok.eot)
    starts = np.concatenate(([0], ends[:-1] + 1))
    for _ in range(50 * n if len(ends) else 0):
        if len(holes) == n:
            break
        document = rng.integers(len(ends))
        lines = split_lines(tok.decode(stream[starts[document]:ends[document]].tolist()))
        i = rng.integers(max(1, len(lines)))
        if not lines or not lines[i].strip():
            continue
        # 200 lines on either side hold 120 tokens, or the document does not
        parts = lines[max(0, i - 200):i], lines[i:i + 1], lines[i + 1:i + 200]
        prefix, middle, suffix = (tok.encode("".join(part)) for part in parts)
        if len(prefix) >= n_prefix and len(suffix) >= n_suffix and len(middle) <= n_middle:
            holes.append((prefix[-n_prefix:], middle, suffix[:n_suffix]))
    return holes


def random_span_holes(stream, tok, n, seed, n_tokens):
    """n texts within a document, cut at two uniform characters as in training: (prefix, middle, suffix) as
    lists of ids, together about n_tokens and never more. The middle is never empty. Fewer than n, if the
    stream has no more in 50 n draws."""
    rng, holes = np.random.default_rng(seed), []
    for _ in range(50 * n if len(stream) > n_tokens else 0):
        if len(holes) == n:
            break
        start = rng.integers(len(stream) - n_tokens)
        ids = stream[start:start + n_tokens].tolist()
        if tok.eot in ids:
            continue
        parts = split(tok.decode(ids[tok.whole_characters(ids)]), rng)
        prefix, middle, suffix = (tok.encode(part) for part in parts)
        # a token that was cut may encode longer
        surplus = max(0, len(prefix) + len(middle) + len(suffix) - n_tokens)
        if middle and len(suffix) >= surplus:
            holes.append((prefix, middle, suffix[:len(suffix) - surplus]))
    return holes


def invent(rng, n, syllables=3):
    """n distinct names, such as tabomi; 70 ** syllables are possible."""
    names = {}
    while len(names) < n:
        letters = ("bdfgklmnprstvz", "aeiou") * syllables
        names["".join(rng.choice(list(group)) for group in letters)] = None
    return list(names)


def hide(stream, tok, n_tokens, needles, question, rng):
    """A prompt of n_tokens ids: held-out text with needles, {depth: line}, at the line ends nearest to these
    depths (0 to 1), then the question. None where not a third of it would be text."""
    needles = {depth: tok.encode(line) for depth, line in sorted(needles.items())}
    question = tok.encode(question)
    n = n_tokens - len(question) - sum(map(len, needles.values()))
    if n < n_tokens // 3 or len(stream) <= n:
        return None
    start = rng.integers(len(stream) - n)
    text = stream[start:start + n].tolist()
    ends = np.array([0, *(i for i, token in enumerate(text, 1) if tok.decode_bytes([token]).endswith(b"\n"))])
    prompt, copied = [], 0
    for depth, line in needles.items():
        place = max(copied, int(ends[np.abs(ends - depth * n).argmin()]))
        prompt += text[copied:place] + line
        copied = place
    return prompt + text[copied:] + question


DEPTHS = (0, 0.25, 0.5, 0.75, 1)
ROOM = 12  # tokens for an answer, such as kerasu"


def needle_prompts(block_size, tok, stream, limit, seed):
    """Needle in a haystack, as ((length, depth), prompt ids, answer, another value): an assignment in
    held-out text, asked for at its end. limit prompts, over quarters of the context and five depths."""
    rng, questions = np.random.default_rng(seed), []
    cells = [(block_size * quarter // 4, depth) for depth in DEPTHS for quarter in (1, 2, 3, 4)]
    for i in range(limit):
        length, depth = cells[i % len(cells)]
        name, value, other = invent(rng, 3)
        needles, question = {depth: f'{name} = "{value}"\n'}, f'\nassert {name} == "'
        prompt = hide(stream, tok, length - ROOM, needles, question, rng)
        if prompt:
            questions.append(((length, depth), prompt, f'{value}"', f'{other}"'))
    return questions


def records_prompts(block_size, tok, limit, seed):
    """One record among k, as ((k, position), prompt ids, answer, another record's value), like the key-value
    retrieval of Lost in the Middle (Liu et al., 2023). k is 5, 10 and 20, as far as the context goes, with
    limit prompts each."""
    rng, questions = np.random.default_rng(seed), []
    for k, positions in ((5, (1, 3, 5)), (10, (1, 5, 10)), (20, (1, 5, 10, 15, 20))):
        for i in range(limit):
            names = invent(rng, 2 * k, syllables=2)
            keys, values = names[:k], names[k:]
            asked = positions[i % len(positions)] - 1
            other = (asked + rng.integers(1, k)) % k
            records = "".join(f'"{key}": "{value}",\n' for key, value in zip(keys, values))
            prompt = tok.encode(f'records = {{\n{records}}}\nassert records["{keys[asked]}"] == "')
            if len(prompt) <= block_size - ROOM:
                questions.append(((k, asked + 1), prompt, f'{values[asked]}"', f'{values[other]}"'))
    return questions


def multineedle_prompts(block_size, tok, stream, limit, seed):
    """A chain of two or three assignments in held-out text, as ((number, 0), prompt ids, answer, another
    value). The other value stands in the text, too, under another name. limit prompts of each number."""
    rng, questions = np.random.default_rng(seed), []
    for number in (2, 3):
        for _ in range(limit):
            value, other, other_name, *names = invent(rng, 3 + number)
            lines = [f"{name} = {source}\n" for name, source in zip(names, [f'"{value}"', *names])]
            needles = dict(zip(np.sort(rng.random(number)).tolist(), lines))
            needles[rng.random()] = f'{other_name} = "{other}"\n'
            prompt = hide(stream, tok, block_size - ROOM, needles, f'\nassert {names[-1]} == "', rng)
            if prompt:
                questions.append(((number, 0), prompt, f'{value}"', f'{other}"'))
    return questions


def read_documents(path):
    """A file of Lost in the Middle: list of (prompt, answers, number of documents, position of the gold one
    from 1, or 0). The prompt is that of its authors' code."""
    questions = []
    for place, r in read_fields(path, "--documents", question=str, answers=list, ctxs=list):
        if not r["answers"] or not all(isinstance(answer, str) for answer in r["answers"]):
            raise ValueError(f'--documents {path}: {place}: expected "answers" to be texts')
        if not all(isinstance(ctx, dict) and isinstance(ctx.get("text"), str) for ctx in r["ctxs"]):
            raise ValueError(f'--documents {path}: {place}: expected each of "ctxs" to have a "text"')
        gold = [i for i, ctx in enumerate(r["ctxs"], 1) if ctx.get("isgold")]
        texts = [f"Document [{i}](Title: {ctx.get('title', '')}) {ctx['text']}"
                 for i, ctx in enumerate(r["ctxs"], 1)]
        prompt = ("Write a high-quality answer for the given question using only the provided search results "
                  "(some of which might be irrelevant).\n\n" + "\n".join(texts) +
                  f"\n\nQuestion: {r['question']}\nAnswer:")
        questions.append((prompt, r["answers"], len(texts), gold[0] if gold else 0))
    return questions


def docstring_questions(stream, tok, limit, seed):
    """(context, four choices, label): a held-out function, and the first lines of four docstrings."""
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
                head = lines[node.lineno - 1:node.body[0].lineno - 1]
                body = lines[node.body[0].end_lineno:node.end_lineno]
                functions.append(("".join(head + body)[:600], node.name, first))
    rng, questions = np.random.default_rng(seed), []
    docstrings = sorted({first for _, _, first in functions})
    for i in rng.permutation(len(functions))[:limit] if len(docstrings) >= 4 else ():
        code, name, first = functions[i]
        others = [other for other in docstrings if other != first]
        choices = [first, *rng.choice(others, 3, replace=False).tolist()]
        order = rng.permutation(4).tolist()
        questions.append((f'{code}\n{name}.__doc__ = "', [choices[j] for j in order], order.index(0)))
    return questions
