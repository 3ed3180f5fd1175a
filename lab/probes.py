"""What claims.py measures on the corpora of corpora.py, during training and at its end.

Each probe is a function (model, tok, knobs, is_last) -> {name: number, or a list for a figure}; knobs are
those of the objective. Training draws documents with seed 0, probes with other seeds. The figure bayes_X
is the exact value of the figure X. Bits are bits a letter, on stdlib bits a byte.
"""
import math
from collections import defaultdict
from functools import lru_cache

import numpy as np

from data import is_held_out, lines_of, load_documents
from lab.attention import compare, received, shares
from lab.corpora import LETTERS, LONGEST, MARKOV, SHORTEST, documents, errors, questions
from lab.evaluate import continuations, score
from objectives import fim_prompt, mask, split
from sample import STOPPED, best_first

ORDERS = ("psm", "spm")


def on_markov(model, tok, knobs, is_last):
    """Bits a token of plain documents above those of their probabilities; and what middles returns, in both
    orders, of a model trained on one at least, SPM as it was trained or joint.

    Whether a document is plain or a FIM example is a coin in training, and the model learns its odds. Its
    bits for the coin, -log2(1 - P(<PRE>)), are kept apart: excess is without them, as is generation, which
    leaves the sentinels out."""
    texts = documents("markov", 500, seed=1)
    scores = score(model, [([tok.eot], [*tok.encode(text), tok.eot]) for text in texts], tok.pre)
    coin = -sum(np.log2(1 - np.exp(s.watched)).sum() for s in scores)
    excess = sum(bits(s).sum() for s in scores) - coin - sum(map(MARKOV.document_bits, texts))
    n_tokens = sum(len(text) + 1 for text in texts)
    out = {"excess": float(excess / n_tokens), "coin": float(coin / n_tokens)}
    for order in ORDERS if "fim_rate" in knobs else ():
        layout = knobs.get("spm_layout", "joint")
        values, points = middles(model, tok, order, layout, markov_holes(200))
        out |= values | ({f"{order}_scatter": points} if is_last else {})
    return out


def bits(s):
    """A Score -> the bits of each token of the continuation."""
    return -s.log_p / math.log(2)


@lru_cache
def markov_holes(n):
    """n holes as in training, with at least a letter of prefix and of suffix: [(prefix, middle, suffix)]."""
    rng, holes = np.random.default_rng(1), []
    for text in documents("markov", 4 * n, seed=2):
        prefix, middle, suffix = split(text, rng)
        if prefix and suffix:
            holes.append((prefix, middle, suffix))
    return holes[:n]


def length_prior(n_prefix, n_suffix, is_joint):
    """w (L,): the prior of a middle's length l, up to a factor, given the lengths of prefix and suffix.

    A document of t = n_prefix + l + n_suffix letters, t uniform from SHORTEST to LONGEST, is cut at two
    independent, uniform places of its t + 1. In joint SPM, prefix and middle stand side by side, and any of
    their places may have been the first cut."""
    lengths = np.arange(max(0, LONGEST - n_prefix - n_suffix) + 1)
    t = n_prefix + lengths + n_suffix
    ways = 2 * (n_prefix + lengths) + 1 if is_joint else np.where(lengths, 2, 1)
    return np.where((SHORTEST <= t) & (t <= LONGEST), ways / (t + 1.0) ** 2, 0.0)


