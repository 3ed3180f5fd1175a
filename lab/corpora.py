"""Generated corpora whose truth is known, so that a model can be held against an exact answer.

    python train.py --objective fim --data markov --tokenizer bytes          20,000 documents
    python train.py --objective meap --data relay:50000 --vocab-size 512     a stated number
    python -m lab.corpora                                                    prints a document of each

    name       a document                                        its truth
    markov     8 to 32 letters, each drawn given the one before  entropy, P(next letter) and P(<EOT>) given a
                                                                 suffix: class Markov
    relay      17 fox fig owl   line number, giver, gift, taker: errors(text): each statement that is wrong
               18 owl tea hen   the taker gives next; a giver's
               19 hen ...       gift stays the same
    records    = fox fig        2 to 16 records, key and value,  questions(text): what follows each "? key"
               = owl tea        then 4 questions with their
               ? fox fig        answers
    chains     = fox owl        the same, but a value may stand  questions(text), with the number of hops
               = owl tea        one, two or three hops away
               ? fox tea

A document is a pure function of (name, seed, index). `--data` draws with seed 0; measure with another seed.
"""
import functools
import json
import os
import re
import tempfile
from bisect import bisect
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
        powers = [np.eye(len(self.P))]
        for _ in range(LONGEST + 1):
            powers.append(powers[-1] @ self.P)
        return np.array(powers)

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


def markov(rng):
    return MARKOV.text(rng)


def relay(rng):
    animals, gifts = rng.choice(ANIMALS, 8, replace=False), rng.choice(GIFTS, 8, replace=False)
    first, giver, lines = int(rng.integers(1, 60)), 0, []
    for number in range(first, first + int(rng.integers(16, 41))):
        taker = (giver + int(rng.integers(1, 8))) % 8
        lines.append(f"{number} {animals[giver]} {gifts[giver]} {animals[taker]}\n")
        giver = taker
    return "".join(lines)


def records(rng):
    n = int(rng.integers(2, 17))
    keys, values = rng.choice(ANIMALS, n, replace=False), rng.choice(GIFTS, n, replace=False)
    facts = [f"= {key} {value}\n" for key, value in zip(keys, values)]
    return "".join(facts + [f"? {keys[i]} {values[i]}\n" for i in rng.integers(0, n, 4)])


def chains(rng):
    """Four chains of one to three hops; their records are shuffled, and each chain is asked for once."""
    keys, values = rng.permutation(ANIMALS).tolist(), rng.choice(GIFTS, 4, replace=False)
    facts, questions = [], []
    for value in values:
        chain = [keys.pop() for _ in range(rng.integers(1, 4))]
        facts += [f"= {key} {to}\n" for key, to in zip(chain, [*chain[1:], value])]
        questions.append(f"? {chain[0]} {value}\n")
    return "".join([*rng.permutation(facts), *rng.permutation(questions)])


CORPORA = {"markov": markov, "relay": relay, "records": records, "chains": chains}


class Error(NamedTuple):
    """A line of a relay text that is wrong: its number from 0, and in what: form, number, giver or gift."""
    line: int
    what: str


def errors(text):
    """The checker of relay: list[Error] of a text, empty if every line is right given those before it."""
    wrong, gifts, before = [], {}, None
    for i, line in enumerate(text.removesuffix("\n").split("\n") if text else ()):
        match = re.fullmatch(r"(\d+) ([a-z]+) ([a-z]+) ([a-z]+)", line)
        if not match:
            wrong.append(Error(i, "form"))
            before = None
            continue
        number, giver, gift, taker = match.groups()
        if before and int(number) != before[0] + 1:
            wrong.append(Error(i, "number"))
        if before and giver != before[1]:
            wrong.append(Error(i, "giver"))
        if gifts.setdefault(giver, gift) != gift:
            wrong.append(Error(i, "gift"))
        before = int(number), taker
    return wrong


class Question(NamedTuple):
    """A line "? key answer" of records or chains: text[:start] ends before " answer"."""
    start: int
    answer: str
    hops: int      # records to read, one after the other
    distance: int  # lines from the record that holds the answer
    n_records: int


def questions(text):
    """The questions of a text of records or chains, with the answers that its records give."""
    facts, asked, start = {}, [], 0
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        sign, key, *value = line.split()
        if sign == "=":
            facts[key] = number, value[0]
        else:
            hops, answer = 0, key
            while answer in facts:
                at, answer = facts[answer]
                hops += 1
            asked.append(Question(start + len(f"? {key}"), answer, hops, number - at, len(facts)))
        start += len(line)
    return asked


def documents(name, n, seed):
    """n documents of a corpus, list[str]."""
    return [CORPORA[name](np.random.default_rng([seed, index])) for index in range(n)]


def write(source, folder):
    """A --data source, NAME or NAME:N documents -> the path of a .jsonl in folder. Raises ValueError."""
    name, colon, n = source.partition(":")
    n = n if colon else str(N_DOCUMENTS)
    if not re.fullmatch("[1-9][0-9]{0,8}", n):
        raise ValueError(f"--data {source}: expected a number of documents after the colon, "
                         f"such as {name}:{N_DOCUMENTS}")
    path = Path(folder, f"{name}-{n}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
        f.writelines(json.dumps({"text": text}) + "\n"
                     for text in documents(name, int(n), seed=0))
    os.replace(f.name, path)
    return path


if __name__ == "__main__":
    for name in CORPORA:
        print(f"--- {name}\n{documents(name, 1, seed=0)[0]}")
