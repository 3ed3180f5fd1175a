"""Every claim of the two papers, decided at toy size on text whose truth is known.

    python -m lab.claims                            all of it; writes docs/claims.md and its figures
    python -m lab.claims --only orders spans        two claims: writes out/claims/claims.md

Stopped, the same command goes on. ARMS: what is trained, as flags of train.py. CLAIMS: functions of the
results r, where r("markov-ntp", "excess") are the figures of that arm's seeds. The docstring of a claim says
what the paper says, what is done here, and what it means. probes.py measures, rerun.py trains and judges.
"""
import inspect
import json
import math
import os
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import train
from data import is_held_out, load_documents
from lab import probes
from lab.corpora import documents
from lab.figures import pyplot
from lab.rerun import Arm, Results, at_most, half_interval, judge, more, seeds_to_decide, study, within
from sample import Parser, load_model, one_line_errors, pick_device
from sample import within as number

FIRST_SEED = 301  # those below served to plan
SMALL = "--n-layer 2 --n-embd 64 --warmup 20 --eval-tokens 2048 --save-every 100000"
MARKOV = f"--data markov:100000 --tokenizer bytes --block-size 128 {SMALL}"
RECORDS = f"--vocab-size 512 --block-size 128 --lr 0.003 {SMALL}"
RACE = f"{RECORDS} --final-lr 1 --steps 1500 --eval-every 10"
STDLIB = "--vocab-size 1024 --block-size 128 --n-embd 96 --steps 400 --eval-tokens 2048"
MASKS = {"ntp": "ntp", "dropout": "ntp --dropout 0.1", "meap": "meap"}
RATIOS, FIM_RATES = (0.05, 0.1, 0.2), (0.25, 0.5, 0.9, 1.0)


def markov(objective, steps=600, more=""):
    return Arm(f"--objective {objective} {MARKOV} --steps {steps} --eval-every {steps}{more}", 32)


def tuned(flags):
    return markov(f"fim {flags}", 300, " --init-from {out}/markov-ntp-{seed}")


ARMS = {
    "markov-ntp": markov("ntp"), "markov-meap": markov("meap"),
    **{f"markov-fim-{rate}": markov(f"fim --fim-rate {rate}") for rate in FIM_RATES},
    "markov-documents": markov("fim --fim-level document --fim-rate 0.9"),
    "markov-tuned": tuned("--fim-rate 0.9"), "markov-tuned-slowly": tuned("--fim-rate 0.9 --lr 0.001"),
    "markov-tuned-0.25": tuned("--fim-rate 0.25"),
    **{f"markov-{name}": markov(f"{objective} --fim-rate 0.9", 1200) for name, objective in
       (("both", "fim"), ("psm", "fim_psm"), ("spm", "fim_spm --spm-layout joint"))},
    **{f"programs-{span}": Arm(f"--objective fim --fim-rate 0.9 --span {span} --data programs:40000 "
                               "--steps 650 --eval-every 650", 8) for span in ("char", "token", "line")},
    **{f"{corpus}-{name}": Arm(f"--objective {objective} --data {corpus} {RACE}", share=0.15)
       for corpus in ("records", "haystack", "rare") for name, objective in MASKS.items()},
    **{f"records-{ratio}": Arm(f"--objective meap --mask-ratio {ratio} --data records {RACE}", share=0.15)
       for ratio in RATIOS},
    **{f"chains-{name}": Arm(f"--objective {objective} --data chains {RECORDS} --n-layer 4 --lr 0.005 "
                             "--steps 600 --eval-every 600") for name, objective in MASKS.items()},
    **{f"settled-{name}": Arm(f"--objective {objective} --data records {RECORDS} --steps 800 "
                              "--eval-every 800") for name, objective in MASKS.items()},
    **{f"answers-{objective.split()[0]}": Arm(
        f"--objective {objective} --data {{out}}/questions.jsonl --block-size 128 --lr 0.003 --steps 600 "
        "--eval-every 10 --init-from {out}/settled-ntp-{seed}")
       for objective in ("sft", "meap_sft --min-answer 0")},
    **{f"stdlib-{name}": Arm(f"--objective {objective} --data stdlib {STDLIB} --eval-every 400")
       for name, objective in (("ntp", "ntp"), ("fim", "fim --fim-rate 0.5"), ("meap", "meap"))},
    **{f"repeat-{name}": Arm(f"--objective {objective} --data {{out}}/repeat.jsonl {STDLIB} --eval-every 40")
       for name, objective in (MASKS | {"fim": "fim", "fim_meap": "fim_meap"}).items()},
}
# The smallest differences that would matter, written before the runs: bits per token or byte (1% of markov's
# 1.7), bits per token of a middle (a tenth of what the pilot's models lacked), of a share, of a pass rate, of
# the time to learn.
more_bits, no_more_bits, same_bits = (partial(kind, delta=0.015) for kind in (more, at_most, within))
more_middle, no_more_middle = (partial(kind, delta=0.007) for kind in (more, at_most))
more_share = partial(more, delta=0.1, unit="%")
more_passes = partial(more, delta=0.05, unit="%")
more_times = partial(more, delta=math.log(1.2), unit="times")


