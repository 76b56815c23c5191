"""phi3-mlx data filter: texts just inside and just outside each bound, against values that a reader can count."""

import itertools
import json
import time

import pytest
from test_data_steps import rows_of, run, write

from phi3_mlx import filter_data
from phi3_mlx.data.filtering import chosen_rules
from phi3_mlx.data.quality import RULE_SETS, RULES, TextParts
from phi3_mlx.errors import DataError, OptionError


def lines(*counted):
    """("a", 3) gives three lines; a text without a count is one."""
    return "\n".join(itertools.chain.from_iterable([part[0]] * part[1] for part in counted))


def distinct(count, form="line {}"):
    return [form.format(n) for n in range(count)]


def repeated_run(length, characters):
    """A run of words of one letter, twice, in a text of so many characters without its spaces."""
    words = [chr(ord("a") + n) for n in range(length)]
    return " ".join([*words, "z" * (characters - 2 * length), *words])


# rule: a text at the bound or just inside with its value, and one just outside
EDGES = {
    "words": [("w " * 50, 50, "w " * 49, 49), ("w " * 100_000, 100_000, "w " * 100_001, 100_001)],
    "mean-word-length": [("abc def", 3, "abc de", 2.5), ("a" * 10, 10, "a" * 10 + " " + "b" * 11, 10.5)],
    "hash-symbols": [("# " + "w " * 9, 1 / 10, "## " + "w " * 8, 2 / 9)],
    "ellipses": [("w... " + "w " * 9, 1 / 10, "w... " + "w " * 8, 1 / 9), ("w… " * 1 + "w " * 9, 0.1, "w… w", 0.5)],
    "bullet-lines": [
        (lines(("• x", 5), ("- x", 3), ("* x", 1), ("x", 1)), 9 / 10, lines(("• x", 10), ("x", 1)), 10 / 11),
        (lines(("-5 degrees", 1), ("**bold**", 1)), 0, lines(("- 5 degrees", 1)), 1),
    ],
    "ellipsis-lines": [
        (lines(("More ...", 2), ("More…", 1), ("x", 7)), 3 / 10, lines(("More...", 3), ("x", 6)), 3 / 9),
    ],
    "alphabetic-words": [("a é я1 東 7", 4 / 5, "a b c d e f g 8 9", 7 / 9)],
    "stop-words": [("The dog, OF war", 2, "The the other", 1)],
    "duplicate-lines": [
        ("\n".join([*distinct(7), *distinct(3)]), 3 / 10, "\n\n".join([*distinct(6), *distinct(3)]), 3 / 9),
    ],
    "duplicate-paragraphs": [
        ("\n\n".join([*distinct(7, "a\nb {}"), *distinct(3, "a\nb {}")]), 3 / 10,
         "\n \n".join([*distinct(6, "a\nb {}"), *distinct(3, "a\nb {}")]), 3 / 9),
    ],
    "duplicate-line-characters": [("aa\naa\nbbbbbb", 2 / 10, "aaa\naaa\nbbbbbb", 3 / 12)],
    "duplicate-paragraph-characters": [("aa\n\naa\n\nbbbbbb", 2 / 10, "aaa\n\naaa\n\nbbbbbb", 3 / 12)],
    "top-2-gram": [("ab cd " + "x" * 32 + " ab cd", 8 / 40, "ab cd " + "x" * 31 + " ab cd", 8 / 39)],
    "top-3-gram": [(repeated_run(3, 34), 6 / 34, repeated_run(3, 33), 6 / 33)],
    "top-4-gram": [(repeated_run(4, 50), 8 / 50, repeated_run(4, 49), 8 / 49)],
    "duplicate-5-grams": [(repeated_run(5, 67), 10 / 67, repeated_run(5, 66), 10 / 66)],
    "duplicate-6-grams": [(repeated_run(6, 86), 12 / 86, repeated_run(6, 85), 12 / 85)],
    "duplicate-7-grams": [(repeated_run(7, 108), 14 / 108, repeated_run(7, 107), 14 / 107)],
    "duplicate-8-grams": [(repeated_run(8, 134), 16 / 134, repeated_run(8, 133), 16 / 133)],
    "duplicate-9-grams": [(repeated_run(9, 164), 18 / 164, repeated_run(9, 163), 18 / 163)],
    "duplicate-10-grams": [(repeated_run(10, 200), 20 / 200, repeated_run(10, 199), 20 / 199)],
    "sentences": [("One. Two! Three", 3, 'He said "One." Two?', 2)],
    "lorem-ipsum": [("Lorem. Ipsum", 0, "LOREM ipsum", 1)],
    "curly-brackets": [("(x)", 0, "{}", 1), ("[x}", 0, "{", 1)],
}  # fmt: skip
CASES = [(rule, *case) for rule, cases in EDGES.items() for case in cases]


