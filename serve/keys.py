"""API keys, `ulm-<id>-<secret>`: making them, reading them from a header, and what is kept of them."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass

from ulm.errors import InvalidKeyError

ALPHABET = string.ascii_letters + string.digits
ID_LENGTH, SECRET_LENGTH, SALT_BYTES = 12, 32, 16  # a secret of 32 letters and digits has 190 bits
LENGTH = len("ulm-") + ID_LENGTH + len("-") + SECRET_LENGTH
SCOPES = ("infer", "data", "train", "admin")
_KEY = re.compile(rf"ulm-([A-Za-z0-9]{{{ID_LENGTH}}})-([A-Za-z0-9]{{{SECRET_LENGTH}}})")
_BEARER = re.compile(r"bearer(?: +(.*))?", re.IGNORECASE | re.DOTALL)
NO_KEY = "This endpoint wants an API key, in the header Authorization: Bearer ulm-…"


@dataclass(frozen=True)
class NewKey:
    """A key at the one moment when it is whole: `text` goes to its owner, the rest is kept."""

    id: str
    text: str
    salt: bytes
    hash: bytes

    def __repr__(self) -> str:
        return f"NewKey(id={self.id!r})"  # whatever shows it, in a log or a traceback, does not show the secret


def new_key() -> NewKey:
    """A key that nobody has had before."""
    id_, secret = (_random(length) for length in (ID_LENGTH, SECRET_LENGTH))
    salt = secrets.token_bytes(SALT_BYTES)
    return NewKey(id_, f"ulm-{id_}-{secret}", salt, hash_of(secret, salt))


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def hash_of(secret: str, salt: bytes) -> bytes:
    """What is kept of a secret.

    One SHA-256 is enough: with 190 random bits there is nothing to guess, which slow hashes of passwords hinder.
    """
    return hashlib.sha256(salt + secret.encode()).digest()


def parse(authorization: str | None) -> tuple[str, str]:
    """(id, secret) of an Authorization header; InvalidKeyError, without a word of it, where it has no key of ours."""
    bearer = _BEARER.fullmatch(authorization or "")
    given = (bearer[1] or "").strip(" ") if bearer else ""
    if found := _KEY.fullmatch(given):
        return found[1], found[2]
    if not authorization:
        raise InvalidKeyError(NO_KEY)
    if bearer is None and authorization.strip(" ").startswith("ulm-"):
        problem = "has a key without the word Bearer before it"
    elif bearer is None:
        problem = "is of another kind than Bearer"
    elif not given:
        problem = "has no key after the word Bearer"
    elif not given.startswith("ulm-"):
        problem = "has a key that is not of this endpoint, whose keys begin with ulm-"
    elif len(given) != LENGTH:
        problem = f"has a key that was not copied as it is: it has {len(given)} characters, and keys have {LENGTH}"
    else:
        problem = "has a key that was not copied as it is: it is not of the form ulm-<id>-<secret>"
    raise InvalidKeyError(f"The header Authorization {problem}; send Authorization: Bearer ulm-…")


_NOBODY = (bytes(SALT_BYTES), bytes(hashlib.sha256().digest_size))


def is_secret(secret: str, kept: tuple[bytes, bytes] | None) -> bool:
    """Whether a secret is the one that (salt, hash) were kept of. For an unknown key, None, it takes as long."""
    salt, hash_ = kept or _NOBODY
    return hmac.compare_digest(hash_of(secret, salt), hash_) and kept is not None
