"""The texts of the experiment: read, laid out alike, cut into passages, and freed of what the evaluation has."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_mlx import decontaminate_data, dedupe_data

LONGEST, SHORTEST = 1000, 200  # characters of a passage
KEPT = 100  # one passage of the raw pool in so many is kept for the choice of the learning rate
_TINYSTORIES_HELD, _PRATHAM, _FAIRY_TALES = 100, 160, 150
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})
_MARKS = re.compile(r"\[(?:Illustration|Footnote)[^\]]*\]")
_SENTENCE_ENDS = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+")


@dataclass(frozen=True)
class Texts:
    """What `prepare` wrote: passages as {"source", "text"}, and the evaluation's records."""

    raw: list[dict[str, str]]
    kept: list[dict[str, str]]  # of the raw pool, for the learning rate
    synthetic: list[dict[str, str]]
    labelled: list[dict[str, str]]  # with "level", in no pool; the filter learns from them
    tested: list[dict[str, str]]  # with "level"; the filter is tested on them
    books: list[str]
    tales: list[str]
    stories: list[str]
    questions: list[dict[str, Any]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Records into a .jsonl file; its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def plain(text: str) -> str:
    """A text in the layout that all have: one space between words, straight quotes, no marks of an edition."""
    return " ".join(_MARKS.sub(" ", text.translate(_QUOTES)).replace("_", "").split())


def passages(text: str) -> Iterator[str]:
    """Whole sentences of a text, `SHORTEST` to `LONGEST` characters together; a sentence that is longer is left out."""
    passage = ""
    for sentence in [*_SENTENCE_ENDS.split(plain(text)), None]:
        if passage and (sentence is None or len(passage) + 1 + len(sentence) > LONGEST):
            if len(passage) >= SHORTEST:
                yield passage
            passage = ""
        if sentence is not None and len(sentence) <= LONGEST:
            passage = f"{passage} {sentence}".strip()


def prepare(corpus: Path, work: Path) -> dict[str, Any]:
    """Write all texts into the folder `work`; how many passages were removed and why. Draws are made with seed 0."""
    tales = read_lines(corpus / "fairytaleqa_sections.jsonl")
    stories = [record["text"] for record in read_lines(corpus / "tinystories.jsonl")]
    random.Random(0).shuffle(stories)
    pratham = [record["text"] for record in read_lines(corpus / "pratham_books.jsonl")]
    random.Random(0).shuffle(pratham)
    books = [record["text"] for record in read_lines(corpus / "bookdash.jsonl")] + pratham[:_PRATHAM]
    tested_tales = [record["text"] for record in tales if record["split"] == "test"]
    questions = [record for record in read_lines(corpus / "fairytaleqa_qa.jsonl") if record["split"] == "test"]
    evaluation = {"books": books, "tales": tested_tales, "stories": stories[:_TINYSTORIES_HELD]}
    for name, held in evaluation.items():
        write_lines(work / f"{name}.jsonl", ({"text": plain(text)} for text in held if text.strip()))
    keys = ("story", "question", "answer", "context")
    write_lines(work / "questions.jsonl", ({key: plain(record[key]) for key in keys} for record in questions))

    articles = read_lines(corpus / "onestop_english.jsonl")
    titles = sorted({record["title"] for record in articles})
    random.Random(0).shuffle(titles)
    half = {*titles[: len(titles) // 2]}
    levels = [record for record in articles if record["level"] != "intermediate"]
    for_pool = [record for record in levels if record["title"] not in half]
    for name, records in (("labelled", [r for r in levels if r["title"] in half]), ("tested", for_pool)):
        write_lines(
            work / f"{name}.jsonl",
            ({"text": text, "level": record["level"]} for record in records for text in passages(record["text"])),
        )

    sources = {
        "Gutenberg": [path.read_text(encoding="utf-8") for path in sorted((corpus / "gutenberg").glob("*.txt"))]
        + [record["text"] for record in read_lines(corpus / "gutenberg_more.jsonl")],
        "FairytaleQA": [record["text"] for record in tales if record["split"] != "test"],
        **{
            f"OneStop, {level}": [record["text"] for record in for_pool if record["level"] == level]
            for level in ("elementary", "advanced")
        },
        "African Storybook": [record["text"] for record in read_lines(corpus / "african_storybook.jsonl")],
    }
    return {
        "raw": _clean(work, "raw", sources),
        "synthetic": _clean(work, "synthetic", {"TinyStories": stories[_TINYSTORIES_HELD:]}),
    }


def _clean(work: Path, name: str, sources: dict[str, list[str]]) -> dict[str, int]:
    """Passages of these texts into the folder `name`, without what the evaluation has, and each once; the counts."""
    records = ({"source": source, "text": text} for source, texts in sources.items()
               for whole in texts for text in passages(whole))  # fmt: skip
    cut = write_lines(work / f"{name}-cut.jsonl", records)
    against = [work / f"{held}.jsonl" for held in ("books", "tales", "stories", "questions", "labelled")]
    asked = decontaminate_data(cut, work / f"{name}-clean", against, force=True)
    again = dedupe_data(work / f"{name}-clean", work / name, force=True)
    return {"passages": asked["read"], "of an evaluation": asked["removed"], "duplicates": again["removed"]}


def load(work: Path) -> Texts:
    """What `prepare` wrote."""

    def of_step(name: str) -> list[dict[str, str]]:
        return [record for path in sorted((work / name).glob("*.jsonl")) if path.stem != "removed"
                for record in read_lines(path)]  # fmt: skip

    def of_file(name: str) -> list[str]:
        return [record["text"] for record in read_lines(work / f"{name}.jsonl")]

    raw = of_step("raw")
    random.Random(0).shuffle(raw)
    held = max(1, len(raw) // KEPT)
    return Texts(
        raw[held:],
        raw[:held],
        of_step("synthetic"),
        read_lines(work / "labelled.jsonl"),
        read_lines(work / "tested.jsonl"),
        of_file("books"),
        of_file("tales")[:_FAIRY_TALES],
        of_file("stories"),
        read_lines(work / "questions.jsonl"),
    )