@pytest.mark.parametrize(("rule", "inside", "value", "outside", "value_outside"), CASES)
def test_a_text_at_a_bound_stays_and_one_beyond_it_is_removed_with_its_value(
    tmp_path, rule, inside, value, outside, value_outside
):
    assert RULES[rule].measure(TextParts(inside)) == pytest.approx(value, abs=1e-12)
    path = write(tmp_path / "a.jsonl", [{"text": inside, "n": 1}, {"text": outside, "n": 2}])
    report = filter_data(path, tmp_path / "out", rules=rule)
    assert [row["n"] for row in rows_of(tmp_path / "out" / "data.jsonl")] == [1]
    [line] = rows_of(tmp_path / "out" / "removed.jsonl")
    assert line == {
        "source": f"{path}:2", "reason": rule, "value": pytest.approx(value_outside, abs=1e-6),
        "bound": report["rules"][rule]["bound"], "also": {},
    }  # fmt: skip
    assert report["rules"][rule]["records"] == 1


def test_every_rule_has_an_edge():
    assert {*EDGES} == {*RULES} - {"characters"}
    assert {name for names in RULE_SETS.values() for name in names} >= {*RULES}


def test_the_reports_bounds_are_those_of_the_papers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    bounds = {
        name: rule["bound"] for name, rule in filter_data(path, tmp_path / "out", rules="gopher")["rules"].items()
    }
    assert bounds["words"] == "at least 50 and at most 100,000"
    assert bounds["stop-words"] == "at least 2"
    assert bounds["bullet-lines"] == "at most 0.9"
    assert len(bounds) == 21


def test_ngrams_that_are_there_once_are_no_repetition_and_each_character_counts_once():
    def value(rule, text):
        return RULES[rule].measure(TextParts(text))

    assert value("top-2-gram", "a b") == value("top-2-gram", "a") == value("top-2-gram", "") == 0
    assert value("top-2-gram", "a a a a") == 1
    assert value("duplicate-5-grams", "a " * 9) == 1
    assert value("top-2-gram", "a b a b cc dd cc dd") == 8 / 12  # the longest of the most frequent
    assert value("duplicate-5-grams", "a b c d e x") == value("duplicate-5-grams", "a b") == 0


def test_length_has_the_bounds_that_are_given(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in ("a b", "a b c", "a b c d", "abcdefghi")])
    report = filter_data(path, tmp_path / "a", rules=["characters"], min_characters=5, max_characters=7)
    assert report["kept"] == 2
    assert [line["value"] for line in rows_of(tmp_path / "a" / "removed.jsonl")] == [3, 9]
    filter_data(path, tmp_path / "b", rules="length", min_words=2, max_words=3)
    assert [line["value"] for line in rows_of(tmp_path / "b" / "removed.jsonl")] == [4, 1]
    assert filter_data(path, tmp_path / "c", rules="words", min_words=0)["kept"] == 4


def test_a_removed_record_names_all_rules_that_it_breaks(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "{ # }"}])
    report = filter_data(path, tmp_path / "out", rules="curly-brackets, hash-symbols,words")
    [line] = rows_of(tmp_path / "out" / "removed.jsonl")
    assert (line["reason"], line["also"]) == ("words", {"hash-symbols": 0.333333, "curly-brackets": 1})
    assert {name: rule["records"] for name, rule in report["rules"].items()} == dict.fromkeys(
        ("words", "hash-symbols", "curly-brackets"), 1
    )
    assert {reason: facts["records"] for reason, facts in report["reasons"].items()} == {"words": 1}


