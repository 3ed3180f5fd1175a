"""Every claim of the two papers, run again at toy size on corpora whose truth is known.

    python -m lab.claims                              all: an afternoon on 2 cores; writes docs/claims.md
    python -m lab.claims --only fim_for_free orders   two of them: writes out/claims/claims.md
    python -m lab.claims --export F.jsonl --ckpt DIR  a model's continuations, for whoever has a judge

Stopped, the same command goes on where it was. ARMS: what is trained. CLAIMS: what each paper says, what is
measured, and the bounds that decide, written before the runs. rerun.py does the rest.
"""
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import is_held_out, load_documents
from lab import probes
from lab.evaluate import continuations
from lab.figures import pyplot
from lab.rerun import Arm, Check, Claim, Results, table, train_all, train_run, write
from sample import Parser, load_model, newest_run, one_line_errors, pick_device, within


def markov(objective, steps=400, eval_every=200, base=""):
    return Arm(f"--objective {objective} --data markov:100000 --tokenizer bytes --block-size 128 "
               f"--batch-size 32 --steps {steps} --warmup 20 --eval-every {eval_every} --eval-tokens 4096",
               probes.on_markov, base=base)


def stdlib(objective):
    return Arm(f"--objective {objective} --data stdlib --eval-every 750", probes.on_stdlib)


def relay(objective, steps, eval_every):
    return Arm(f"--objective {objective} --data relay --vocab-size 512 --steps {steps} "
               f"--eval-every {eval_every}", probes.on_relay)


def records(ratio):
    return Arm(f"--objective meap --mask-ratio {ratio} --data records --vocab-size 512 --block-size 128 "
               "--steps 600 --warmup 20 --eval-every 20 --eval-tokens 4096", probes.on_records, seeds=5)


def chains(objective):
    return Arm(f"--objective {objective} --data chains --vocab-size 512 --block-size 128 --batch-size 32 "
               "--steps 400 --eval-every 50 --eval-tokens 4096", probes.on_chains)


def answers(objective):
    return Arm(f"--objective {objective} --data {{out}}/questions.jsonl --block-size 512 --batch-size 8 "
               "--steps 120 --eval-every 10", probes.on_answers, base="relay-ntp")


ARMS = {
    "markov-ntp": markov("ntp", eval_every=50),
    "markov-meap": markov("meap", eval_every=50),
    "markov-fim-0.9": markov("fim --fim-rate 0.9", eval_every=50),
    "markov-fim-0.25": markov("fim --fim-rate 0.25"),
    "markov-fim-0.5": markov("fim --fim-rate 0.5"),
    "markov-fim-0.75": markov("fim --fim-rate 0.75"),
    "markov-fim-1.0": markov("fim --fim-rate 1.0"),
    "markov-psm": markov("fim_psm --fim-rate 0.9"),
    "markov-spm": markov("fim_spm --spm-layout joint --fim-rate 0.9"),
    "markov-documents": markov("fim --fim-level document --fim-rate 0.9"),
    "markov-tuned": markov("fim --fim-rate 0.9", 200, base="markov-ntp"),
    "markov-tuned-slowly": markov("fim --fim-rate 0.9 --lr 0.001", 200, base="markov-ntp"),
    "markov-tuned-0.25": markov("fim --fim-rate 0.25", 200, base="markov-ntp"),
    "stdlib-ntp": stdlib("ntp"),
    "stdlib-fim-0.5": stdlib("fim --fim-rate 0.5"),
    "relay-ntp": relay("ntp", 400, 50),
    "relay-meap": relay("meap", 400, 50),
    "relay-line": relay("fim --fim-rate 0.9 --max-document-tokens 64 --span line", 350, 350),
    "relay-token": relay("fim --fim-rate 0.9 --max-document-tokens 64 --span token", 350, 350),
    "relay-char": relay("fim --fim-rate 0.9 --max-document-tokens 64 --span char", 350, 350),
    "records-0.0": records(0.0),
    "records-0.05": records(0.05),
    "records-0.1": records(0.1),
    "records-0.15": records(0.15),
    "records-0.2": records(0.2),
    "records-0.3": records(0.3),
    "chains-ntp": chains("ntp"),
    "chains-meap": chains("meap"),
    "answers-sft": answers("sft"),
    "answers-meap_sft": answers("meap_sft --min-answer 0"),
}

