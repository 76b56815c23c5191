"""A corpus made by program, in the files and keys of the real one, for a trial of every step."""

from __future__ import annotations

import random
from pathlib import Path

from .texts import write_lines

_EASY = "the cat dog ran to a big red ball and sat on mat by his mom she can see it in sun we like".split()
_HARD = """whereupon the magistrate, notwithstanding sundry considerations of propriety, relinquished every expectation
concerning that melancholy inheritance upon which his ancestors had formerly depended""".split()


def _name(rng: random.Random) -> str:
    """A word that no passage has twice, so that none is near another."""
    return "".join(rng.choice(letters) for letters in ("bdfgklmn", "aeiou", "bdfgklmn", "aeiou", "rst"))


def _text(rng: random.Random, words: list[str], sentences: int) -> str:
    """Sentences of words drawn at random, and of names."""
    made = []
    for _ in range(sentences):
        drawn = [rng.choice(words) if rng.random() < 0.7 else _name(rng) for _ in range(rng.randint(5, 14))]
        made.append(" ".join(drawn).capitalize() + rng.choice(".!?"))
    return " ".join(made)


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Write the corpus into `folder`, with BLiMP's file; the folder."""
    rng = random.Random(seed)
    (folder / "gutenberg").mkdir(parents=True)
    for n in range(2):
        (folder / "gutenberg" / f"book_{n}.txt").write_text(_text(rng, _HARD, 300), encoding="utf-8")

    def easy(sentences: int = 12) -> str:
        return _text(rng, _EASY, sentences)

    def hard(sentences: int = 12) -> str:
        return _text(rng, _HARD, sentences)

    write_lines(folder / "gutenberg_more.jsonl", [{"text": hard(40)} for _ in range(3)])
    write_lines(folder / "african_storybook.jsonl", [{"text": easy()} for _ in range(20)])
    write_lines(folder / "bookdash.jsonl", [{"text": easy()} for _ in range(4)])
    write_lines(folder / "pratham_books.jsonl", [{"text": easy()} for _ in range(6)])
    write_lines(folder / "tinystories.jsonl", [{"text": easy()} for _ in range(130)])
    write_lines(
        folder / "onestop_english.jsonl",
        [
            {"title": f"article {n}", "level": level, "text": easy(20) if level == "elementary" else hard(20)}
            for n in range(12)
            for level in ("elementary", "intermediate", "advanced")
        ],
    )
    tales = [{"story": f"tale {n}", "split": "test" if n % 3 == 0 else "train", "text": hard(8)} for n in range(12)]
    write_lines(folder / "fairytaleqa_sections.jsonl", tales)
    asked = [
        {
            "story": tale["story"],
            "split": tale["split"],
            "question": "Who ran?",
            "context": tale["text"][:60],
            "answer": f"{name} of {tale['story']}",
        }
        for tale in tales
        for name in ("A cat", "A dog", "Mom", "She", "We")
    ]
    write_lines(folder / "fairytaleqa_qa.jsonl", asked)
    pairs = [
        {"UID": uid, "sentence_good": "The cat sat.", "sentence_bad": f"The {uid} sit cat."}
        for uid in ("first", "second")
        for _ in range(3)
    ]
    write_lines(folder / "blimp.jsonl", pairs)
    return folder
