"""Generated corpora whose truth is known, so that a model can be held against an exact answer.

    python train.py --objective fim --data markov --tokenizer bytes          20,000 documents
    python train.py --objective meap --data records:50000 --vocab-size 512   a stated number
    python -m lab.corpora                                                    prints a document of each

    name       a document                                         its truth
    markov     8 to 32 letters, each drawn given the one before   class Markov: entropy, P(next letter) and
                                                                  P(<EOT>) given a suffix
    records    = fox fig   2 to 8 records, a key and a value,     questions(text): what follows each "? key"
               = owl tea   then 8 questions with their answers
               ? fox fig
    rare       one in four is one of records; the others are 13 lines "- fox fig", never asked for
    haystack   2 to 6 records among 4 to 16 lines "- fox fig", never asked for; then 8 questions
    chains     = fox owl   a value may stand one, two or three    questions(text), with the number of hops
               = owl tea   hops away; 4 questions
               ? fox tea
    programs   a short Python function with a docstring and two   passes(text, document): does a text do what
               doctest examples                                   the document does; hole(...): what to fill

A document is a pure function of (name, seed, index). `--data` draws with seed 0; measure with another seed.
"""
import functools
import hashlib
import json
import os
import random
import re
import tempfile
import textwrap
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import trange

from data import is_held_out
from lab import sandbox

ANIMALS = ("ant ape asp bat bee boa cat cod cow cub daw doe dog eel elk emu "
           "ewe fly fox gnu hen hog jay kid koi owl pig pup ram rat sow yak").split()
GIFTS = ("ale bag box bun cap cup egg fan fig gem gin ham hat ice ink jam "
         "key kit map nut oat oil pan pea pen pie pot rum rye tea tie toy").split()
SHORTEST, LONGEST = 8, 32  # documents of markov, in letters
LETTERS = "abcdefghijklmnopqrstuvwxyz"
N_DOCUMENTS = 20_000


class Markov:
    """A language of letters in which each letter depends on the one before: P[a, x] = P(x follows a).

    Each letter has `branches` successors, with probabilities from Dirichlet(1, ..., 1); both are drawn with
    the seed (7 is the first with which every letter is at least 1% of a text). P (n, n); stationary (n,), the
    share of each letter in long texts."""

    def __init__(self, n=26, branches=4, seed=7):
        rng = np.random.default_rng(seed)
        self.P = np.zeros((n, n))
        for row in self.P:
            row[rng.choice(n, branches, replace=False)] = rng.dirichlet(np.ones(branches))
        self.stationary = np.linalg.matrix_power(self.P, 10_000)[0]
        self.cumulative = self.P.cumsum(1).tolist()

    def entropy_rate(self):
        """Bits a letter: sum over a of stationary[a] H(P[a]). No model can do better on a long text."""
        return float(self.stationary @ -(self.P * np.log2(self.P, where=self.P > 0, out=0 * self.P)).sum(1))

    def text(self, rng):
        """8 to 32 letters; each length has the same probability."""
        n, letter = int(rng.integers(SHORTEST, LONGEST + 1)), int(rng.choice(len(self.P), p=self.stationary))
        letters = [letter]
        for u in rng.random(n - 1).tolist():
            letter = min(bisect(self.cumulative[letter], u), len(self.P) - 1)  # rows may sum to 1 - 1e-16
            letters.append(letter)
        return "".join(LETTERS[i] for i in letters)

    def bits(self, text):
        """(len(text) - 1,): -log2 P of each letter after the first, given the one before."""
        letters = [LETTERS.index(c) for c in text]
        return -np.log2(self.P[letters[:-1], letters[1:]])

    def document_bits(self, text):
        """-log2 of the probability of a document: its length, its first letter, its other letters."""
        first = -np.log2(self.stationary[LETTERS.index(text[0])])
        return float(np.log2(LONGEST + 1 - SHORTEST) + first + self.bits(text).sum())

    @functools.cached_property
    def powers(self):
        """(LONGEST + 2, n, n): powers[k][a, s] = P(s follows a, k letters later)."""
        return np.array([np.linalg.matrix_power(self.P, k) for k in range(LONGEST + 2)])

    def infill(self, before, middle, after, prior):
        """The best possible prediction of a middle, by Bayes' rule: (len(middle) + 1, n + 1), the probability
        of each next letter and, in the last column, of <EOT>, once 0, 1, ... letters of it are written.

        Texts: before, the prefix's last letter; middle; after, the suffix's first letter. prior (L,): w_l,
        the probability that a middle has l letters, up to a factor; 0 from L on. With a the last letter
        written, n letters written and s = after,

            P(<EOT>) = w_n P[a, s] / Z,      P(x) = sum over l > n of w_l P[a, x] (P^(l-n))[x, s] / Z,
            Z = sum over l >= n of w_l (P^(l-n+1))[a, s]

        The suffix beyond its first letter, and the prefix before its last, say nothing more. NaN where no
        middle of any length could go on to the suffix."""
        s, out = LETTERS.index(after), []
        letters = [LETTERS.index(c) for c in before + middle]
        for n, a in enumerate(letters):
            w = prior[n:]                                                       # lengths n, n+1, ...
            reach = w[1:] @ self.powers[1:len(w), :, s]                         # (n letters,): sum over l > n
            p = np.append(self.P[a] * reach, w[0] * self.P[a, s] if len(w) else 0)
            with np.errstate(invalid="ignore"):
                out.append(p / p.sum())
        return np.array(out)


