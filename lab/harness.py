"""Any run in EleutherAI's lm-evaluation-harness (`pip install lm_eval`), with its own command line and tasks:

    python -m lab.harness --model nanogap --model_args ckpt=out/ntp --tasks lambada_openai

Most tasks download their data; docs/usage.md has one that reads a file. Texts are scored and continued left
to right; what a context does not hold is cut off its left.
"""
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cli import newest_run, one_line_errors, pick_device
from lab.evaluate import continuations, score
from lab.serve import before_stop
from sample import load_model


@register_model("nanogap")
class Nanogap(TemplateLM):
    """Log-likelihoods are in nats, as the harness has them."""

    def __init__(self, ckpt=None, **_):
        """ckpt: a run's folder, the newest if there is none. The harness's own device and batch sizes do not
        count: score and continuations find theirs."""
        super().__init__()
        self.model, self.tok, _ = load_model(ckpt or newest_run(), pick_device("auto"))

    @property
    def eot_token_id(self):
        return self.tok.eot

    def tok_encode(self, string, **_):
        return self.tok.encode(string)

    def _loglikelihood_tokens(self, requests, **_):
        """(texts, context ids, continuation ids) -> (log-likelihood, whether greedy decoding gives it)"""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(float(s.log_p.sum()), bool((s.likeliest == continuation).all()))
                for s, (_, continuation) in zip(score(self.model, pairs, desc="nanogap"), pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Of whole texts: each token once, after as many before it as a window of the context holds."""
        T, totals = self.model.config.block_size, []
        for request in requests:
            windows = get_rolling_token_windows(self.tok.encode(request.args[0]), self.tok.eot, T, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(float(sum(s.log_p.sum() for s in score(self.model, pairs))))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Texts, each up to the first of its stop texts or <EOT>."""
        texts, longest = [], self.model.config.block_size // 2
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, longest)
            n = min(settings["max_gen_toks"], longest)
            prompt = (self.tok.encode(context) or [self.tok.eot])[-(self.model.config.block_size - n):]
            [[(ids, _)]] = continuations(self.model, self.tok, [prompt], n,
                                         temperature=settings.get("temperature", 0.0))
            texts.append(before_stop(self.tok.decode(ids), list(filter(None, settings["until"]))))
        return texts


@one_line_errors
def main(arguments=None):
    cli_evaluate()  # reads the command line itself


if __name__ == "__main__":
    main()