# FIM: the claims of Bavarian et al., 2022

def fim_for_free(r, arms="markov-ntp markov-fim-0.5 stdlib-ntp stdlib-fim"):
    """Does FIM cost anything left to right?

    FIM, sections 1 and 4: with half of the documents transformed, the left-to-right test loss equals that of
    a model trained without FIM, on code and on language, at all eight sizes.

    Both are trained on equally many tokens and measured on held-out plain text. A model trained with FIM
    expects a sentinel at the start of half of the documents. The bits for that coin are not counted, since
    generation leaves the sentinels out.

    On short and simple text FIM is free. On natural text a training of minutes is too short for that: half
    of its tokens stand in another order, and it has no tokens to spare."""
    yield same_bits("markov, bits per token: fim minus ntp",
                    r.minus("markov-fim-0.5", "markov-ntp", "excess"))
    yield same_bits("stdlib, bits per byte: fim minus ntp", r.minus("stdlib-fim", "stdlib-ntp", "bits"))


def fim_rate(r, arms=" ".join(["markov-ntp", *(f"markov-fim-{rate}" for rate in FIM_RATES)])):
    """How much of the text may be transformed?

    FIM, section 4.2: the left-to-right loss is flat up to a rate of 0.9 and worse at 1; infilling improves
    with the rate.

    On markov the bits of each document are known, so the excess over them is measured, left to right and in
    the middle, against Bayes' rule.

    Infilling gains from a high rate. Left to right, a rate of 0.9 costs something at this size; a rate of 1
    costs much more, since the model then never sees plain text."""
    for rate, kind in ((0.9, same_bits), (1.0, more_bits)):
        yield kind(f"left to right, bits per token: rate {rate:g} minus 0",
                   r.minus(f"markov-fim-{rate}", "markov-ntp", "excess"))
    yield more_middle("middles in SPM, bits per token: rate 0.25 minus 0.9",
                      r.minus("markov-fim-0.25", "markov-fim-0.9", "spm_middle"))


def orders(r, arms="markov-both markov-psm markov-spm"):
    """Prefix first, suffix first, or both?

    FIM, section 4.3: trained on both orders at a rate of 0.9, 39.7% of random spans pass in PSM and 42.0% in
    SPM; trained on PSM alone 36.2% and 27.4%; on SPM alone 0.7% and 38.6% (single lines: 61.6, 62.2; 58.3,
    62.5; 2.3, 58.6).

    The same three trainings on markov; middles are measured in both orders against Bayes' rule.

    Train on both orders: the model then serves both prompts, and in SPM it costs nothing that would matter.
    Of the single orders PSM is the safer one: a joint SPM example, <PRE> <SUF> suffix <MID> prefix middle, is
    a PSM example whose prefix is empty."""
    both = "markov-both"
    yield more_middle("both orders: PSM minus SPM", r(both, "psm_middle") - r(both, "spm_middle"))
    for order in probes.ORDERS:
        yield no_more_middle(f"in {order.upper()}: both orders minus {order.upper()} alone",
                             r.minus(both, f"markov-{order}", f"{order}_middle"))
    yield more("in PSM: SPM alone minus both orders", r.minus("markov-spm", both, "psm_middle"), 0.1)
    yield at_most("in SPM: PSM alone minus both orders", r.minus("markov-psm", both, "spm_middle"), 0.1)


