"""What evaluate.py asks: tasks made of held-out text, or read from the files of public benchmarks.

    needle         ... tabomi = "kerasu"  ... text ...  assert tabomi == "
    records        records = {"tabo": "kera", "mile": "vusa"}  assert records["mile"] == "
    multineedle    ... a = "kerasu"  ... b = a  ... c = b  ... assert c == "

Everything is drawn from a seed, so that each run of one tokenizer gets the same questions. Readers raise
ValueError with the line number where a file is damaged, OSError where there is none.
"""
import ast
import os
import sysconfig
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import EVALUATION_MODULES, lines_of, read_records
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
    """Problems made of the standard library's functions with doctests, at most limit of each kind.

    SingleLine: a line. MultiLine: two lines or more. RandomSpan: between two uniform characters of the body,
    up to ten for each function (the FIM paper's benchmarks, made of HumanEval there). A hole has at most
    `longest` characters, so that a small context holds it; it starts in a line that the doctests run, and
    they fail if it stays empty. All that runs here is Python's own code, whole or with a hole left empty."""
    rng, holes = np.random.default_rng(seed), defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        def each(function, items, desc):
            return tqdm(pool.map(function, items), f"infill: checking {desc}", len(items), unit="module",
                        leave=False)

        for bodies in each(functions_with_doctests, EVALUATION_MODULES, "doctests"):
            for body, ran in bodies:
                text, start, end = body.text, body.start, body.end
                ends = [start + n for n in accumulate(map(len, lines_of(text[start:end])))]
                spans = {"SingleLine": ran, "MultiLine": [(a, e) for a, b in ran for e in ends if e > b],
                         "RandomSpan": np.sort(rng.integers(start, end + 1, (500, 2))).tolist()}
                for kind, places in spans.items():
                    fitting = [(a, b) for a, b in places if 0 < b - a <= longest and text[a:b].strip() and
                               any(first <= a < last for first, last in ran)]
                    for i, (a, b) in enumerate(fitting[:10] if kind == "RandomSpan" else fitting):
                        holes[kind].append(body._replace(task_id=f"{kind}Infilling/{body.task_id}/{i}",
                                                         start=a, end=b))
        chosen = [problems[i] for problems in holes.values() for i in rng.permutation(len(problems))[:limit]]
        modules = {p.module: [q for q in chosen if q.module == p.module] for p in chosen}
        needed = set().union(*each(that_need_filling, list(modules.values()), "holes"))
    return [p for p in chosen if p.task_id in needed]


def functions_with_doctests(file):
    """A file of the standard library -> [(Problem, ran)], of its functions and methods whose docstrings hold
    examples that pass: as hole the body behind the docstring, and (start, end) of each of its lines that the
    examples run."""
    def with_examples(node, prefix=""):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from with_examples(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef) and child.body[1:]:
                if ">>>" in (ast.get_docstring(child) or ""):
                    yield prefix + child.name, child

    text = Path(sysconfig.get_paths()["stdlib"], f"{file}.py").read_text("utf-8")
    module, nodes, bodies = file.removesuffix("/__init__"), dict(with_examples(ast.parse(text))), []
    docstrings = {name: node.body[0].value.value for name, node in nodes.items()}
    outcome = sandbox.run(text, module, docstrings, trace=True, timeout=60)
    starts = list(accumulate(map(len, lines_of(text)), initial=0))
    for name, node in nodes.items():
        if outcome.passed.get(name):
            first, last = node.body[1].lineno, node.end_lineno
            ran = [(starts[line - 1], starts[line]) for line in outcome.lines[name] if first <= line <= last]
            bodies.append((Problem(f"{module}/{name}", text, starts[first - 1], starts[last], "", module,
                                   {name: docstrings[name]}), ran))
    return bodies


def that_need_filling(problems):
    """Problems of one module -> the task_ids of those whose doctests fail while the hole is empty."""
    docstrings = {name: docstring for p in problems for name, docstring in p.docstrings.items()}
    holes = {p.task_id: (p.start, p.end, *p.docstrings) for p in problems}
    outcome = sandbox.run(problems[0].text, problems[0].module, docstrings, holes,
                          timeout=60 + 2 * len(problems))
    return [name for name, passed in outcome.passed.items() if not passed]


def read_file(path, flag, make, expected):
    """The file that a flag names, .jsonl, .json or either .gz -> [make(record)]."""
    made = []
    for place, record in read_records(Path(path), flag):
        try:
            made.append(make(record))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{flag} {path}: {place}: expected {expected}") from None
    return made


