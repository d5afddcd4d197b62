"""E-mail addresses, phone numbers, IP addresses and keys replaced by <email>, <phone>, <ip> and <key>.

What looks like one and is nobody's stays: version and section numbers, dates, ISBNs, digests, loopback addresses.
Every pattern is linear in the text and begins with a small set of characters, which `re` skips to quickly.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import phonenumbers

from pipelines.corpus.stages import Verdict
from ulm.errors import ConfigError, did_you_mean
from ulm.recipes.corpus import PersonalData

# --- e-mail. RFC 5321's lengths; a call, a@b.mean(), is a product of matrices.
_AT = re.compile(r"@(?<=[\w+%-]@)[A-Za-z0-9-]{1,63}\.[A-Za-z0-9]")  # in every address; quick where the next is not
_EMAIL = re.compile(r"(?<![\w+%-])[\w+%-][\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9(])")

# --- IP. Version 6 from 2000::/3, fc00::/7 and fe80::/10, which all begin with four digits: so a::b is no address.
_DOTTED = re.compile(r"\.[0-9]{1,3}\.[0-9]")  # in every address of version 4, and _COLONS of 6; quick again
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
_IPV6 = re.compile(r"[23fF](?<![\w:.].)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){1,6}:[0-9A-Fa-f]{1,4}(?!\w)")
_MIN_IPV4_DIGITS = 6  # version and section numbers mostly have fewer, addresses (all but 1 in 10,000) do not

# --- phone: +…; (030) 90…; 030/90 18 20; 202-555-0100; 202 555-0100. Bare runs of digits are numbers of anything.
_PHONE = re.compile(
    r"""[+(0-9] (?<!\w.) (?<![0-9][.,/].)
    (?: (?<=\+) [0-9] (?: [ ().\-/\xa0]{0,2} [0-9] ){6,14}
      | (?<=\()  [0-9]{2,5} \) [ -]? [0-9]{2,8} (?: [-. /] [0-9]{2,8} ){0,4}
      | (?<=0)   [0-9]{1,4} [-./ ] [0-9]{2,8} (?: ([-. ]) [0-9]{2,8} (?: \1 [0-9]{2,8} ){0,3} )?
      | (?<=[0-9]) [0-9]{0,4} ([-. ]) [0-9]{2,8} (?: \2 [0-9]{2,8} ){0,4}
      | (?<=[0-9]) [0-9]{2} [ ] [0-9]{3} - [0-9]{4}
    ) (?! \w | [-.] [0-9] )""",
    re.VERBOSE,
)
_DATE = re.compile(r"[0-9]{1,2}([-./])[0-9]{1,2}\1(?:19|20)[0-9]{2}")
_MIN_PHONE_DIGITS, _MAX_PHONE_DIGITS = 8, 15  # 15 is E.164's

# --- key. All but blocks are long tokens, so only those are looked at.
_KEY_BLOCK = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?:[^-]|-(?!----))*+-----END (?P=kind)-----|(?:(?:\\n|\s)*[A-Za-z0-9+/]{16,}={0,2})++)"  # the second: cut off
)
_TOKEN = re.compile(r"[A-Za-z0-9+/_.\-](?<![A-Za-z0-9+/_.\-].)[A-Za-z0-9+/_.\-]{15,}+={0,2}")
_KNOWN_KEY = re.compile(
    r"""(?<![A-Za-z0-9_\-]) (?:
        (?:AKIA|ASIA) [A-Z0-9]{16} (?![A-Za-z0-9])     # AWS
      | gh[pousr]_ [A-Za-z0-9]{36,}                    # GitHub
      | github_pat_ \w{22,}
      | glpat- [\w\-]{20,}                             # GitLab
      | xox[abeoprs]- [\w\-]{10,}                      # Slack
      | AIza [\w\-]{35,}                               # Google
      | hf_ [A-Za-z0-9]{30,}                           # Hugging Face
      | [rs]k_live_ [A-Za-z0-9]{16,}                   # Stripe
      | eyJ [\w\-]{8,} \. eyJ [\w\-]{8,} \. [\w\-]*    # JSON web token
    )""",
    re.VERBOSE | re.ASCII,
)
_SK_KEY = re.compile(r"(?<![A-Za-z0-9_\-])sk-[\w\-]{20,}", re.ASCII)  # OpenAI, Anthropic; and sk-… of style sheets
_AWS_SECRET = re.compile(r"[A-Za-z0-9+/]{40}")
_SECRET_NEAR = re.compile(r"(?i:secret|aws)[^\n]*\Z")
_SECRET_NAME = re.compile(
    r"(?i:(?:api|access|auth|client|private|secret)[_ -]?(?:key|token|secret))[\"']?\s*(?::|=>?)\s*[\"']?\Z"
)
_BEFORE_CHARS = 40  # of the text before a token, where its name is looked for
_MIN_KEY_ENTROPY = 3.0  # bits a character: random hexadecimal has 3.3 at 16 digits and 4 at most

MAX_PASSES = 8  # over a text; each takes what the one before laid open, prose needs two
_WINDOW_CHARS = 1 << 14  # searched at a time
_LONGEST_CHARS = 700  # what the pattern of an e-mail address, or of a phone number, can match and look at
_LOOK_BACK_CHARS = 2


def redact(texts: Sequence[str], config: PersonalData) -> list[Verdict]:
    """The texts with a placeholder for each thing found; none is dropped.

    What they become stays as it is when redacted again, unless different kinds hide each other MAX_PASSES deep.
    """
    return [(_redact(text, config), None) for text in texts]


def check(config: PersonalData) -> None:
    """Raises ConfigError for a phone region that does not exist; for the driver, before there is work to lose."""
    if config.phone_region not in phonenumbers.SUPPORTED_REGIONS:
        remedy = did_you_mean(config.phone_region, phonenumbers.SUPPORTED_REGIONS)
        raise ConfigError("clean.personal_data.phone_region", f"no region {config.phone_region!r}", remedy)


def _redact(text: str, config: PersonalData) -> str:
    for _ in range(MAX_PASSES):  # until nothing is left: a placeholder may part what hid in a longer run
        before = text
        for kind in ("key", "email", "ip", "phone"):  # keys first, they may hold digits that look like the others
            if kind in config.redact:
                text = _REDACTORS[kind](text, config)
        if text == before:
            break
    return text


def _replace(text: str, pattern: re.Pattern[str], placeholder: str, length_of: Callable[[str], int]) -> str:
    """The text with a placeholder for the first `length_of(match)` characters of each match of a bounded pattern.

    Unlike in `re.sub`, a match that was replaced is no longer seen to the left of the next. So one pass takes a whole
    run of addresses with nothing between them but a comma; windows keep its time linear.
    """
    parts: list[str] = []
    replaced, at = 0, 0  # ends of what was replaced, and of what was searched
    while at < len(text):
        start = max(replaced, at - _LOOK_BACK_CHARS)
        window = text[start : at + _WINDOW_CHARS]
        end = start + len(window)
        match = pattern.search(window, at - start)
        if end < len(text) and (match is None or start + match.start() > end - _LONGEST_CHARS):
            at = end - _LONGEST_CHARS  # what begins here may run on behind the window
            continue
        if match is None:
            break
        at = start + match.end()
        if length := length_of(match[0]):
            parts += text[replaced : start + match.start()], placeholder
            replaced = at = start + match.start() + length
    return "".join([*parts, text[replaced:]])


def _emails(text: str, config: PersonalData) -> str:
    return _replace(text, _EMAIL, "<email>", len) if _AT.search(text) else text


def _ips(text: str, config: PersonalData) -> str:
    if _DOTTED.search(text):
        text = _IPV4.sub(_ipv4, text)
    return _IPV6.sub(_ipv6, text) if _COLONS.search(text) else text


def _ipv4(match: re.Match[str]) -> str:
    long = len(match[0]) - 3 >= _MIN_IPV4_DIGITS
    return "<ip>" if long and _is_somebodys(match[0]) else match[0]


def _ipv6(match: re.Match[str]) -> str:
    return "<ip>" if _is_somebodys(match[0]) else match[0]


def _is_somebodys(address: str) -> bool:
    """Whether it is an address, and of one machine: not loopback, a netmask or a group of receivers."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # 300.1.1.1, 01.02.03.04, three groups of an IPv6 address
        return False
    return not (ip.is_loopback or ip.is_multicast or (ip.version == 4 and ip.is_reserved))


def _phones(text: str, config: PersonalData) -> str:
    return _replace(text, _PHONE, "<phone>", lambda candidate: _phone_chars(candidate, config.phone_region))


def _phone_chars(candidate: str, region: str) -> int:
    """How many characters at the candidate's beginning are a number in use; 0: none."""
    if candidate[0] == "+":  # may have run on into the next number of the text: cut between groups, the longest first
        ends = [group.end() for group in re.finditer("[0-9]+", candidate)]
        return next((end for end in reversed(ends) if _is_in_use(candidate[:end], region)), 0)
    digits = [character for character in candidate if character.isdigit()]
    if not _MIN_PHONE_DIGITS <= len(digits) <= _MAX_PHONE_DIGITS or _DATE.fullmatch(candidate):
        return 0
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(region)
    assert metadata is not None  # check() has refused other regions
    has_trunk_prefix = metadata.national_prefix == "0"
    if has_trunk_prefix and digits[0] != "0":  # 1698/2005 is a regulation, not Berlin's
        return 0
    if not _is_in_use(candidate, region):
        return 0
    if has_trunk_prefix:
        return len(candidate)
    # Without a trunk prefix any ten digits in a table might be a number, so they must be grouped like one.
    grouped = phonenumbers.PhoneNumberMatcher(candidate, region, leniency=phonenumbers.Leniency.STRICT_GROUPING)
    return len(candidate) if any(match.raw_string == candidate for match in grouped) else 0


def _is_in_use(number: str, region: str) -> bool:
    """Whether its digits are of an area and length that numbering plans have given out."""
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _keys(text: str, config: PersonalData) -> str:
    if "-----BEGIN " in text:
        text = _KEY_BLOCK.sub("<key>", text)
    return _TOKEN.sub(_token, text)


def _token(match: re.Match[str]) -> str:
    token = match[0].rstrip(".-")  # the end of a sentence is not the key's
    tail = match[0][len(token) :]
    known = _SK_KEY.sub(lambda key: "<key>" if _is_mixed(key[0]) else key[0], _KNOWN_KEY.sub("<key>", token))
    if known != token:
        return known + tail
    before = match.string[max(0, match.start() - _BEFORE_CHARS) : match.start()]
    is_aws_secret = _AWS_SECRET.fullmatch(token) and _is_mixed(token) and _SECRET_NEAR.search(before)
    is_named = _SECRET_NAME.search(before) and _is_random(token)
    return "<key>" + tail if is_aws_secret or is_named else match[0]


def _is_mixed(token: str) -> bool:
    """Whether it has digits, small and capital letters: random keys do, hexadecimal digests and names do not."""
    return any(map(str.isdigit, token)) and any(map(str.islower, token)) and any(map(str.isupper, token))


def _is_random(token: str) -> bool:
    """Whether it has digits and letters and the entropy of its characters is that of a key."""
    if not (any(map(str.isdigit, token)) and any(map(str.isalpha, token))):
        return False
    shares = [count / len(token) for count in Counter(token).values()]
    return -sum(share * math.log2(share) for share in shares) >= _MIN_KEY_ENTROPY


_REDACTORS: dict[str, Callable[[str, PersonalData], str]] = {
    "email": _emails,
    "ip": _ips,
    "phone": _phones,
    "key": _keys,
}