def context_level(r, arms="markov-fim-0.9 markov-documents"):
    """Transform before or after the text is cut into windows?

    FIM, section 4.4: within the context, infilling is better than on whole documents at every size, though
    the left-to-right loss hardly differs.

    On whole documents a window may cut an example: the model then sees a middle without its prompt.

    Where documents are a sixth of the window, the level makes no difference in SPM. In PSM, two of the 32
    models at context level have not learned, so the interval is wide. On small programs, which are longer,
    the level matters: on whole documents 28% of the random spans pass, inside the window 48% (two seeds,
    results.md)."""
    for kind, text, name in ((more_middle, "middles in PSM", "psm_middle"),
                             (more_middle, "middles in SPM", "spm_middle"),
                             (same_bits, "left to right", "excess")):
        yield kind(f"{text}, bits per token: document level minus context level",
                   r.minus("markov-documents", "markov-fim-0.9", name))


def spans(r, arms="programs-line programs-token programs-char"):
    """Cut at lines, tokens or characters?

    FIM, section 4.5 (Medium; single line, several lines, random span): cuts at lines pass 58.6, 26.9 and
    1.5%, at tokens 54.8, 24.2 and 10.2%, at characters 55.7, 25.0 and 32.1%.

    Three trainings on programs; held-out functions are filled greedily in SPM and run.

    Cut where your users' cursors stand: at lines for lines, at characters for random spans."""
    for text, hole, cut, other in (
            ("one line", "line", "line", "char"), ("several lines", "lines", "line", "char"),
            ("random spans", "span", "char", "line"), ("random spans", "span", "char", "token")):
        yield more_passes(f"{text}: cuts at {cut}s minus {other}s",
                          r.minus(f"programs-{cut}", f"programs-{other}", hole))


def fine_tuning(r, arms="markov-fim-0.9 markov-tuned markov-tuned-slowly markov-tuned-0.25"):
    """Can a finished model learn it afterwards?

    FIM, section 5: of 16 settings only a rate of 0.9, the full learning rate and half of the pretraining
    tokens again reached the model that was pretrained with FIM.

    A finished ntp model of markov is trained for half of its steps again in three settings.

    Train with FIM from the start. Afterwards, take the full learning rate and a high rate."""
    for kind, text, arm in (
            (no_more_middle, "middles in SPM, bits per token: tuned so minus pretrained", "markov-tuned"),
            (more_middle, "... at a tenth of the learning rate", "markov-tuned-slowly"),
            (more_middle, "... at a rate of 0.25", "markov-tuned-0.25")):
        yield kind(text, r.minus(arm, "markov-fim-0.9", "spm_middle"))


def middle_is_cheaper(r, arms="markov-both"):
    """Does a suffix make the middle likelier?

    FIM, section 2: P(middle | prefix, suffix) under FIM is above P(middle | prefix) left to right, but a
    whole example is harder to predict than the plain text.

    Both are measured on markov, the first beside what Bayes' rule can save.

    The suffix saves most of what it can save. The price is paid in the parts that begin in the middle."""
    for order in probes.ORDERS:
        yield more(f"{order.upper()}: bits that the suffix saves in a middle and its <EOT>",
                   r(arms, f"{order}_saved"), 0.1, exact=r(arms, f"bayes_{order}_saved").mean())
        yield more_bits(f"{order.upper()}: bits of an example above those of its text, per letter",
                        r(arms, f"{order}_example"))


