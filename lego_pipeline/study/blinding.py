"""Names that say nothing, orders that anyone can compute again, and digests that show what was changed.

Every picture and question has a token, an HMAC of what it is under the study's secret. Who has only the page can't
tell which system a token belongs to, or which questions are attention checks; the key file can. The order in which a
rater sees questions and pictures is that of the hashes of (seed, rater, question, token): another one for each rater
and question, the same on every machine. page.js does the same computation.

What the digests protect from. The page's digest is that of the study's text, which names all questions and tokens: a
page that was edited refuses to start, and votes of such a page are refused. A votes file carries a digest of study,
rater and all answers with the orders they were given in: a file that was edited, cut off or mixed up is refused. Both
digests can be computed by anyone who reads the code, so they don't stop a rater who forges votes on purpose. The seal,
an HMAC under the secret that only the local server can give, does: sealed votes are as the server received them. It
doesn't show who sat at the page, so a code is not a proof of a person either. Pictures are covered by the key (the
server compares them at the start), not by the page.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

VOTES_FORMAT = "lego-votes/1"
RATER = re.compile(r"[a-z0-9_-]{1,32}")  # also a file name, on systems that ignore case too
TOKEN_LENGTH = 20  # hex digits, 80 bits


def new_secret() -> str:
    """A secret for a study, 64 hex digits."""
    return secrets.token_hex(32)


def token(secret: str, *parts: str) -> str:
    """What stands for a picture or question: 20 hex digits that tell nothing without the secret.

    Args:
        secret: of the study.
        parts: what it is, such as ("picture", system, row id).
    """
    return _mac(secret, "\n".join(["token", *parts]))[:TOKEN_LENGTH]


def in_order(seed: int, rater: str, place: str, tokens: Sequence[str]) -> list[str]:
    """Tokens in the order that a rater sees them in.

    Args:
        seed: of the study.
        rater: their code.
        place: id of the question for its pictures, or "" for the questions themselves.
        tokens: in any order.
    """
    return sorted(tokens, key=lambda item: digest(f"{seed}\n{rater}\n{place}\n{item}"))


def digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def votes_text(votes: Mapping[str, Any]) -> str:
    """What the digest of votes is of: a line for the format, the study, the rater, and for each answer.

    Args:
        votes: a votes file as it is read, see `lego_pipeline.study.votes`.
    """
    lines = [VOTES_FORMAT, votes["study"], votes["rater"]]
    for answer in votes["answers"]:
        order = ",".join(answer["order"])
        lines.append(f"{answer['question']} {order} {answer['choice']} {answer['ms']} {answer['at']}")
    return "\n".join(lines)


def seal(secret: str, text: str) -> str:
    """What shows that the holder of the secret has seen a text."""
    return _mac(secret, f"seal\n{text}")


def is_same(first: str, second: str) -> bool:
    """Whether two digests or seals are equal, compared in constant time."""
    return hmac.compare_digest(first.encode(), second.encode())


def _mac(secret: str, text: str) -> str:
    return hmac.new(bytes.fromhex(secret), text.encode(), hashlib.sha256).hexdigest()