def middles(model, tok, order, spm_layout, holes):
    """A model against Bayes' rule (corpora.Markov.infill) in the same holes -> {name: value}, and P(<EOT>)
    wherever a letter of a middle stands or would stand: [exact, model's]. The names, after "psm_" or "spm_":

        end, elsewhere     P(<EOT>) at the true end, and before each letter of the middle
        another, later     at the true end, before another suffix, and before its own from the second letter
        middle             bits of the middle and its <EOT> above Bayes' rule, by token
        saved              bits of a middle and its <EOT> that the suffix's text saves
        example            bits of the whole example above those of its text, by letter"""
    is_joint = order == "spm" and spm_layout == "joint"
    letters, n_letters = tok.encode, sum(len(middle) for _, middle, _ in holes)

    def predictions(holes):
        """Each hole's Score of middle and <EOT>, and Bayes' rule's probabilities (len(middle) + 1, 27)."""
        prompts = [[tok.eot, *fim_prompt(letters(prefix), letters(suffix), tok, order, spm_layout)]
                   for prefix, _, suffix in holes]
        scores = score(model, [(prompt, [*letters(middle), tok.eot])
                               for prompt, (_, middle, _) in zip(prompts, holes)], tok.eot)
        priors = [length_prior(len(prefix), len(suffix), is_joint) for prefix, _, suffix in holes]
        return scores, [MARKOV.infill(prefix[-1], middle, suffix[0], prior)
                        for (prefix, middle, suffix), prior in zip(holes, priors)]

    scores, exact = predictions(holes)
    p_model, p_exact = [np.exp(s.watched) for s in scores], [p[:, -1] for p in exact]
    out = {}
    for kind, p in (("", p_model), ("bayes_", p_exact)):
        out[f"{kind}{order}_end"] = np.mean([each[-1] for each in p])
        out[f"{kind}{order}_elsewhere"] = np.concatenate([each[:-1] for each in p]).mean()
    controls = {"another": [(prefix, middle, other) for (prefix, middle, _), (_, _, other) in
                            zip(holes, holes[1:] + holes[:1])],
                "later": [(prefix, middle, suffix[1:]) for prefix, middle, suffix in holes if suffix[1:]]}
    for name, changed in controls.items():
        ends = [(np.exp(s.watched[-1]), p[-1, -1]) for s, p in zip(*predictions(changed))
                if np.isfinite(p[-1, -1])]  # else no document has this prefix, middle and suffix
        out[f"{order}_{name}"], out[f"bayes_{order}_{name}"] = np.mean(ends, axis=0)

    given = sum(bits(s).sum() for s in scores)  # of middle and <EOT>
    exact_given = -sum(np.log2(p[range(len(middle) + 1), [*map(LETTERS.index, middle), -1]]).sum()
                       for p, (_, middle, _) in zip(exact, holes))
    out[f"{order}_middle"] = (given - exact_given) / (n_letters + len(holes))
    # Without the suffix's text: letters as they follow the prefix in plain text, the length from the prior.
    plain = score(model, [([tok.eot, *letters(prefix)], letters(middle)) for prefix, middle, _ in holes],
                  tok.eot)
    alone = sum(bits(s).sum() + np.log2(1 - np.exp(s.watched)).sum() for s in plain)
    exact_alone = sum(MARKOV.bits(prefix[-1] + middle).sum() for prefix, middle, _ in holes)
    for_length = 0
    for prefix, middle, suffix in holes:
        prior = length_prior(len(prefix), len(suffix), is_joint)
        for_length -= np.log2(prior[len(middle)] / prior.sum())
    out[f"{order}_saved"] = (alone + for_length - given) / len(holes)
    out[f"bayes_{order}_saved"] = (exact_alone + for_length - exact_given) / len(holes)
    example = total_bits(model, [([tok.eot], fim_prompt(letters(p), letters(s), tok, order, spm_layout)
                                  + [*letters(m), tok.eot]) for p, m, s in holes])
    text = total_bits(model, [([tok.eot], letters(p + m + s)) for p, m, s in holes])
    out[f"{order}_example"] = (example - text) / sum(len(p + m + s) for p, m, s in holes)
    points = [np.concatenate(p).round(4).tolist() for p in (p_exact, p_model)]
    return {name: float(value) for name, value in out.items()}, points


def total_bits(model, pairs):
    return sum(bits(s).sum() for s in score(model, pairs))