def reads_the_suffix(r, arms="markov-both"):
    """Does the model read the suffix, or does it guess?

    FIM, section 3 and appendix H.3: a model that emits <EOT> says that its middle joins the suffix.

    P(<EOT>) at the true end of a middle, against elsewhere in the middle and, the control, at the same place
    before the suffix of another document. The exact answer is Bayes' rule.

    A model of 0.1 M parameters reads the suffix nearly as well as is possible where the text is simple."""
    for order in probes.ORDERS:
        for name, text in (("elsewhere", "elsewhere in it"), ("another", "before another suffix")):
            exact = r(arms, f"bayes_{order}_end") - r(arms, f"bayes_{order}_{name}")
            yield more_share(f"{order.upper()}: P(<EOT>) at the true end minus {text}",
                             r(arms, f"{order}_end") - r(arms, f"{order}_{name}"), exact=exact.mean())


def best_of_n(r, arms="programs-char"):
    """Is the best of several samples better?

    FIM, appendix H.3: of n samples prefer those that end in <EOT>, then the likeliest.

    Eight samples at temperature 0.8 for a missing line of held-out functions; the chosen one is run.

    Draw several samples and rank them. Where nearly all samples end, likelihood alone ranks them as well."""
    for text, other in (("one line: best of 8 minus a single sample", "sample"),
                        ("... minus the likeliest of 8, <EOT> or not", "likeliest")):
        yield more_passes(text, r(arms, "best") - r(arms, other))


# MEAP: the claims of Zhuang et al., 2025

def with_control(check):
    """check: (base arm, its label) -> a check of MEAP against it. Yields that against NTP and, where MEAP is
    better, that against NTP with dropout, which hides inputs, too: is it more than what dropout gives?"""
    against_ntp = check("ntp", "NTP")
    yield against_ntp
    if judge(against_ntp) == "holds":
        yield check("dropout", "NTP with dropout")


def race(r, corpus, name="log_steps", text="steps to answer 80%"):
    """How many times as many steps NTP takes as MEAP does."""
    return with_control(lambda base, label: more_times(
        f"{text}: {label} over MEAP", r.minus(f"{corpus}-{base}", f"{corpus}-meap", name)))


def recall(r, arms="records-ntp records-dropout records-meap"):
    """Do masks help to learn to look things up?

    MEAP, needle in a haystack: after 40, 60 and 200 B tokens NTP finds .659, .528 and .871 of the needles,
    MEAP .802, .858 and .982.

    records: up to 8 keys and values, then questions. A run goes on at a constant learning rate until it
    answers 80%; what is compared is how many steps that takes (one that never does counts as 1,500, where all
    end).

    Masks do not teach a small model to look things up sooner: NTP does."""
    yield from race(r, "records")


def distractors(r, arms="haystack-ntp haystack-dropout haystack-meap"):
    """... among text that does not matter?

    MEAP, multi-document question answering: +30.6% with 10 documents, +27.2% with 20 and the answer in the
    last one, +5.1% in the tenth.

    haystack: two to six records among 4 to 16 lines of the same words that are never asked for.

    This is the case for which masks are meant: few facts in much text. NTP learns it sooner, too."""
    yield from race(r, "haystack")
    yield from race(r, "haystack", "log_steps_far", "steps to answer 80% where the record is far away")


def few_examples(r, arms="rare-ntp rare-dropout rare-meap"):
    """... from few examples among much other text?

    Not a claim of MEAP's paper: it pretrains on text of the web, where examples of retrieval are few.

    rare: one document in four is of records; in the others nothing is asked for.

    Nor do masks help where examples are few."""
    yield from race(r, "rare")


def several_hops(r, arms="chains-ntp chains-dropout chains-meap"):
    """... over several hops?

    MEAP, multi-needle reasoning (M-RS), 8K to 32K: +6.6 points on average.

    chains, 600 steps each: a record's value may be the key of the next; questions need one to three records.

    Masks do not help in so short a training. NTP answers half of these questions; a guess among the values
    that a text names answers a quarter."""
    yield from with_control(lambda base, label: more_share(
        f"questions of two and three hops answered: MEAP minus {label}",
        r.minus("chains-meap", f"chains-{base}", "several_hops")))


