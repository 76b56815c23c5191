"""Runs of words as numbers: equal runs, whatever their case and punctuation, have equal hashes of 64 bits."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np

# A character of scripts that put no spaces between words is a word: Thai and its neighbours, kana, CJK.
_WORDS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost
_SHIFT = np.uint64(29)


def words_in(text: str) -> list[str]:
    """The words of a text, in lower case and one form of Unicode (NFKC)."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def shingles(word_list: list[str], length: int) -> np.ndarray:
    """The hashes of all runs of `length` words in their order, uint64 (number of runs,); none of fewer words."""
    return run_hashes(word_hashes(word_list), length)


def word_hashes(word_list: list[str]) -> np.ndarray:
    """The hash of each word, uint64 (number of words,)."""
    return np.fromiter(map(_word_hash, word_list), np.uint64, len(word_list))


def run_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """What `shingles` gives, of words' hashes."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    runs = np.zeros(count, np.uint64)
    for place in range(length):
        runs = (runs ^ (runs >> _SHIFT)) * _FACTOR + hashes[place : place + count]
    return runs


def shingle_set(text: str, length: int) -> np.ndarray:
    """The hashes of a text's runs of `length` words, sorted, each once; of fewer words the hash of all of them."""
    word_list = words_in(text) or [text]
    return np.unique(shingles(word_list, min(length, len(word_list))))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """What two sorted sets have in common, as a share of what either has."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


@lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
