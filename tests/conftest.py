"""What the tests share: the repository on the path, a small corpus of real Python files, its tokenizer and stream."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Tokenizer  # noqa: E402

MODULES = ("argparse ast base64 bisect calendar cmd configparser contextlib csv fnmatch functools glob json.decoder "
           "json.encoder keyword queue shlex string tempfile textwrap").split()
LANGUAGES = """All human beings are born free and equal in dignity and rights.
Все люди рождаются свободными и равными в своем достоинстве и правах.
すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神互相对待。
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
🙂 👩‍👩‍👧 🇫🇷 naïve façade, e\u0301 n\u0303
"""


@pytest.fixture(scope="session")
def documents():
    """The sources of 20 standard library modules, as list[str]."""
    return [Path(importlib.util.find_spec(name).origin).read_text("utf-8") for name in MODULES]


@pytest.fixture(scope="session")
def tok(documents):
    return Tokenizer.train(documents, 600)


@pytest.fixture(scope="session")
def stream(documents, tok):
    """doc <EOT> doc <EOT> ... as uint16."""
    return as_stream(documents, tok)


@pytest.fixture(scope="session")
def corpora(documents, tok, stream):
    """dict: name -> (tokenizer, stream): English and multi-byte text, each in learned tokens and in single bytes."""
    single, learned = Tokenizer.bytes(), Tokenizer.train([LANGUAGES], 380)
    return {"code": (tok, stream), "code in bytes": (single, as_stream(documents[2:6], single)),
            "languages": (learned, as_stream([LANGUAGES] * 20, learned)),
            "languages in bytes": (single, as_stream([LANGUAGES] * 20, single))}


class NoFloat64(TorchDispatchMode):
    """A CPU that, like Apple's MPS, has no 64-bit floats: an operation that meets one fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [part for part in tree_leaves((args, kwargs, result)) if isinstance(part, torch.Tensor)]
        assert all(part.dtype != torch.float64 for part in found), f"{func} meets a 64-bit float"
        return result


@pytest.fixture
def no_float64():
    with NoFloat64():
        yield


def as_stream(texts, tok):
    return np.array([i for text in texts for i in (*tok.encode(text), tok.eot)], np.uint16)
