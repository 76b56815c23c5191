"""What may say who or where a person is: addresses, numbers of phones, cards and accounts, by their patterns.

A pattern proposes, a check decides where there is one: digits of cards and accounts have their sums, and addresses
that no person has on the internet (127.0.0.1, 10.0.0.1) stay. Names and places have no pattern and are not found. Each
pattern takes time in proportion to the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# How long an account's number is, by country, as SWIFT's registry of IBAN formats has it.
_IBAN_LENGTHS = {
    code[:2]: int(code[2:])
    for code in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SD18 "
        "SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,28}")
_CARD = re.compile(
    r"(?<![\w.,+-])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{5})"
    r"(?![\w-]|[.,]\d)"
)
_UNICAST = ipaddress.ip_network("2000::/3")  # all that IANA gives out; others are names with colons
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)")
_PHONE = re.compile(
    r"""(?<![\w.,+/-])(?:
      \+[1-9](?:[ \-/()]{0,2}\d){7,14}                                    # +49 (30) 1234567
    | 00[1-9]\d{0,2}[ \-/(](?:[ \-/()]{0,2}\d){6,12}                      # 0049 30 1234567
    | (?:\+?1[ .-]?)?(?:\([2-9]\d{2}\)\ ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}  # (415) 555-2671
    | 0\d(?:[ .-]\d{2}){4}                                                # 01 23 45 67 89
    | (?:\(0\d{1,4}\)\ ?|0\d{1,4}[ /-])\d{3,4}(?:[ -]?\d{2,4}){1,2}       # 030 1234567, (020) 7946 0018
    )(?!\w|[.,-]\d)""",
    re.VERBOSE,
)


class PatternMatch(NamedTuple):
    """Where it begins in a text, and where it ends."""

    first: int
    end: int


def _matches(pattern: re.Pattern[str], holds: Callable[[str], bool]) -> Callable[[str], Iterator[PatternMatch]]:
    def find(text: str) -> Iterator[PatternMatch]:
        return (PatternMatch(*match.span()) for match in pattern.finditer(text) if holds(match.group()))

    return find


def _always(matched: str) -> bool:
    return True


def _is_card(matched: str) -> bool:
    """Luhn's check: every second digit from the right counts twice."""
    digits = [int(digit) for digit in reversed(matched) if digit.isdigit()]
    return sum(digits[::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0


def _is_public(matched: str) -> bool:
    try:
        address = ipaddress.ip_address(matched)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in _UNICAST)


def _ibans(text: str) -> Iterator[PatternMatch]:
    """Of an account's number as much as its country has, in groups or not, if its check digits are right."""
    place = 0
    while match := _IBAN.search(text, place):
        place = match.start() + 1  # what looks like one may hold the beginning of one
        length = _IBAN_LENGTHS.get(match.group()[:2], 0)
        places = [place for place in range(*match.span()) if text[place] != " "][:length]
        if not length or len(places) < length:
            continue
        end = places[-1] + 1
        number = "".join(text[place] for place in places)
        digits = "".join(str(int(character, 36)) for character in number[4:] + number[:4])
        if int(digits) % 97 == 1 and not text[end : end + 1].isalnum():
            place = end
            yield PatternMatch(match.start(), end)


def _addresses(text: str) -> Iterator[PatternMatch]:
    return iter(sorted([*_matches(_IPV4, _is_public)(text), *_matches(_IPV6, _is_public)(text)]))


# By name, in the order that they are looked for: what one found, those behind do not see.
PATTERNS: dict[str, Callable[[str], Iterator[PatternMatch]]] = {
    "email": _matches(_EMAIL, _always),
    "iban": _ibans,
    "card-number": _matches(_CARD, _is_card),
    "ip-address": _addresses,
    "phone": _matches(_PHONE, _always),
}


def masked(text: str, names: Sequence[str], counts: Counter[str]) -> str:
    """The text with <EMAIL>, <IP_ADDRESS> and so on in the place of what the patterns find, which `counts` adds up."""
    for name in names:
        pieces, end = [], 0
        for match in PATTERNS[name](text):
            pieces += [text[end : match.first], f"<{name.upper().replace('-', '_')}>"]
            end = match.end
            counts[name] += 1
        text = "".join(pieces) + text[end:] if pieces else text
    return text