FIM_RATES, MASK_RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0), (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
# The bounds of a claim that two losses are equal: some 1% of markov's 1.7 bits a token, stdlib's 1.2 a byte.
SAME = {"low": -0.015, "high": 0.015}
ABOVE_EXACT = "left to right: bits a token above the exact"
ABOVE_BAYES = "middle and <EOT>: bits a token above Bayes' rule"
JOINT = "markov-fim-0.9"
BY_RATE = ("markov-ntp", *(f"markov-fim-{rate}" for rate in FIM_RATES))
TUNED = ("markov-tuned", "markov-tuned-slowly", "markov-tuned-0.25")
SPANS = ("relay-line", "relay-token", "relay-char")
NTP, MEAP = "records-0.0", "records-0.15"
BY_RATIO = tuple(f"records-{ratio}" for ratio in MASK_RATIOS)


# The values of a check, and the data of a panel, are functions of r, a rerun.Results. These make them.


def minus(name, arm, other):
    """An arm's figure minus another arm's, seed by seed."""
    return lambda r: r(arm, name) - r(other, name)


def minus_within(arm, name, other_name):
    """One figure of an arm minus another figure of it, seed by seed."""
    return lambda r: r(arm, name) - r(arm, other_name)


def middles_minus(arm, other):
    """Bits of middle and <EOT> above Bayes' rule, a mean over PSM and SPM."""
    return lambda r: (r(arm, "psm_middle") + r(arm, "spm_middle") - r(other, "psm_middle")
                      - r(other, "spm_middle")) / 2


def until_minus(arm, other, x="step"):
    """The steps (or epochs) until 90% are right, an arm's minus another's."""
    return lambda r: r.until(arm, "recall", x=x) - r.until(other, "recall", x=x)


@lru_cache
def attention_changes(out):
    """Of each seed: probes.attention_change, from NTP to MEAP."""
    pairs = [[load_model(Path(out, f"{arm}-{seed}"))[:2] for arm in (NTP, MEAP)]
             for seed in range(1, ARMS[MEAP].seeds + 1)]
    return [probes.attention_change(plain, masked, tok) for (plain, tok), (masked, _) in pairs]


def attention(name):
    """A figure of probes.attention_change, one a seed."""
    return lambda r: np.array([change[name] for change in attention_changes(r.out)])


def each(name, *arms):
    """Bars: a figure of several arms."""
    return lambda r: {arm: r(arm, name) for arm in arms}


def each_order(name):
    """Bars: a figure of JOINT in PSM and in SPM."""
    return lambda r: {order: r(JOINT, f"{order}_{name}") for order in ("psm", "spm")}


def over(x, name, *arms):
    """Lines: a figure over the steps or epochs of training, a line an arm."""
    return lambda r: {arm: r.curve(arm, name, x) for arm in arms}


def groups(name, *arms):
    """Lines: shares by number of records or by distance, as a probe listed them, a line an arm."""
    return lambda r: {arm: r.groups(arm, name) for arm in arms}


def by(xs, arms, *names):
    """Lines: figures over a setting, such as the FIM rate, whose values xs belong to the arms."""
    return lambda r: {name: (xs, np.stack([r(arm, name) for arm in arms], axis=1)) for name in names}


def kinds(prefix, arms, *names):
    """Lines: figures of several kinds side by side, such as single, multi, span; a line an arm."""
    return lambda r: {arm: (names, np.stack([r(arm, prefix + name) for name in names], axis=1))
                      for arm in arms}


CLAIMS = {
    "fim_for_free": Claim(
        "FIM, claim 1", "At a FIM rate of 0.5, left-to-right loss equals that of training without FIM.",
        ("markov-ntp", "markov-fim-0.5", "stdlib-ntp", "stdlib-fim-0.5"),
        [Check("markov: bits a token, without the coin for plain or FIM: fim minus ntp",
               minus("excess", "markov-fim-0.5", "markov-ntp"), **SAME),
         Check("stdlib: bits a byte, the same", minus("bits", "stdlib-fim-0.5", "stdlib-ntp"), **SAME)],
        [(ABOVE_EXACT, each("excess", "markov-ntp", "markov-fim-0.5")),
         ("bits a token for the coin: plain or FIM?", lambda r: {
             "markov-fim-0.5": r("markov-fim-0.5", "coin"), "one bit a document": np.array([1 / 21])}),
         ("stdlib: bits a byte above ntp's", lambda r: {
             "stdlib-fim-0.5": minus("bits", "stdlib-fim-0.5", "stdlib-ntp")(r)})]),
    "fim_rate": Claim(
        "FIM, claim 2", "Left-to-right loss is flat up to a rate of 0.9 and worse at 1; infilling improves "
        "with the rate.", BY_RATE,
        [Check("left to right, rate 0.9 minus 0", minus("excess", JOINT, "markov-ntp"), **SAME),
         Check("left to right, rate 1 minus 0", minus("excess", "markov-fim-1.0", "markov-ntp"), low=0.015),
         Check("middles, rate 0.25 minus 0.9", middles_minus("markov-fim-0.25", JOINT), low=0)],
        [(f"{ABOVE_EXACT}, by FIM rate", by((0, *FIM_RATES), BY_RATE, "excess")),
         (f"{ABOVE_BAYES}, by FIM rate", by(FIM_RATES, BY_RATE[1:], "psm_middle", "spm_middle"))]),
    "orders": Claim(
        "FIM, claim 3", "Trained on both orders, a model infills better in SPM than in PSM, and as well as a "
        "model of that order alone; trained on one order alone, it fails in the other.",
        (JOINT, "markov-psm", "markov-spm"),
        [Check("joint: middles in PSM minus in SPM", minus_within(JOINT, "psm_middle", "spm_middle"), low=0),
         Check("in PSM: joint minus PSM alone", minus("psm_middle", JOINT, "markov-psm"), high=0.015),
         Check("in SPM: joint minus SPM alone", minus("spm_middle", JOINT, "markov-spm"), high=0.015),
         Check("in PSM: SPM alone minus joint", minus("psm_middle", "markov-spm", JOINT), low=0.1),
         Check("in SPM: PSM alone minus joint", minus("spm_middle", "markov-psm", JOINT), low=0.1)],
        [(f"{order.upper()}: {ABOVE_BAYES}", each(f"{order}_middle", JOINT, "markov-psm", "markov-spm"))
         for order in ("psm", "spm")]),
    "context_level": Claim(
        "FIM, claim 4", "FIM within the context infills better than FIM on whole documents, before windows "
        "are cut; left-to-right loss hardly differs.", (JOINT, "markov-documents"),
        [Check("middles, document level minus context level", middles_minus("markov-documents", JOINT),
               low=0),
         Check("left to right, the same", minus("excess", "markov-documents", JOINT), **SAME)],
        [(f"SPM: {ABOVE_BAYES}", each("spm_middle", JOINT, "markov-documents")),
         (ABOVE_EXACT, each("excess", JOINT, "markov-documents"))]),
    "spans": Claim(
        "FIM, claim 5", "Cuts at lines fill whole lines best; cuts at characters fill random spans.",
        SPANS,
        [Check(f"{holes} filled without error in SPM: cuts at {better}s minus {worse}s",
               minus(f"spm_{name}", f"relay-{better}", f"relay-{worse}"), low=0, unit="%")
         for name, holes, better, worse in (("single", "lines", "line", "char"),
                                            ("multi", "several lines", "line", "char"),
                                            ("span", "random spans", "char", "line"),
                                            ("span", "random spans", "char", "token"))],
        [(f"{order.upper()}: holes filled without error",
          kinds(f"{order}_", SPANS, "single", "multi", "span")) for order in ("spm", "psm")]),
    "fine_tuning": Claim(
        "FIM, claim 6", "A finished left-to-right model reaches the one pretrained with FIM only at a rate "
        "of 0.9, the full learning rate and half of the tokens again.", (JOINT, *TUNED),
        [Check("middles: tuned so minus pretrained", middles_minus(TUNED[0], JOINT), high=0.015),
         Check("... at a tenth of the learning rate", middles_minus(TUNED[1], JOINT), low=0.015),
         Check("... at a rate of 0.25", middles_minus(TUNED[2], JOINT), low=0.015)],
        [(f"{order.upper()}: {ABOVE_BAYES}", each(f"{order}_middle", JOINT, *TUNED))
         for order in ("psm", "spm")]),
    "middle_is_cheaper": Claim(
        "FIM, claim 7", "A middle is likelier given prefix and suffix than given the prefix alone; a whole "
        "FIM example is less likely than the plain text.", (JOINT,),
        [*(Check(f"{order.upper()}: bits that the suffix saves in a middle and its <EOT>",
                 lambda r, order=order: r(JOINT, f"{order}_saved"), low=0,
                 exact=lambda r, order=order: r(JOINT, f"bayes_{order}_saved")) for order in ("psm", "spm")),
         *(Check(f"{order.upper()}: bits of an example above its text's, by letter",
                 lambda r, order=order: r(JOINT, f"{order}_example"), low=0) for order in ("psm", "spm"))],
        [("bits that the suffix saves in a middle and its <EOT>", lambda r: {
            label + order: r(JOINT, f"{kind}{order}_saved") for order in ("psm", "spm")
            for label, kind in (("", ""), ("exact: ", "bayes_"))}),
         ("bits of an example above its text's, by letter", each_order("example"))]),
    "reads_the_suffix": Claim(
        "FIM, on <EOT>", "A model emits <EOT> where the middle joins the suffix, and only there.", (JOINT,),
        [Check(f"{order.upper()}: P(<EOT>) at the true end minus {text}",
               minus_within(JOINT, f"{order}_end", f"{order}_{name}"), low=0.1, unit="%",
               exact=minus_within(JOINT, f"bayes_{order}_end", f"bayes_{order}_{name}"))
         for order in ("psm", "spm") for name, text in (
             ("elsewhere", "elsewhere in the middle"), ("another", "before another text"),
             ("later", "before the suffix one letter later"))],
        [(f"{order.upper()}: P(<EOT>), the model's over the exact",
          lambda r, order=order: r.log[JOINT][0][-1][f"{order}_scatter"]) for order in ("psm", "spm")]),
    "best_of_n": Claim(
        "FIM, appendix H.3", "Of n samples, prefer those that end in <EOT>, then the likeliest.", SPANS[:1],
        [Check("lines filled without error in SPM: best of 8 minus a single sample",
               minus_within("relay-line", "spm_best", "spm_sample"), low=0, unit="%"),
         Check("... minus the likeliest of 8, <EOT> or not",
               minus_within("relay-line", "spm_best", "spm_likeliest"), low=0, unit="%")],
        [(f"{order.upper()}: lines filled without error",
          kinds(f"{order}_", SPANS[:1], "sample", "likeliest", "best")) for order in ("spm", "psm")]),
    "recall": Claim(
        "MEAP, claim 9", "MEAP retrieves what stands in the context better than NTP, and after fewer tokens.",
        (NTP, MEAP),
        [Check("questions answered at the end, MEAP minus NTP", minus("recall", MEAP, NTP), low=0, unit="%"),
         Check("steps until 90% are answered, NTP minus MEAP", until_minus(NTP, MEAP), low=0, unit="steps")],
        [("questions answered, over steps", over("step", "recall", NTP, MEAP)),
         ("steps until 90% are answered", lambda r: {arm: r.until(arm, "recall") for arm in (NTP, MEAP)}),
         ("questions answered, by the number of records", groups("by_records", NTP, MEAP))]),
    "position": Claim(
        "MEAP, claim 10", "MEAP's gain is there wherever the answer stands.", (NTP, MEAP),
        [Check("answered, record 12 lines away or more, MEAP minus NTP", minus("far", MEAP, NTP), low=0,
               unit="%")],
        [("questions answered, by lines from the record", groups("by_distance", NTP, MEAP)),
         ("answered, record 12 lines away or more", each("far", NTP, MEAP))]),
    "several_hops": Claim(
        "MEAP, claim 11", "MEAP answers questions that need several records better than NTP.",
        ("chains-ntp", "chains-meap"),
        [Check(f"questions of {hops} hops answered, MEAP minus NTP",
               minus(f"hops_{hops}", "chains-meap", "chains-ntp"), low=0, unit="%") for hops in (2, 3)],
        [("questions answered, over steps", over("step", "recall", "chains-ntp", "chains-meap")),
         ("questions answered, by hops", kinds("hops_", ("chains-ntp", "chains-meap"), "1", "2", "3"))]),
    "language_modelling": Claim(
        "MEAP, claim 12", "Language modelling is no worse under MEAP.", ("markov-ntp", "markov-meap"),
        [Check("bits a token, MEAP minus NTP", minus("excess", "markov-meap", "markov-ntp"), high=0.015)],
        [(ABOVE_EXACT, each("excess", "markov-ntp", "markov-meap")),
         (f"{ABOVE_EXACT}, over steps", over("step", "excess", "markov-ntp", "markov-meap"))]),
    "hallucination": Claim(
        "MEAP, claim 12", "Under MEAP, generated text contradicts its context less often.",
        ("relay-ntp", "relay-meap"),
        [Check("lines that name another gift than the text before: NTP minus MEAP",
               minus("contradictions", "relay-ntp", "relay-meap"), low=0, unit="%"),
         Check("lines with any error: NTP minus MEAP", minus("any_error", "relay-ntp", "relay-meap"), low=0,
               unit="%")],
        [("share of generated lines",
          kinds("", ("relay-ntp", "relay-meap"), "contradictions", "any_error")),
         ("gifts recalled, over steps", over("step", "recall", "relay-ntp", "relay-meap"))]),
    "masked_copy": Claim(
        "MEAP, claim 13", "Fine-tuned with a masked copy, a model answers better, and after half the epochs.",
        ("answers-sft", "answers-meap_sft"),
        [Check("answers right after equal steps, meap_sft minus sft",
               minus("recall", "answers-meap_sft", "answers-sft"), low=0, unit="%"),
         Check("epochs until 90% are right, sft minus meap_sft",
               until_minus("answers-sft", "answers-meap_sft", "epoch"), low=0, unit="epochs")],
        [(f"answers right, over {x}s", over(x, "recall", "answers-sft", "answers-meap_sft"))
         for x in ("step", "epoch")]),
    "attention": Claim(
        "MEAP, claim 14", "From NTP to MEAP, masked positions lose attention (53%), the others get it more "
        "unevenly (+8%), and the answer gets a larger share of the last token's.", (NTP, MEAP),
        [Check("fall at masked positions", attention("decay"), low=0, unit="%"),
         Check("rise of the variance elsewhere", attention("variance_rise"), low=0, unit="%"),
         Check("rise of the share on the record that answers", attention("answer_rise"), low=0, unit="%")],
        [("change from NTP to MEAP", lambda r: {
            name: attention(name)(r) for name in ("decay", "variance_rise")}),
         ("last token's attention on the record that answers", lambda r: {
             name: attention(name)(r) for name in ("plain_answer", "masked_answer")})]),
    "mask_ratio": Claim(
        "MEAP, claim 15", "A mask ratio of 0.15 is the best of 0.05, 0.10, 0.15 and 0.20.", BY_RATIO,
        [Check(f"steps until 90% are answered, ratio {ratio} minus 0.15",
               until_minus(f"records-{ratio}", MEAP), low=0, unit="steps") for ratio in (0.05, 0.1, 0.2)],
        [("questions answered, by mask ratio", by(MASK_RATIOS, BY_RATIO, "recall")),
         ("steps until 90% are answered, by mask ratio", lambda r: {"": (MASK_RATIOS, np.stack(
             [r.until(arm, "recall") for arm in BY_RATIO], axis=1))})]),
}
# One picture for a lecture: models against the exact answer, over training.
LEARNING = [
    (f"{ABOVE_EXACT}, over steps", over("step", "excess", "markov-ntp", "markov-meap", JOINT)),
    (f"{JOINT}, SPM: P(<EOT>), over steps", lambda r: {
        kind + label: r.curve(JOINT, f"{prefix}spm_{name}") for label, name in (
            ("true end", "end"), ("before another text", "another"), ("elsewhere", "elsewhere"))
        for kind, prefix in (("", ""), ("exact: ", "bayes_"))})]


def export(path, ckpt, source, n=100):
    """Writes how a model goes on from the beginnings of n held-out documents, as a .jsonl of
    {"prompt", "completion", "reference"}; each has half of the context."""
    model, tok, _ = load_model(ckpt, pick_device("auto"))
    half = model.config.block_size // 2
    rows = [tok.encode(text) for text in load_documents(source) if is_held_out(text)]
    rows = [ids for ids in rows if len(ids) > half][:n]
    if not rows:
        raise ValueError(f"--data {source}: no held-out document of it has more than {half} tokens")
    drawn = continuations(model, tok, [ids[:half] for ids in rows], half, temperature=1.0, desc="export")
    with open(path, "w", encoding="utf-8") as f:
        for ids, [(completion, _)] in zip(rows, drawn):
            parts = {"prompt": ids[:half], "completion": completion, "reference": ids[half:2 * half]}
            f.write(json.dumps({name: tok.decode(part) for name, part in parts.items()}) + "\n")
    print(f"{len(rows)} continuations in {path}")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CLAIMS, metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--out", default="out/claims", metavar="DIR", help="of the runs (default out/claims)")
    parser.add_argument("--jobs", type=within(1, 1024), default=os.cpu_count(),
                        help="runs at a time (default: cores)")
    parser.add_argument("--run", metavar="NAME", help="train a single run, such as markov-ntp-1")
    parser.add_argument("--export", metavar="FILE", help="write a model's continuations of held-out text")
    parser.add_argument("--ckpt", metavar="DIR", help="whose (default: the newest run under out/)")
    parser.add_argument("--data", default="stdlib", help="of which text (default stdlib)")
    args = parser.parse_args(arguments)
    if args.export:
        return export(args.export, args.ckpt or newest_run(), args.data)
    if args.run:
        arm, _, seed = args.run.rpartition("-")
        if arm not in ARMS or not seed.isdecimal():
            raise ValueError(f"--run {args.run}: expected an arm and a seed, such as markov-ntp-1; "
                             f"the arms are {', '.join(ARMS)}")
        return train_run(args.run, ARMS, args.out)
    pyplot()  # raises now, not after hours, where matplotlib is missing
    claims = {name: CLAIMS[name] for name in args.only or CLAIMS}
    names = {name for claim in claims.values() for arm in claim.arms for name in (ARMS[arm].base, arm)}
    arms = {name: arm for name, arm in ARMS.items() if name in names}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(Path(args.out, "questions.jsonl"), "w") as f:
        f.writelines(json.dumps({"prompt": prompt, "answer": answer}) + "\n"
                     for prompt, answer in probes.gift_questions(2000, seed=0))
    train_all(arms, args.out, args.jobs, "lab.claims")
    r = Results(arms, args.out)
    print(table(claims, r))
    page = Path(args.out if args.only else "docs", "claims.md")
    write(claims, arms, r, page, [] if args.only else [("learning", LEARNING)])
    print(f"written: {page}")


if __name__ == "__main__":
    main()