MARKOV = Markov()


def lines(rng, sign, n, may_repeat=False):
    """n lines of a sign, an animal and a gift."""
    keys, values = rng.choice(ANIMALS, n, may_repeat), rng.choice(GIFTS, n, may_repeat)
    return [f"{sign} {key} {value}\n" for key, value in zip(keys, values)]


def asked(rng, facts):
    """Eight lines that ask for some of these and answer."""
    return ["?" + facts[i][1:] for i in rng.integers(0, len(facts), 8)]


def records(rng):
    facts = lines(rng, "=", rng.integers(2, 9))
    return "".join(facts + asked(rng, facts))


def rare(rng):
    return records(rng) if rng.random() < 0.25 else "".join(lines(rng, "-", 13, may_repeat=True))


def haystack(rng):
    n, n_others = rng.integers(2, 7), rng.integers(4, 17)
    facts = lines(rng, "=", n)
    shuffled = rng.permutation(facts + lines(rng, "-", n_others, may_repeat=True))
    return "".join([*shuffled, *asked(rng, facts)])


def chains(rng):
    """Four chains of one to three hops; their records are shuffled. Each is asked for once: a second answer
    could be copied from the first."""
    keys, values = rng.permutation(ANIMALS).tolist(), rng.choice(GIFTS, 4, replace=False)
    facts, questions = [], []
    for value in values:
        chain = [keys.pop() for _ in range(rng.integers(1, 4))]
        facts += [f"= {key} {to}\n" for key, to in zip(chain, [*chain[1:], value])]
        questions.append(f"? {chain[0]} {value}\n")
    return "".join([*rng.permutation(facts), *rng.permutation(questions)])


class Question(NamedTuple):
    """A line "? key answer" of records, haystack or chains: text[:start] ends before " answer"."""
    start: int
    answer: str
    hops: int      # records to read, one after the other
    distance: int  # lines from the record that holds the answer
    n_records: int


def questions(text):
    """The questions of a text of records, haystack or chains, with the answers that its records give."""
    facts, found = {}, []
    for number, line in enumerate(re.finditer(r"(.) (\w+) (\w+)", text)):
        sign, key, value = line.groups()
        if sign == "=":
            facts[key] = number, value
        elif sign == "?":
            hops, answer = 0, key
            while answer in facts:
                at, answer = facts[answer]
                hops += 1
            found.append(Question(line.end(2), answer, hops, number - at, len(facts)))
    return found


# programs: tables of what a docstring says and of the code that means it. {x} is the element; {k} and {l} are
# constants. A test: "numbers that are ...", a name, its code, its negation's code.
TESTS = (("even", "even", "{x} % 2 == 0", "{x} % 2 != 0"),
         ("odd", "odd", "{x} % 2 == 1", "{x} % 2 == 0"),
         ("positive", "positive", "{x} > 0", "{x} <= 0"),
         ("negative", "negative", "{x} < 0", "{x} >= 0"),
         ("greater than {k}", "greater", "{x} > {k}", "{x} <= {k}"),
         ("less than {k}", "less", "{x} < {k}", "{x} >= {k}"),
         ("at least {k}", "large", "{x} >= {k}", "{x} < {k}"),
         ("at most {k}", "small", "{x} <= {k}", "{x} > {k}"),
         ("divisible by {k}", "multiples", "{x} % {k} == 0", "{x} % {k} != 0"),
         ("from {k} to {l}", "between", "{k} <= {x} <= {l}", "not {k} <= {x} <= {l}"))
