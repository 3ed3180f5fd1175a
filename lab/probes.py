"""What claims.py measures on generated text, during training and at its end.

A probe is a function (model, tok, knobs, is_last) -> {name: number, or a list for a figure}; knobs are those
of the objective. Training draws documents with seed 0, probes with other seeds. The figure bayes_X is the
exact value of X. "learned": the model has learned what its run is about, and the run may end.
"""
import math
from collections import defaultdict
from functools import lru_cache, partial

import numpy as np

from data import is_held_out, lines_of, load_documents
from lab.attention import compare, received, shares
from lab.corpora import (LETTERS, LONGEST, MARKOV, SHORTEST, documents, held_out_programs, hole, passes_all,
                         questions)
from lab.evaluate import continuations, score
from objectives import fim_prompt, mask, split
from sample import best_first

ORDERS = ("psm", "spm")


def bits(scores):
    """Scores -> the bits of all tokens of their continuations."""
    return -sum(s.log_p.sum() for s in scores) / math.log(2)


def on_markov(model, tok, knobs, is_last):
    """excess: bits per token of plain documents above those of their probabilities; and what middles returns,
    in both orders, of a model trained on one at least, SPM as it was trained or joint.

    Whether a document is plain or a FIM example is a coin in training, and the model learns its odds. Its
    bits for the coin, -log2(1 - P(<PRE>)), are kept apart: excess is without them, as is generation, which
    leaves the sentinels out."""
    texts = documents("markov", 500, seed=1)
    scores = score(model, [([tok.eot], [*tok.encode(text), tok.eot]) for text in texts], tok.pre)
    coin = -sum(np.log2(1 - np.exp(s.watched)).sum() for s in scores)
    n_tokens = sum(len(text) + 1 for text in texts)
    out = {"excess": (bits(scores) - coin - sum(map(MARKOV.document_bits, texts))) / n_tokens,
           "coin": coin / n_tokens}
    for order in ORDERS if "fim_rate" in knobs else ():
        out |= middles(model, tok, order, knobs.get("spm_layout", "joint"), is_last)
    return out


@lru_cache
def markov_holes(n):
    """n holes as in training, with at least a letter of prefix and of suffix: [(prefix, middle, suffix)]."""
    rng = np.random.default_rng(1)
    holes = [split(text, rng) for text in documents("markov", 4 * n, seed=2)]
    return [(prefix, middle, suffix) for prefix, middle, suffix in holes if prefix and suffix][:n]


def length_prior(n_prefix, n_suffix, is_joint):
    """w (L,): the prior of a middle's length l, up to a factor, given the lengths of prefix and suffix.

    A document of t = n_prefix + l + n_suffix letters, t uniform from SHORTEST to LONGEST, is cut at two
    independent, uniform places of its t + 1. In joint SPM, prefix and middle stand side by side, and any of
    their places may have been the first cut. (In training, one example of some five crosses the end of its
    row and has lost the end of its suffix; for that one the model can know less than this says.)"""
    lengths = np.arange(max(0, LONGEST - n_prefix - n_suffix) + 1)
    t = n_prefix + lengths + n_suffix
    ways = 2 * (n_prefix + lengths) + 1 if is_joint else np.where(lengths, 2, 1)
    return np.where((SHORTEST <= t) & (t <= LONGEST), ways / (t + 1.0) ** 2, 0.0)


