"""What evaluate.py asks: holes and needles in held-out text, questions of generated corpora, and the files of
public benchmarks. All is drawn from a seed, so that each run of one tokenizer gets the same questions.
"""
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from data import read_records
from lab.corpora import documents, questions
from objectives import split

ROOM = 12  # tokens for an answer, such as kerasu"


def random_span_holes(stream, tok, n, seed, n_tokens, span="char"):
    """n holes in the documents of a stream, cut as in training (objectives.split): [(prefix, middle, suffix)]
    as lists of ids, together at most n_tokens; of a longer document, a part. The middle is never empty. There
    are fewer than n where 50 n draws do not give as many."""
    rng, ends = np.random.default_rng(seed), np.flatnonzero(stream == tok.eot)

    def draw():
        start = int(rng.integers(ends[-1] + 1))  # a place in the text: a long document comes more often
        number = np.searchsorted(ends, start)
        first, end = ends[number - 1] + 1 if number else 0, ends[number]
        start = max(first, min(start, end - n_tokens))
        # ignore: characters that the part cuts in two
        parts = split(tok.decode(stream[start:min(end, start + n_tokens)].tolist(), "ignore"), rng, span)
        prefix, middle, suffix = map(tok.encode, parts)
        # a token that was cut may encode longer
        surplus = max(0, len(prefix) + len(middle) + len(suffix) - n_tokens)
        return (prefix, middle, suffix[:len(suffix) - surplus]) if middle and len(suffix) >= surplus else None

    return list(islice(filter(None, (draw() for _ in range(50 * n))), n)) if len(ends) else []


def needle_prompts(block_size, tok, stream, limit, seed):
    """Needle in a haystack: [((length, depth), prompt ids, answer)], an assignment in held-out text, at the
    line end nearest to a depth (0 to 1), and a question at its end. limit prompts over quarters of the
    context and five depths, fewer where less than a third of one would be text."""
    rng, prompts = np.random.default_rng(seed), []
    cells = [(block_size * quarter // 4, depth) for depth in (0, 0.25, 0.5, 0.75, 1)
             for quarter in (1, 2, 3, 4)]
    for length, depth in islice(cycle(cells), limit):
        name, value = ("".join(rng.choice(list(group)) for group in ("bdfgklmnprstvz", "aeiou") * 3)
                       for _ in range(2))
        needle, question = tok.encode(f'{name} = "{value}"\n'), tok.encode(f'\nassert {name} == "')
        n = length - ROOM - len(needle) - len(question)
        if n < length // 3 or len(stream) <= n:
            continue
        start = rng.integers(len(stream) - n)
        text = stream[start:start + n].tolist()
        ends = [i for i, token in enumerate(text, 1) if tok.decode_bytes([token]).endswith(b"\n")]
        at = min([0, *ends], key=lambda end: abs(end - depth * n))
        prompts.append(((length, depth), text[:at] + needle + text[at:] + question, f'{value}"'))
    return prompts


def record_questions(corpus, block_size, tok, limit, seed):
    """The questions of limit documents of records or chains: [((corpus, hops), prompt ids, answer)], as far
    as the context holds them, by hops."""
    asked = []
    for text in documents(corpus, limit, seed):
        for question in questions(text):
            prompt = [tok.eot, *tok.encode(text[:question.start])]
            if len(prompt) <= block_size - ROOM:
                asked.append(((corpus, question.hops), prompt, f" {question.answer}"))
    return sorted(asked, key=lambda question: question[0])


def read_file(path, flag, make, expected):
    """The file that a flag names, .jsonl, .json or either .gz -> [make(record)]. Raises ValueError with the
    line's number where it is damaged, OSError where there is none."""
    made = []
    for place, record in read_records(Path(path), flag):
        try:
            made.append(make(record))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{flag} {path}: {place}: expected {expected}") from None
    return made


def read_problems(path):
    """A file of the public HumanEval infilling benchmarks: [(task_id, prefix, middle, suffix)], texts."""
    return read_file(path, "--problems", lambda r: tuple(
        r[name] + "" for name in ("task_id", "prompt", "canonical_solution", "suffix")),
        "task_id, prompt, canonical_solution and suffix, all texts")


def read_documents(path):
    """A file of Lost in the Middle: [(prompt, answers)]. The prompt is that of its authors' code."""
    def question(r):
        texts = [f"Document [{i}](Title: {ctx.get('title', '')}) " + ctx["text"]
                 for i, ctx in enumerate(r["ctxs"], 1)]
        prompt = ("Write a high-quality answer for the given question using only the provided search results "
                  "(some of which might be irrelevant).\n\n" + "\n".join(texts) +
                  "\n\nQuestion: " + r["question"] + "\nAnswer:")
        return prompt, [answer + "" for answer in r["answers"]]

    return read_file(path, "--documents", question, "a question, answers, and ctxs with a text each")