# A change of a number: "each ...", its code. Some are better said with a noun: "the squares of ...".
CHANGES = (("squared", "{x} * {x}"), ("cubed", "{x} ** 3"), ("doubled", "2 * {x}"), ("halved", "{x} // 2"),
           ("negated", "-{x}"), ("without sign", "abs({x})"), ("times {k}", "{x} * {k}"),
           ("divided by {k}", "{x} // {k}"), ("modulo {k}", "{x} % {k}"), ("plus {k}", "{x} + {k}"),
           ("minus {k}", "{x} - {k}"), ("taken from {k}", "{k} - {x}"))
NOUNS = {"squared": "squares", "cubed": "cubes", "without sign": "absolute values"}
# What is made of values: its words; a loop, as the lines before it, the step for a value and what it returns;
# other expressions to return, where kept is the list [{all}]; what a recursion returns ("": there is none),
# where rest is its result for the other elements; of none it returns what the loop starts with. {v}: a value,
# {w}: the same, in brackets where it needs them; {all}: "v for x in xs if ...".
FOLDS = {
    "sum": ("the sum of the {}", "total = 0", "total += {v}", "total",
            ("sum({all})", "sum(kept)"), "rest + {v}"),
    "product": ("the product of the {}", "product = 1", "product *= {v}", "product", (), "rest * {w}"),
    "count": ("the number of {}", "count = 0", "count += 1", "count",
              ("len([{all}])", "len(kept)"), "rest + 1"),
    "max": ("the largest of the {}, or None",
            "best = None", "if best is None or {v} > best:\n    best = {v}", "best",
            ("max([{all}], default=None)", "max(kept, default=None)"), ""),
    "min": ("the smallest of the {}, or None",
            "best = None", "if best is None or {v} < best:\n    best = {v}", "best",
            ("min([{all}], default=None)", "min(kept, default=None)"), ""),
    "list": ("a list of the {}", "out = []", "out.append({v})", "out", ("[{all}]",), "[{v}] + rest"),
    "first": ("the first of the {}, or None", "", "return {v}", "None", ("next(({all}), None)",), ""),
    "last": ("the last of the {}, or None", "last = None", "last = {v}", "last",
             ("kept[-1] if kept else None",), ""),
    "running": ("the running sums of the {}",
                "sums = []\nso_far = 0", "so_far += {v}\nsums.append(so_far)", "sums", (), ""),
    "any": ("whether there are any {}", "", "return True", "False", ("any({test} for {x} in {xs})",), ""),
    "all": ("whether all {}", "", "return False", "True", ("all({test} for {x} in {xs})",), "")}
# The elements: names of the argument and of an element, words, code, and how a recursion begins.
SOURCES = {
    "numbers": ("xs,x numbers,n values,v", "numbers in {a}", "{a}",
                "if not {a}:\n    return {nothing}\n{x} = {a}[0]\nrest = {name}({a}[1:])"),
    "range": ("n,i limit,i", "numbers from 1 to {a}", "range(1, {a} + 1)",
              "if {a} == 0:\n    return {nothing}\n{x} = {a}\nrest = {name}({a} - 1)")}
EXAMPLES = {"numbers": lambda draw, i: [draw.randint(-5, 12) for _ in range(3 - i)],
            "range": lambda draw, i: draw.randint(2, 5),
            "number": lambda draw, i: draw.randint(1, 20) if i else draw.randint(-9, -1)}  # i: which example


def programs(rng):
    """A function of some numbers, of the numbers to n, or of one number; its docstring says what it does and
    shows two examples."""
    draw = random.Random(int(rng.integers(2**63)))
    name, argument, kind, words, body = draw.choices((over_many, piecewise), (10, 2))[0](draw)
    head = f"def {name}({argument})"
    function, shown = function_of(block(head, body)), {}
    for _ in range(20):
        value = EXAMPLES[kind](draw, len(shown))
        if len(shown) < 2 and (result := function(value)) not in (None, [], 0):
            shown[f">>> {name}({value})"] = result
    if len(shown) < 2 or len(words) > 90:  # it hardly ever does anything, or takes too long to say
        return programs(rng)
    examples = "".join(f"{call}\n{result!r}\n" for call, result in shown.items())
    return block(head, f'"""{words[0].upper()}{words[1:]}.\n\n{examples}"""\n{body}\n')