def middles(model, tok, order, spm_layout, is_last, n=200):
    """A model against Bayes' rule (corpora.Markov.infill) in the same holes -> {name: value}. The names after
    "psm_" or "spm_":

        end, elsewhere     P(<EOT>) at the true end, and before each letter of the middle
        another            P(<EOT>) at the true end, before the suffix of another document
        middle             bits of the middle and its <EOT> above Bayes' rule, per token
        saved              bits of a middle and its <EOT> that the suffix's text saves
        example            bits of the whole example above those of its text, per letter
        scatter            P(<EOT>) wherever a letter of a middle stands or would stand: [exact, model's]"""
    is_joint, holes, letters = order == "spm" and spm_layout == "joint", markov_holes(n), tok.encode
    prompt = partial(fim_prompt, tok=tok, order=order, spm_layout=spm_layout)

    def predictions(holes):
        """Each hole's Score of middle and <EOT>, and Bayes' rule's probabilities (len(middle) + 1, 27)."""
        pairs = [([tok.eot, *prompt(letters(prefix), letters(suffix))], [*letters(middle), tok.eot])
                 for prefix, middle, suffix in holes]
        priors = [length_prior(len(prefix), len(suffix), is_joint) for prefix, _, suffix in holes]
        return score(model, pairs, tok.eot), [MARKOV.infill(prefix[-1], middle, suffix[0], prior)
                                              for (prefix, middle, suffix), prior in zip(holes, priors)]

    scores, exact = predictions(holes)
    p_model, p_exact = [np.exp(s.watched) for s in scores], [p[:, -1] for p in exact]
    out = {}
    for kind, p in (("", p_model), ("bayes_", p_exact)):
        out[f"{kind}{order}_end"] = np.mean([each[-1] for each in p])
        out[f"{kind}{order}_elsewhere"] = np.concatenate([each[:-1] for each in p]).mean()
    changed = [(prefix, middle, other) for (prefix, middle, _), (_, _, other)
               in zip(holes, holes[1:] + holes[:1])]
    ends = [(np.exp(s.watched[-1]), p[-1, -1]) for s, p in zip(*predictions(changed))
            if np.isfinite(p[-1, -1])]  # else no document has this prefix, middle and suffix
    out[f"{order}_another"], out[f"bayes_{order}_another"] = np.mean(ends, axis=0)

    n_letters, given = sum(len(middle) for _, middle, _ in holes), bits(scores)  # of middle and <EOT>
    exact_given = -sum(np.log2(p[range(len(middle) + 1), [*map(LETTERS.index, middle), -1]]).sum()
                       for p, (_, middle, _) in zip(exact, holes))
    out[f"{order}_middle"] = (given - exact_given) / (n_letters + len(holes))
    # Without the suffix's text: letters as they follow the prefix in plain text, the length from the prior.
    plain = score(model, [([tok.eot, *letters(prefix)], letters(middle)) for prefix, middle, _ in holes],
                  tok.eot)
    alone = bits(plain) + sum(np.log2(1 - np.exp(s.watched)).sum() for s in plain)
    exact_alone, for_length = sum(MARKOV.bits(prefix[-1] + middle).sum() for prefix, middle, _ in holes), 0
    for prefix, middle, suffix in holes:
        prior = length_prior(len(prefix), len(suffix), is_joint)
        for_length -= np.log2(prior[len(middle)] / prior.sum())
    out[f"{order}_saved"] = (alone + for_length - given) / len(holes)
    out[f"bayes_{order}_saved"] = (exact_alone + for_length - exact_given) / len(holes)
    example = bits(score(model, [([tok.eot], [*prompt(letters(p), letters(s)), *letters(m), tok.eot])
                                 for p, m, s in holes]))
    text = bits(score(model, [([tok.eot], letters(p + m + s)) for p, m, s in holes]))
    out[f"{order}_example"] = (example - text) / sum(len(p + m + s) for p, m, s in holes)
    if is_last:
        out[f"{order}_scatter"] = [np.concatenate(p).round(4).tolist() for p in (p_exact, p_model)]
    return out


def on_stdlib(model, tok, knobs, is_last):
    """bits: bits per byte of the beginnings of held-out documents; the coin is apart, as in on_markov."""
    rows = [tok.encode(text)[:model.config.block_size] for text in held_out_stdlib()]
    scores = score(model, [([tok.eot], ids) for ids in rows], tok.pre)
    coin = -sum(np.log2(1 - np.exp(s.watched)).sum() for s in scores)
    n_bytes = tok.n_bytes[np.concatenate(rows)].sum()
    return {"bits": (bits(scores) - coin) / n_bytes, "coin": coin / n_bytes}


@lru_cache
def held_out_stdlib():
    return [text for text in load_documents("stdlib") if is_held_out(text)]


def on_programs(model, tok, knobs, is_last, n=150):
    """At the end, of a model trained in SPM order: pass rates of greedy infills in held-out functions, of a
    line, lines and a span (corpora.hole). Of a line also the mean of eight samples at temperature 0.8, and
    the best of them, by EOT-aware ranking and by likelihood alone."""
    if not is_last:
        return {}
    out, rng = {}, np.random.default_rng(2)
    texts = held_out_programs(n, seed=1)
    prompt = partial(fim_prompt, tok=tok, order="spm", spm_layout=knobs["spm_layout"])
    for kind in ("line", "lines", "span"):
        holes = [(text, cut) for text in texts if (cut := hole(text, kind, rng))]
        prompts = [prompt(tok.encode(p), tok.encode(s)) for _, (p, _, s) in holes]

        def rate(infills, holes=holes):
            """The share of holes that these texts fill so that the function does what it should."""
            return np.mean(passes_all([(p + infill + s, text) for infill, (text, (p, _, s))
                                       in zip(infills, holes)]))

        greedy = continuations(model, tok, prompts, 80)
        out[kind] = rate([best_first(samples, tok)[0].text for samples in greedy])
        if kind == "line":
            drawn = continuations(model, tok, prompts, 80, 8, 0.8)
            ranked = [best_first(samples, tok) for samples in drawn]
            out["sample"] = np.mean([rate([infills[i].text for infills in ranked]) for i in range(8)])
            out["best"] = rate([infills[0].text for infills in ranked])
            out["likeliest"] = rate([max(infills, key=lambda sample: sample.mean_log_p).text
                                     for infills in ranked])
    return out


