"""Compiles a grammar in this process, which may die of it: `python -P trial.py < grammar` prints what is wrong with it.

A schema of 40 bytes can take 15 s and 2 GB. Run as a program by serve/constrained.py, with nothing but llguidance.
"""

from __future__ import annotations

import resource
import sys

MAX_CPU_S = 1
MAX_BYTES = 1 << 30


class Bytes:
    """The vocabulary of bytes, and a token that ends a text."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"")

    def __call__(self, text: bytes) -> list[int]:
        """Its tokens."""
        return list(text)


def main() -> None:
    """Limit this process, then compile."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), limits=limits, log_level=0)
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