def over_many(draw):
    """A fold over those of some elements that pass a test, each changed, perhaps -> a function's name,
    argument, kind (of EXAMPLES), words and body."""
    kind = draw.choices(tuple(SOURCES), (10, 3))[0]
    names, noun, *code = SOURCES[kind]
    argument, x = draw.choice(names.split()).split(",")
    fold = draw.choice(tuple(FOLDS))
    words, before, step, *_ = FOLDS[fold]
    of_values = "{v}" in step  # else of elements as they are, and those never without a test
    change, value = draw.choice(CHANGES) if of_values and draw.random() >= 0.3 else ("", "{x}")
    claim, part, test, negation = draw.choice(TESTS) if not of_values or draw.random() < 0.7 else [""] * 4
    if fold == "all":
        noun = f"{noun} are {claim}"
    elif claim:
        noun = f"{noun} that are {claim}" if " " in claim else f"{claim} {noun}"
    if change:
        noun = f"{NOUNS[change]} of the {noun}" if change in NOUNS else f"{noun}, each {change}"
    # Two words of what it does, so that the docstring alone tells all of it.
    about = [fold, part, NOUNS.get(change, change).partition(" ")[0], kind]
    name = "_".join(draw.sample([word for word in about if word], 2))
    words, *code = filled(draw, words.format(noun), test, negation, value, *code,
                          a=argument, x=x, name=name, nothing=before.partition(" = ")[2])
    return name, argument, kind, words, draw.choice(bodies(fold, x, *code))


def bodies(fold, x, test, negation, value, xs, recursion):
    """The ways to write a fold: in one line or two, as a loop, by recursion. All but fold is code; test is ""
    where every element passes."""
    _, before, step, result, expressions, grown = FOLDS[fold]
    ways = [("kept = [{all}]\n" if "kept" in text else "") + f"return {text}" for text in expressions]

    if step.count("{v}") > 1 and value != x:
        step = "value = {v}\n" + step.replace("{v}", "value")
    if test:
        step = block(f"if {negation if fold == 'all' else test}", step)
    ways.append(f"{before}\n{block(f'for {x} in {xs}', step)}\nreturn {result}".lstrip())

    if grown:
        if fold == "list" and xs.startswith("range"):
            grown = "rest + [{v}]"  # a range loses its last number, a list its first
        end = block(f"if {test}", f"return {grown}") + "\nreturn rest" if test else f"return {grown}"
        ways.append(f"{recursion}\n{end}")

    each = f"{value} for {x} in {xs} if {test}" if test else f"{value} for {x} in {xs}"
    in_brackets = f"({value})" if " " in value else value
    return [way.format(x=x, xs=xs, test=test, all=each, v=value, w=in_brackets) for way in ways]


def piecewise(draw):
    """One of two changes of a number, by a test; or a change whose result is kept within bounds."""
    a, y = draw.choice(("n", "x", "number")), draw.choice(("y", "result"))
    (first, v), (second, w) = [filled(draw, *change, x=a) for change in draw.sample(CHANGES, 2)]
    if draw.random() < 0.3:
        low, high = draw.randint(-9, 3), draw.randint(4, 20)
        name, words = "clamp", f"return {a} {first}, but at least {low} and at most {high}"
        ways = (f"return max({low}, min({high}, {v}))",
                f"{y} = min({v}, {high})\nreturn max({y}, {low})",
                f"{y} = {v}\nif {y} < {low}:\n    return {low}\n"
                f"if {y} > {high}:\n    return {high}\nreturn {y}")
    else:
        claim, part, test, _ = draw.choice(TESTS)
        claim, test = filled(draw, claim, test, x=a)
        name = f"{draw.choice(('if', 'number', 'change'))}_{part}"
        words = f"return {a} {first} if it is {claim}, else {second}"
        ways = (f"return {v} if {test} else {w}",
                f"if {test}:\n    return {v}\nreturn {w}",
                f"if {test}:\n    {y} = {v}\nelse:\n    {y} = {w}\nreturn {y}")
    return name, a, "number", words, draw.choice(ways)


def filled(draw, *texts, **names):
    """The texts with these names and two constants."""
    names |= {"k": draw.randint(2, 9), "l": draw.randint(10, 15)}
    return [text.format(**names) for text in texts]


def block(head, lines):
    return f"{head}:\n" + textwrap.indent(lines, "    ")


def function_of(source):
    """The function that a source of programs defines. (It runs here and now: give it no model's text.)"""
    namespace = {}
    exec(source, namespace)
    return namespace[source[len("def "):source.index("(")]]


def body_start(document):
    """Where the body of a document of programs begins: the end of its docstring's last line."""
    return document.index('"""\n') + len('"""\n')


# What functions are called with: lists of numbers, integers, positive ones.
DRAW = random.Random(0)
LISTS = [[], *([x] for x in range(-2, 16)),
         *([DRAW.randint(-15, 20) for _ in range(2 + i % 7)] for i in range(22))]