# Rules of lines
PAGE = [
    "Home | About",
    "This line has five words.",
    "It has four words.",
    'She said, "It was a good day"',
    "To be continued in the next part...",
    "Please turn on JavaScript to read this.",
    "We have changed our Privacy Policy for all of you.",
    "",
    "And this line is the last one!",
]


def test_rules_of_lines_take_lines_out_of_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "\n".join(PAGE), "n": 1}, {"text": "Menu"}, {"text": ""}])
    report = filter_data(path, tmp_path / "out", rules="terminal-punctuation,words-per-line,javascript,policy-lines")
    kept = "\n".join([PAGE[1], PAGE[3], "", PAGE[8]])
    assert rows_of(tmp_path / "out" / "data.jsonl") == [{"text": kept, "n": 1}]
    assert {name: rule["lines"] for name, rule in report["line_rules"].items()} == {
        "terminal-punctuation": 3, "words-per-line": 1, "javascript": 1, "policy-lines": 1,
    }  # fmt: skip
    assert {line["reason"] for line in rows_of(tmp_path / "out" / "removed.jsonl")} == {"no lines left"}
    assert report["outputs"]["data.jsonl"]["characters"] == len(kept)
    # the rules of pages see what is left
    assert filter_data(path, tmp_path / "c4", rules="c4")["kept"] == 0
    assert filter_data(path, tmp_path / "pages", rules="c4,-words-per-line")["kept"] == 1


def test_a_record_of_which_no_line_goes_is_written_as_it_was_read(tmp_path):
    line = '{"text":"All of these words stay here.\\r\\nAnd so do all of these.\\u2028",  "x": 1.50}'
    (tmp_path / "a.jsonl").write_text(f"{line}\n", encoding="utf-8")
    filter_data(tmp_path / "a.jsonl", tmp_path / "out", rules="terminal-punctuation,pii")
    assert (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8") == f"{line}\n"


def test_conversations_are_not_torn(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "completion": "Hello there"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'terminal-punctuation' takes lines out .* a conversation"):
        filter_data(path, tmp_path / "out", rules="c4")
    assert filter_data(path, tmp_path / "out", rules="lorem-ipsum,curly-brackets")["kept"] == 1


# What is asked for
def test_names_of_rules_and_sets():
    assert chosen_rules("pii") == ("email", "iban", "card-number", "ip-address", "phone")
    assert chosen_rules(["length", "gopher", "-stop-words", "-length"]) == tuple(
        name for name in RULE_SETS["gopher"] if name not in ("stop-words", "words")
    )
    for rules, said in {
        ("gofer",): "holds 'gofer'; give length, gopher, c4, pii, or",
        ("-words",): "no name before it gave",
        ("words", "-words"): "names none",
        (): "names none",
    }.items():
        with pytest.raises(OptionError, match=said):
            chosen_rules(rules)


def test_bounds_that_nothing_looks_at_or_meets_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(OptionError, match="bound the rule 'characters'; add it to rules=A,B"):
        filter_data(path, tmp_path / "out", rules="gopher", min_characters=5)
    with pytest.raises(OptionError, match="at least 50 and at most 10, which no text is"):
        filter_data(path, tmp_path / "out", max_words=10)
    with pytest.raises(OptionError, match="pii"):
        filter_data(path, tmp_path / "out", pii="hide")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "Write to me@home.org, please."}, {"text": "{"}, {"text": "fine"}])
    assert run("filter", path, "-o", tmp_path / "out", "--rules", "curly-brackets,pii,-phone") == 0
    said = capsys.readouterr().err
    assert "removed 1: curly-brackets" in said
    assert "found 1 in 1 records: email" in said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["options"]["rules"] == [
        "curly-brackets", "pii", "-phone",
    ]  # fmt: skip
    assert run("filter", path, "-o", tmp_path / "x", "--rules", "nothing") == 2
    assert "holds 'nothing'; give length" in capsys.readouterr().err
    assert run("filter", path, "-o", tmp_path / "x", "--min-words", "-1") == 2


def test_time_grows_with_the_text_and_not_with_its_square():
    started = time.process_time()
    for text in ("word " * 200_000, "x" * 10**6, "line\n" * 200_000, "- " * 500_000, ". " * 500_000):
        for name, rule in RULES.items():
            assert rule.measure(TextParts(text)) >= 0, name
    assert time.process_time() - started < 120