def on_stdlib(model, tok, knobs, is_last):
    """Bits a byte of the beginnings of held-out documents; the coin is apart, as in on_markov."""
    texts = [text for text in load_documents("stdlib") if is_held_out(text)]
    rows = [tok.encode(text)[:model.config.block_size] for text in texts]
    scores = score(model, [([tok.eot], ids) for ids in rows], tok.pre)
    coin = -sum(np.log2(1 - np.exp(s.watched)).sum() for s in scores)
    n_bytes = tok.n_bytes[np.concatenate(rows)].sum()
    in_all = sum(bits(s).sum() for s in scores)
    return {"bits": float((in_all - coin) / n_bytes), "coin": float(coin / n_bytes)}


def on_relay(model, tok, knobs, is_last):
    """Gifts recalled; at the end, lines that contradict the text before them; holes filled without error."""
    recalled = []
    for ids, is_right in argmax_is_right(model, tok, documents("relay", 64, seed=1)):
        givers = [line.split()[1] for line in lines_of(tok.decode(ids))[:-1]]
        recalled += [is_right[5 * i + 2] for i, giver in enumerate(givers) if giver in givers[:i]]
    out = {"recall": float(np.mean(recalled))}
    if is_last and "fim_rate" in knobs:
        for order in ORDERS:
            out |= pass_rates(model, tok, order, knobs["spm_layout"])
    elif is_last:
        out |= contradictions(model, tok)
    return out


def argmax_is_right(model, tok, texts):
    """For each text (its first ids, as many as the context holds): ids, and where each is the likeliest."""
    rows = [tok.encode(text)[:model.config.block_size] for text in texts]
    scores = score(model, [([tok.eot], ids) for ids in rows])
    return [(ids, s.likeliest == ids) for ids, s in zip(rows, scores)]


def contradictions(model, tok, n=200, n_given=10, temperature=1.0):
    """Contextual hallucination without a judge: the model goes on after the first ten lines of a document;
    of the lines whose giver was there before, the share that name another gift; and of all lines, the share
    with any error."""
    given = ["".join(lines_of(text)[:n_given]) for text in documents("relay", n, seed=3)]
    drawn = continuations(model, tok, [[tok.eot, *tok.encode(text)] for text in given], 100, 1, temperature)
    wrong = known = bad = lines = 0
    for text, ((ids, _),) in zip(given, drawn):
        whole = lines_of(text + tok.decode(ids))
        whole = whole if ids[-1] == tok.eot else whole[:-1]  # the last line may be unfinished
        problems = errors("".join(whole))
        wrong += sum(e.what == "gift" for e in problems if e.line >= n_given)
        bad += len({e.line for e in problems if e.line >= n_given})
        givers = [line.split()[1] if len(line.split()) == 4 else None for line in whole]
        known += sum(givers[i] is not None and givers[i] in givers[:i] for i in range(n_given, len(givers)))
        lines += max(0, len(whole) - n_given)
    return {"contradictions": wrong / max(1, known), "any_error": bad / max(1, lines)}


def pass_rates(model, tok, order, spm_layout, n=100):
    """Holes in ten lines of relay: the share that the model fills so that the checker finds no error. single:
    a line; multi: two to four lines; span: between two uniform characters. Greedy; for single also the best
    of eight samples at temperature 0.8, ranked with and without regard to <EOT>, and their mean."""
    rng, holes = np.random.default_rng(4), defaultdict(list)
    for text in documents("relay", n, seed=4):
        lines = lines_of(text)[:10]
        for kind, size in (("single", 1), ("multi", int(rng.integers(2, 5)))):
            start = int(rng.integers(1, 10 - size))  # a line before the hole, one after it
            holes[kind].append(["".join(part) for part in
                                (lines[:start], lines[start:start + size], lines[start + size:])])
        holes["span"].append(split("".join(lines), rng))
    out = {}
    for kind, of_kind in holes.items():
        prompts = [[tok.eot, *fim_prompt(tok.encode(p), tok.encode(s), tok, order, spm_layout)]
                   for p, _, s in of_kind]

        def passes(hole, sample):
            return sample.ended == STOPPED and not errors(hole[0] + sample.text + hole[2])

        greedy = continuations(model, tok, prompts, 60)
        out[f"{order}_{kind}"] = float(np.mean([passes(hole, best_first(samples, tok)[0])
                                                for hole, samples in zip(of_kind, greedy)]))
        if kind == "single":
            drawn = continuations(model, tok, prompts, 60, 8, 0.8)
            ranked = [best_first(samples, tok) for samples in drawn]
            likeliest = [max(infills, key=lambda sample: sample.mean_log_p) for infills in ranked]
            pairs = list(zip(of_kind, ranked, likeliest))
            out[f"{order}_best"] = float(np.mean([passes(hole, infills[0]) for hole, infills, _ in pairs]))
            out[f"{order}_likeliest"] = float(np.mean([passes(hole, sample) for hole, _, sample in pairs]))
            out[f"{order}_sample"] = float(np.mean([passes(hole, sample) for hole, infills, _ in pairs
                                                    for sample in infills]))
    return out