def mask_ratio(r, arms=" ".join(["records-meap", *(f"records-{ratio}" for ratio in RATIOS)])):
    """Is 15% the best share to mask?

    MEAP, ablation: 0.15 is the best of 0.05, 0.10, 0.15 and 0.20 in pretraining.

    The race of records at four ratios.

    No sign that 0.15 is best."""
    for ratio in RATIOS:
        yield more_times(f"steps to answer 80%: ratio {ratio} over 0.15",
                         r.minus(f"records-{ratio}", "records-meap", "log_steps"))


def language_modelling(r, arms="markov-ntp markov-meap stdlib-ntp stdlib-meap"):
    """Is plain text predicted as well?

    MEAP, language modelling and commonsense: no worse than NTP.

    Held-out text without masks, after equally many tokens.

    On short and simple text masks do no harm. On natural text they cost what they hide, in a training of
    minutes."""
    for corpus, unit, name in (("markov", "token", "excess"), ("stdlib", "byte", "bits")):
        yield no_more_bits(f"{corpus}, bits per {unit}: MEAP minus NTP",
                           r.minus(f"{corpus}-meap", f"{corpus}-ntp", name))


def hallucination(r, arms="settled-ntp settled-dropout settled-meap"):
    """Does the model contradict its context less?

    MEAP, contextual hallucination: the share of summaries that judges find free of it rises from .14 to .16
    (XSum), .10 to .13 (MultiNews), .19 to .24 (WikiSum).

    records, 800 steps each: the share of answers, drawn at temperature 1, that name another value than the
    record in the same text. Few do, so a fifth of them would matter.

    After equally many steps, a model trained with masks contradicts its text more often: in two of a hundred
    answers, where NTP does in one of two hundred."""
    yield from with_control(lambda base, label: more_times(
        f"contradictions: {label} over MEAP", r.minus(f"settled-{base}", "settled-meap", "log_wrong")))


def masked_copy(r, arms="answers-sft answers-meap_sft"):
    """Does a masked copy help in fine-tuning?

    MEAP, fine-tuning (Llama-3-8B on Alpaca): commonsense 67.30 to 68.42, 20-document QA 25.56 to 37.33, and
    half of the epochs suffice.

    A finished model of records finds values by their keys. Now it learns to list all values of a text, each
    with its key. Steps have equally many positions, and an example with its copy takes about two.

    A copy doubles what an example costs, so it pays only where it halves the number of examples. Here it
    does not. (Four seeds do not tell whether it costs anything.)"""
    yield more_share("keys named rightly at the end: meap_sft minus sft",
                     r.minus("answers-meap_sft", "answers-sft", "recall"))
    yield more_times("steps until 80% are right: sft over meap_sft",
                     r.minus("answers-sft", "answers-meap_sft", "log_steps"))


def attention(r, arms="settled-ntp settled-meap"):
    """Is attention freed from what is masked?

    MEAP, analysis: from NTP to MEAP, masked positions lose 53.34% of their attention, its variance elsewhere
    rises by 7.80%, and the answer's share of the last token's attention rises from .094 to .345.

    The same figures on pairs of finished models of records. Half of what the paper found would matter.

    Masked positions lose a part of their attention, less than half of what the paper found. The record that
    answers does not gain it."""
    for text, name, delta in (("fall at masked positions", "decay", 0.267),
                              ("rise of the variance elsewhere", "variance_rise", 0.039),
                              ("rise of the share on the record that answers", "answer_rise", 0.125)):
        changes = [change_of_attention(r.out, *runs) for runs in zip(*map(r.runs, arms.split()))]
        yield more(text, np.array([change[name] for change in changes]), delta, "%")


@cache
def change_of_attention(out, *runs):
    (plain, tok), (masked, _) = (load_model(Path(out, run))[:2] for run in runs)
    return probes.attention_change(plain, masked, tok)


# Beside the papers