def read_problems(path):
    """A file of the public HumanEval infilling benchmarks, .jsonl or .jsonl.gz, as list[Problem]."""
    def problem(r):
        before, through = r["prompt"], r["prompt"] + r["canonical_solution"]
        test = "\n\n" + r["test"] + "\ncheck(" + r["entry_point"] + ")\n"
        return Problem(r["task_id"] + "", through + r["suffix"], len(before), len(through), test)

    return read_file(path, "--problems", problem, "task_id, prompt, suffix, canonical_solution, test and "
                     "entry_point, all texts")


def read_documents(path):
    """A file of Lost in the Middle: list of (prompt, answers, number of documents, position of the gold one
    from 1, or 0). The prompt is that of its authors' code."""
    def question(r):
        texts = [f"Document [{i}](Title: {ctx.get('title', '')}) " + ctx["text"]
                 for i, ctx in enumerate(r["ctxs"], 1)]
        gold = [i for i, ctx in enumerate(r["ctxs"], 1) if ctx.get("isgold")]
        prompt = ("Write a high-quality answer for the given question using only the provided search results "
                  "(some of which might be irrelevant).\n\n" + "\n".join(texts) +
                  "\n\nQuestion: " + r["question"] + "\nAnswer:")
        if not r["answers"] or not all(isinstance(answer, str) for answer in r["answers"]):
            raise TypeError
        return prompt, r["answers"], len(texts), gold[0] if gold else 0

    return read_file(path, "--documents", question, "a question, answers, and ctxs with a text each")


def draws(n, draw):
    """Up to n of what draw() returns, Nones left out; fewer, if 50 n draws do not give as many."""
    return list(islice(filter(None, (draw() for _ in range(50 * n))), n))


def single_line_holes(stream, tok, n, seed, n_prefix=120, n_suffix=80, n_middle=40):
    """n holes in the documents of a stream, each one line, as (prefix, middle, suffix): lists of exactly
    n_prefix, at most n_middle and exactly n_suffix ids. The middle ends with its line end; blank lines are no
    holes. There may be fewer than n (see draws)."""
    rng, ends = np.random.default_rng(seed), np.flatnonzero(stream == tok.eot)
    starts = np.concatenate(([0], ends[:-1] + 1))

    def draw():
        document = rng.integers(len(ends))
        lines = lines_of(tok.decode(stream[starts[document]:ends[document]].tolist()))
        i = rng.integers(max(1, len(lines)))
        if not lines or not lines[i].strip():
            return None
        # 200 lines on either side hold 120 tokens, or the document does not
        parts = lines[max(0, i - 200):i], lines[i:i + 1], lines[i + 1:i + 200]
        prefix, middle, suffix = (tok.encode("".join(part)) for part in parts)
        fits = len(prefix) >= n_prefix and len(suffix) >= n_suffix and len(middle) <= n_middle
        return (prefix[-n_prefix:], middle, suffix[:n_suffix]) if fits else None

    return draws(n, draw) if len(ends) else []


def random_span_holes(stream, tok, n, seed, n_tokens):
    """n texts within a document, cut at two uniform characters as in training: (prefix, middle, suffix) as
    lists of ids, together about n_tokens and never more. The middle is never empty. There may be fewer than n
    (see draws)."""
    rng = np.random.default_rng(seed)

    def draw():
        start = rng.integers(len(stream) - n_tokens)
        ids = stream[start:start + n_tokens].tolist()
        if tok.eot in ids:
            return None
        # ignore: characters that the window cut in two
        parts = split(tok.decode(ids, "ignore"), rng)
        prefix, middle, suffix = (tok.encode(part) for part in parts)
        # a token that was cut may encode longer
        surplus = max(0, len(prefix) + len(middle) + len(suffix) - n_tokens)
        fits = middle and len(suffix) >= surplus
        return (prefix, middle, suffix[:len(suffix) - surplus]) if fits else None

    return draws(n, draw) if len(stream) > n_tokens else []


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


def docstring_questions(stream, tok, limit, seed):
    """(context, four choices, label): a held-out function, and the first lines of four docstrings."""
    functions, stream = [], np.asarray(stream)
    for ids in np.split(stream, np.flatnonzero(stream == tok.eot) + 1):
        text = tok.decode(ids.tolist())
        try:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # no Python
            continue
        lines = lines_of(text)
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