def on_records(model, tok, knobs, is_last, corpus="records"):
    """Questions answered, as a share: all, by number of hops, of records, and by lines of distance."""
    results = []
    texts = documents(corpus, 300 if is_last else 100, seed=1)
    for text, (_, is_right) in zip(texts, argmax_is_right(model, tok, texts)):
        for q in questions(text):
            start = len(tok.encode(text[:q.start]))
            end = len(tok.encode(text[:q.start] + " " + q.answer))
            if end <= len(is_right):  # within the context
                results.append((q, bool(is_right[start:end].all())))

    def shares_by(key):
        groups = defaultdict(list)
        for q, is_right in results:
            groups[key(q)].append(is_right)
        return [[group, float(np.mean(answers))] for group, answers in sorted(groups.items())
                if len(answers) >= 20]

    out = {"recall": float(np.mean([is_right for _, is_right in results]))}
    out |= {f"hops_{hops}": share for hops, share in shares_by(lambda q: q.hops)}
    if is_last:
        out |= {"far": float(np.mean([is_right for q, is_right in results if q.distance >= 12])),
                "by_distance": shares_by(lambda q: q.distance),
                "by_records": shares_by(lambda q: q.n_records)}
    return out


def on_chains(model, tok, knobs, is_last):
    return on_records(model, tok, knobs, is_last, "chains")


def attention_change(plain_model, masked_model, tok, n=64, T=64):
    """MEAP's claim on attention, on records, as shares: from plain inputs to plain_model, to masked inputs to
    masked_model, the fall of attention to masked positions (decay) and the rise of its variance elsewhere, by
    the paper's definitions (attention.compare); of the last token's attention, the share on the record that
    answers, of each model (plain_answer, masked_answer), and its rise."""
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
    return {"decay": float(fall.sum() / before.sum()), "variance_rise": float(rise.sum() / variance.sum()),
            "plain_answer": float(plain), "masked_answer": float(after), "answer_rise": float(after - plain)}


def on_answers(model, tok, knobs, is_last):
    """Of fine-tuned models: the share of gifts that are named rightly in answers to questions on relay."""
    pairs = [(tok.encode(prompt), tok.encode(answer)) for prompt, answer in gift_questions(100, seed=7)]
    scores = score(model, [([*prompt, tok.mid], answer) for prompt, answer in pairs])
    # An answer is giver, gift, giver, gift ...
    right = [s.likeliest[1::2] == answer[1::2] for s, (_, answer) in zip(scores, pairs)]
    return {"recall": float(np.concatenate(right).mean())}


def gift_questions(n, seed):
    """n pairs for fine-tuning: sixteen lines of relay and "?" -> every giver and its gift, the last first."""
    pairs = []
    for text in documents("relay", n, seed):
        lines = lines_of(text)[:16]
        gifts = dict(line.split()[1:3] for line in reversed(lines))
        pairs.append(("".join(lines) + "?", "".join(f" {giver} {gift}" for giver, gift in gifts.items())))
    return pairs