def repeated_text(r, arms="repeat-ntp repeat-dropout repeat-meap repeat-fim repeat-fim_meap"):
    """What do masks and FIM give where the text repeats?

    Not a claim of these papers: masked inputs are worth 1.3 times as much text at 72 M to 1.4 B parameters
    (arXiv 2606.06888); masks and FIM augment repeated text (arXiv 2606.16246), and so does token dropout
    (arXiv 2512.23422).

    250 kB of the standard library are read some ten times. Bits per byte of other modules: the lowest of all
    evaluations, and the last. Dropout is the control.

    Where text is scarce, both objectives delay overfitting. So does dropout, at the end more than masks:
    compare with it."""
    for text, name, arm, other in (
            ("at the end, bits per byte", "bits", "ntp", "meap"), ("at the end", "bits", "dropout", "meap"),
            ("lowest", "lowest_bits", "ntp", "meap"), ("lowest", "lowest_bits", "ntp", "fim"),
            ("lowest", "lowest_bits", "dropout", "fim")):
        yield more_bits(f"{text}: {arm} minus {other}", r.minus(f"repeat-{arm}", f"repeat-{other}", name))


CLAIMS = {claim.__name__: claim for claim in (
    fim_for_free, fim_rate, orders, context_level, spans, fine_tuning, middle_is_cheaper, reads_the_suffix,
    best_of_n, recall, distractors, few_examples, several_hops, mask_ratio, language_modelling, hallucination,
    masked_copy, attention, repeated_text)}

# The page

WORDS = """Written by `python -m lab.claims`, not by hand. {n_runs} trainings of models of 0.1 to 1 M
parameters, seconds to minutes each, on {device}, {dtype}, torch {torch}.
Their texts (`python -m lab.corpora` prints a document of each):

- **markov** `{markov}`: letters, each drawn given the one before. So the bits of
  every text and the best possible infill, by Bayes' rule, are known: the *exact* number.
- **records** `= fox fig` ... `? fox fig`: keys and values, then questions. **haystack**: the same among lines
  that are never asked for. **rare**: records in one document of four. **chains**: a value may be the key of
  the next record.
- **programs**: short Python functions, judged by running them. **stdlib**: Python's standard library.

A *check* is a number for each seed: its mean and, in brackets, the 95% interval of the mean over the seeds.
The claim says where that mean lies, by the smallest difference that would matter, written before the runs. A
check **holds** if the whole interval lies where the claim says. It **fails** if all of it lies elsewhere:
there is no difference as large as the one that would matter. It is **reversed** if the opposite is as large;
else **undecided**. An asterisk: the verdict is the same at 99%.

Each check begins with 4 seeds; as long as it is undecided, it gets twice as many, up to 16 (markov: 32,
programs: 8). That is up to four looks at the same figures: a mean right at the smallest difference that
would matter gets a wrong verdict in 8 of 100 cases (simulated with normal figures); one that is half of the
seeds' standard deviation away from it, in less than one.
Where masks do better than NTP, they are also held against NTP with dropout, which hides inputs, too.

Flags, figures and differences that matter were fixed before these runs, after others with other seeds."""
COLORS = {"holds": "tab:green", "fails": "tab:orange", "reversed": "tab:red", "undecided": "tab:gray"}


def shown(value, unit):
    return {"bits": f"{value:.4f}", "%": f"{100 * value:.1f}%", "times": f"x {math.exp(value):.2f}"}[unit]


def expected(check):
    if check.low == -math.inf:
        return f"at most {shown(check.high, check.unit)}"
    bound = shown(abs(check.low), check.unit)
    return f"more than {bound}" if check.high == math.inf else f"within {bound} of 0"


def found(check):
    mean, half = check.values.mean(), half_interval(check.values)
    value, low, high = (shown(x, check.unit) for x in (mean, mean - half, mean + half))
    return f"{value} ({low} to {high})"


