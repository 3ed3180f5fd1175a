"""Document-level FIM, only for the comparison (FIM paper, section 4.4): documents become FIM examples before
windows are cut, so a window may hold part of an example without its sentinels.

    python train.py --objective fim --fim-level document
"""
import numpy as np

from objectives import documents_in, fim_document


def fim_documents(stream, tok, seed, objective, knobs):
    """stream (N,) -> a new, longer stream. knobs: those of fim. Raises ValueError for another objective."""
    if objective != "fim":
        raise ValueError(f"--fim-level document: expected --objective fim, got {objective}")
    rng, out = np.random.default_rng(seed), []
    for document in documents_in(np.asarray(stream), tok, rng, knobs["max_document_tokens"]):
        if rng.random() < knobs["fim_rate"]:
            order = "spm" if rng.random() < knobs["spm_rate"] else "psm"
            room = np.inf  # nothing needs to fit
            document = fim_document(document, room, tok, rng, order, knobs["spm_layout"], knobs["span"])
        out += document
    return np.array(out, stream.dtype)