def on_questions(model, tok, knobs, is_last, corpus, enough=0.8):
    """Questions answered, as a share: all (recall), those of several hops, and far: of those whose record is
    in the farther half. wrong: the share of answers, drawn at temperature 1, that are not the record's.
    learned: a share of `enough` is answered, of all and of those far away."""
    texts = documents(corpus, 100, seed=1)
    rows = [tok.encode(text)[:model.config.block_size] for text in texts]
    results = []
    for text, ids, s in zip(texts, rows, score(model, [([tok.eot], ids) for ids in rows])):
        for q in questions(text):
            start = len(tok.encode(text[:q.start]))
            end = len(tok.encode(text[:q.start] + " " + q.answer))
            if end <= len(ids):  # within the context
                is_right = bool((s.likeliest[start:end] == ids[start:end]).all())
                results.append((q, is_right, s.log_p[start:end].sum()))
    half = np.median([q.distance for q, *_ in results])
    groups = defaultdict(list)
    for q, is_right, _ in results:
        groups["recall"].append(is_right)
        groups["several_hops" if q.hops > 1 else "one_hop"].append(is_right)
        groups["far" if q.distance > half else "near"].append(is_right)
    out = {name: np.mean(answers) for name, answers in groups.items()}
    return out | {"log_wrong": np.log(np.mean([1 - np.exp(log_p) for *_, log_p in results])),
                  "learned": min(out["recall"], out["far"]) >= enough}


def attention_change(plain_model, masked_model, tok, n=64, T=64):
    """MEAP's claim on attention, on records, as shares: from plain inputs to plain_model, to masked inputs to
    masked_model, the fall of attention to masked positions (decay) and the rise of its variance elsewhere, by
    the paper's definitions (attention.compare); and of the last token's attention, how much more of it is on
    the record that answers (answer_rise)."""
    rng = np.random.default_rng(5)
    stream = [id for text in documents("records", n, seed=5) for id in (*tok.encode(text), tok.eot)]
    rows = np.array(stream[:len(stream) // T * T]).reshape(-1, T)[:n]
    masked = np.array([mask(row, 0.15, tok, rng) for row in rows])
    before, fall, variance, rise = compare(received(plain_model, rows), received(masked_model, masked),
                                           masked == tok.mask)
    on_answer = []
    for text in documents("records", n, seed=6):
        q, lines = questions(text)[0], lines_of(text)
        at = q.n_records - q.distance  # the line that answers: the first question follows the last record
        query = text[:q.start].split("\n")[-1]
        parts = "".join(lines[:at]), lines[at], "".join(lines[at + 1:q.n_records]), query
        on_answer.append([shares(model, tok, parts)[:, 1].mean() for model in (plain_model, masked_model)])
    plain, after = np.mean(on_answer, axis=0)
    return {"decay": fall.sum() / before.sum(), "variance_rise": rise.sum() / variance.sum(),
            "answer_rise": after - plain}


def on_answers(model, tok, knobs, is_last):
    """Of fine-tuned models: the share of keys that are named rightly in answers to turned_round."""
    pairs = [(tok.encode(prompt), tok.encode(answer)) for prompt, answer in turned_round(100, seed=7)]
    scores = score(model, [([*prompt, tok.mid], answer) for prompt, answer in pairs])
    # An answer is value, key, value, key ...
    right = [s.likeliest[1::2] == answer[1::2] for s, (_, answer) in zip(scores, pairs)]
    return {"recall": np.concatenate(right).mean()}


def turned_round(n, seed):
    """n pairs for fine-tuning: the records of a document and "?" -> each value and its key, the last first.
    The base model has learned to find a value by its key, not a key by its value."""
    pairs = []
    for text in documents("records", n, seed):
        facts = text[:text.index("?")]
        pairs.append((f"{facts}?", "".join(f" {word}" for word in reversed(facts.split()) if word != "=")))
    return pairs


# The probe of an arm, by the first word of its name.
PROBES = {"markov": on_markov, "stdlib": on_stdlib, "repeat": on_stdlib, "programs": on_programs,
          "answers": on_answers, "rare": partial(on_questions, corpus="records"),
          **{corpus: partial(on_questions, corpus=corpus) for corpus in ("records", "haystack")},
          # runs of a fixed length
          "settled": partial(on_questions, corpus="records", enough=math.inf),
          "chains": partial(on_questions, corpus="chains", enough=math.inf)}