INTEGERS = [*range(-12, 24), -50, 36, 75, 100]
POSITIVE = [*range(1, 25), 27, 30, 36, 48, 59, 64, 77, 90, 100, 108, 139, 205, 246]


def arguments(document):
    """Some 40 arguments for a document's function, of the kind that its first example shows."""
    sign = re.search(r">>> \w+\((.)", document)[1]
    return LISTS if sign == "[" else INTEGERS if sign == "-" else POSITIVE


def key(document):
    """What the function of a document does, as a str: its results for arguments(document). Documents that do
    the same have one key, however they are written, so they share a side of the split."""
    return repr(list(map(function_of(document), arguments(document))))


def held_out_programs(n, seed):
    """n different functions, list[str], none of which does what a function of the training text does. seed:
    another than the training text's 0."""
    found, index = {}, 0
    while len(found) < n:
        text = document("programs", seed, index)
        index += 1
        if is_held_out(key(text)):
            found[text] = None
    return list(found)


def hole(document, kind, rng):
    """Takes a part, never empty, out of the body of a document of programs -> (prefix, middle, suffix), or
    None if there is no such part. kind: "line"; "lines", two or more in a row; "span", any characters in a
    row (FIM, section 4.5). rng draws which."""
    places = [i for i in range(body_start(document), len(document) + 1)
              if kind == "span" or document[i - 1] == "\n"]
    least, most = {"line": (1, 1), "lines": (2, len(places)), "span": (1, len(places))}[kind]
    if len(places) <= least:
        return None
    first = last = 0
    while not least <= last - first <= most:
        first, last = sorted(rng.integers(0, len(places), 2))
    return document[:places[first]], document[places[first]:places[last]], document[places[last]:]


# Runs in the sandbox. A text has the names that a program needs: no import, no print, no exit.
CHECKER = '''
import builtins

NAMES = """abs all any bool divmod enumerate filter int isinstance len list map max min next pow range
reversed set sorted str sum tuple zip""".split()


def check(text, name, results):
    namespace = {"__builtins__": {name: getattr(builtins, name) for name in NAMES}}
    exec(text, namespace)
    return all(repr(namespace[name](argument)) == result for argument, result in results)
'''


def passes(text, document):
    """True if the function in text, the source of a filled document, gives the results of the document's own
    function for each of arguments(document) that the docstring does not show. It runs in sandbox.py."""
    return passes_all([(text, document)])[0]


def passes_all(pairs):
    """[passes(text, document) for text, document in pairs], fifty of them in a process."""
    checks = []
    for text, document in pairs:
        function = function_of(document)
        name = function.__name__
        results = [(argument, repr(function(argument))) for argument in arguments(document)
                   if f">>> {name}({argument})\n" not in document]
        checks.append(f">>> check({text!r}, {name!r}, {results})\nTrue\n")

    def run(checks):
        passed = sandbox.run(CHECKER, "checker", dict(enumerate(checks)), 1 + len(checks), each=0.5).passed
        if passed or len(checks) == 1:
            return list(passed.values()) or [False]
        return [run([check])[0] for check in checks]  # one of them ended the process

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(run, [checks[i:i + 50] for i in range(0, len(checks), 50)]), [])


CORPORA = {"markov": MARKOV.text, "records": records, "rare": rare, "haystack": haystack, "chains": chains,
           "programs": programs}


def documents(name, n, seed):
    """n documents of a corpus, list[str]."""
    return [document(name, seed, index) for index in range(n)]


def document(name, seed, index):
    """The document of a corpus with this number, a str."""
    return CORPORA[name](np.random.default_rng([seed, index]))


def write(source, folder):
    """A --data source, NAME or NAME:N documents -> the path of a .jsonl in folder. Raises ValueError."""
    name, colon, n = source.partition(":")
    n = n if colon else str(N_DOCUMENTS)
    if not re.fullmatch("[1-9][0-9]{0,8}", n):
        raise ValueError(f"--data {source}: expected a number of documents after the colon, "
                         f"such as {name}:{N_DOCUMENTS}")
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = Path(folder, f"{name}-{n}-{version}.jsonl")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
        for index in trange(int(n), desc=f"drawing {name}", leave=False, disable=None):
            text = document(name, 0, index)
            record = {"text": text} | ({"held_out_key": key(text)} if name == "programs" else {})
            f.write(json.dumps(record) + "\n")
    os.replace(f.name, path)
    return path


if __name__ == "__main__":
    for name in CORPORA:
        print(f"--- {name}\n{documents(name, 1, seed=0)[0]}")