def table(checks):
    """Markdown: a row for each check."""
    rows = ["| measured | the claim says | here | seeds | exact | verdict |", "|---|---|---|---|---|---|"]
    for check in checks:
        verdict = f"**{judge(check)}**{'*' if judge(check, 0.99) == judge(check) else ''}"
        if judge(check) == "undecided":
            verdict = f"undecided; some {seeds_to_decide(check)} seeds would decide"
        exact = "" if check.exact is None else shown(check.exact, check.unit)
        rows.append(f"| {check.text} | {expected(check)} | {found(check)} | {len(check.values)} | {exact} | "
                    f"{verdict} |")
    return "\n".join(rows)


def draw_checks(axis, checks):
    """Seeds, interval, and where the claim says that the mean lies, in multiples of the smallest difference
    that would matter."""
    for row, check in enumerate(checks):
        delta = min(abs(check.low), abs(check.high))
        values, half = check.values / delta, half_interval(check.values) / delta
        axis.fill_betweenx([row - 0.4, row + 0.4], max(check.low / delta, -100), min(check.high / delta, 100),
                           color="tab:green", alpha=0.12, lw=0)
        axis.plot(values, np.full(len(values), row), ".", color="gray", ms=4, alpha=0.6)
        axis.plot(values.mean() + np.array([-half, half]), [row, row], color=COLORS[judge(check)], lw=5)
    ticks = (-50, -10, -2, -1, 0, 1, 2, 10, 50)
    axis.set_xscale("symlog", linthresh=2)
    axis.set(xlim=(-100, 100), xticks=ticks, xticklabels=ticks, ylim=(len(checks) - 0.4, -0.6),
             yticks=range(len(checks)), yticklabels=[check.text for check in checks],
             xlabel="in units of the smallest difference that would matter\n"
                    "(bar: 95% interval; points: seeds; shaded: the claim)")
    for name, color in COLORS.items():
        axis.plot([], [], color=color, lw=5, label=name)


def draw_recall(axis, r):
    for arm, label in (("ntp", "ntp"), ("meap", "meap"), ("dropout", "ntp with dropout 0.1")):
        steps = np.sort(np.exp(r(f"records-{arm}", "log_steps")))
        axis.step([0, *steps], np.arange(len(steps) + 1) / len(steps), where="post", label=label)
    axis.set(xlabel="steps", ylabel="share of the seeds that answer 80% of records")


def draw_fim_rate(axis, r):
    for name, label in (("excess", "left to right"), ("psm_middle", "middle, PSM"),
                        ("spm_middle", "middle, SPM")):
        values = [r(f"markov-fim-{rate}", name) for rate in FIM_RATES]
        line, = axis.plot(FIM_RATES, [seeds.mean() for seeds in values], label=label)
        for rate, seeds in zip(FIM_RATES, values):
            axis.plot([rate] * len(seeds), seeds, ".", color=line.get_color())
    axis.set(xlabel="FIM rate", ylabel="bits per token above the exact number")


def draw_reads_the_suffix(axis, r):
    for order in probes.ORDERS:
        axis.plot(*r.log("markov-both")[0][-1][f"{order}_scatter"], ".", ms=3, alpha=0.5, label=order.upper())
    axis.axline((0, 0), slope=1, color="gray", lw=1)
    axis.set(xlabel="P(<EOT>) by Bayes' rule", ylabel="P(<EOT>) of the first model")


def draw_repeated_text(axis, r):
    for arm in ("ntp", "dropout", "meap", "fim", "fim_meap"):
        steps, values = r.curve(f"repeat-{arm}", "bits")
        line, = axis.plot(steps, values.mean(0), label=arm)
        axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="steps (40 read the text once)", ylabel="held-out bits per byte", ylim=(3, 4))


PICTURES = {"recall": draw_recall, "fim_rate": draw_fim_rate, "reads_the_suffix": draw_reads_the_suffix,
            "repeated_text": draw_repeated_text}


def picture(path, draw, argument, size=(6, 4)):
    """Draws into a PNG -> the line of Markdown that shows it."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=size, layout="constrained")
    draw(axis, argument)
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def write(checks, r, path):
    """Writes the page about {name of a claim: its checks} with its figures, and prints the verdicts."""
    figures, device = path.with_suffix(""), pick_device("auto")
    figures.mkdir(parents=True, exist_ok=True)
    summary, sections = ["| question | claim of | verdicts |", "|---|---|---|"], []
    for name in checks:
        claim = CLAIMS[name]
        title, paper, done, meaning = (" ".join(part.split()) for part in inspect.getdoc(claim).split("\n\n"))
        verdicts = [judge(check) for check in checks[name]]
        summary.append(f"| [{title}](#{name}) | {re.split('[:(]', paper)[0].strip()} | "
                       f"{', '.join(f'{verdicts.count(v)} {v}' for v in COLORS if v in verdicts)} |")
        commands = "\n".join(dict.fromkeys(
            f"python train.py {r.arms[arm].flags.format(out='out/claims', seed='SEED')} --seed SEED"
            for arm in arms_of(claim)))
        sections += [f"## {name}", f"**{title}**", paper, f"*Here:* {done}", table(checks[name])]
        if name in PICTURES:
            sections.append(picture(figures / f"{name}.png", PICTURES[name], r))
        sections += [f"*What it means:* {meaning}", f"```sh\n{commands}\n```"]
    in_all = sum(checks.values(), [])
    verdicts = [judge(check) for check in in_all]
    n_firm = sum(judge(check, 0.99) == judge(check) != "undecided" for check in in_all)
    by_verdict = ", ".join(f"{verdicts.count(name)} {name}" for name in COLORS)
    count = (f"{len(in_all)} checks: {by_verdict}. At most some {0.08 * len(in_all):.0f} of them are wrong "
             f"by chance; {n_firm} are the same at 99%.")
    words = WORDS.format(n_runs=sum(r.seeds.values()), device=device,
                         dtype="bf16" if train.is_bf16_faster(device) else "fp32", torch=torch.__version__,
                         markov=documents("markov", 1, seed=0)[0])
    named = [check._replace(text=f"{name}: {check.text}") for name in checks for check in checks[name]]
    chart = picture(figures / "verdicts.png", draw_checks, named, (11, 1.2 + 0.3 * len(named)))
    parts = ["# Every claim of both papers, at toy size", words, count, "\n".join(summary), chart, *sections]
    path.write_text(re.sub(r"(?<!`)(<(?:EOT|PRE|SUF|MID)>)(?!`)", r"`\1`", "\n\n".join(parts)) + "\n")
    for name, of_claim in checks.items():
        for check in of_claim:
            print(f"{name:18} {judge(check):10} {found(check):30} {expected(check):18} {check.text}")
    print(f"{count}\nwritten: {path}")


def arms_of(claim):
    """The names of the arms whose figures a claim reads, each base before what starts from it."""
    names = inspect.signature(claim).parameters["arms"].default.split()
    bases = [ARMS[name].flags.partition("--init-from {out}/")[2].partition("-{seed}")[0] for name in names]
    return [*filter(None, bases), *names]


def write_texts(out):
    """The texts of the arms answers and repeat: pairs, and 250 kB of the standard library."""
    Path(out).mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in probes.turned_round(2000, seed=0)]
    texts, length = [], 0
    for text in load_documents("stdlib"):
        if not is_held_out(text) and length < 250_000:
            texts.append({"text": text})
            length += len(text)
    for name, records in (("questions", pairs), ("repeat", texts)):
        Path(out, f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CLAIMS, metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--out", default="out/claims", metavar="DIR", help="of the runs (default out/claims)")
    parser.add_argument("--jobs", type=number(1, 1024), default=os.cpu_count(),
                        help="runs at a time (default: cores)")
    args = parser.parse_args(arguments)
    pyplot()  # raises now, not after hours, where matplotlib is missing
    write_texts(args.out)
    claims = {name: CLAIMS[name] for name in args.only or CLAIMS}
    arms = {name: ARMS[name] for claim in claims.values() for name in arms_of(claim)}
    r = Results(arms, args.out, FIRST_SEED)
    checks = study(claims, r, args.jobs)
    write(checks, r, Path(args.out if args.only else "docs", "claims.md"))


if __name__ == "__main__":
    main()
