"""Personal data by their patterns: what is found, what is not, and that nothing of it is written."""

import time
from collections import Counter

import pytest
from test_data_steps import rows_of, run, write

from phi3_mlx import data_stats, filter_data
from phi3_mlx.data.personal import PATTERNS, masked
from phi3_mlx.errors import DataError

FOUND = {
    "email": ["me@home.org", "first.last+tag@mail.example.co.uk", "jörg@münchen.de", "a_b%c@x-y.io"],
    "iban": [
        "DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19", "NO9386011117947",
        "BE68 5390 0754 7034", "MT84MALT011000012345MTLCAST001S",
    ],
    "card-number": ["4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111", "3782 822463 10005",
                    "378282246310005", "5555555555554444", "4222222222222"],
    "ip-address": ["8.8.8.8", "203.0.114.255", "2001:4860:4860::8888", "2a00:1450:4001:82f:0:0:0:200e"],
    "phone": [
        "+49 (30) 1234567", "+4930123456", "0049 30 123456", "(415) 555-2671", "415-555-2671", "415.555.2671",
        "+1.415.555.2671", "1 415 555 2671", "01 23 45 67 89", "030 1234567", "(020) 7946 0018", "0171/1234567",
    ],
}  # fmt: skip
NOT_FOUND = {
    "email": ["me@home", "@name", "a@b.c", "5 @ 3.00", "user@host:path"],
    "iban": [
        "DE88 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130", "XX89 3704 0044 0532 0130 00",
        "DE893704004405320130001", "GB29 NWBK 6016 1331 9268 1",
    ],
    "card-number": ["4111 1111 1111 1112", "4111111111111112", "411111111111", "1111111111111117", "0.4111111111111111",
                    "4111 1111 1111 111", "4111111111111111234567"],
    "ip-address": ["127.0.0.1", "10.1.2.3", "192.168.0.1", "256.8.8.8", "8.8.8", "1.8.8.8.8", "std::vector", "12:30:45",
                   "::1", "add::cafe", "fe80::1", "2001:4860:4860:8888"],
    "phone": ["2020-01-01", "01-02-2020", "01.02.2020", "1,234,567", "3.14159265358979", "+3.1415926535", "1914-1918",
              "ISBN 978-3-16-148410-0", "12345678901", "x = 100 + 2000000", "call_4155552671", "115-555-2671"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_of in FOUND.items() for given in all_of])
def test_what_is_found_is_masked_whole_and_nothing_beside_it(name, given):
    mask = f"<{name.upper().replace('-', '_')}>"
    counts = Counter()
    for before, behind in (("", ""), ("It is ", "."), ("(", ")"), ("ü: ", ", or"), ("so\n", "\nBut"), ('"', '"')):
        assert masked(f"{before}{given}{behind}", [name], counts) == f"{before}{mask}{behind}"
    assert counts == {name: 6}
    assert masked(f"{given} and {given}", [*PATTERNS], counts) == f"{mask} and {mask}"  # by no other first


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, all_of in NOT_FOUND.items() for given in all_of])
def test_what_is_nothing_of_the_kind_stays(name, given):
    for text in (given, f"It is {given}, or"):
        assert masked(text, [name], Counter()) == text


def test_accounts_behind_each_other_are_found_one_by_one():
    """A space is also what stands within a number, so the first that looks like one reaches into the next."""
    one, other = "DE89370400440532013000", "DE75 5121 0800 1245 1261 99"
    for text, left in ((f"{one} {other}", "<IBAN> <IBAN>"), (f"{other} {one} {one}", "<IBAN> <IBAN> <IBAN>"),
                       (f"XX12 {one}", "XX12 <IBAN>"), (f"KTO00 {other}", "KTO00 <IBAN>")):  # fmt: skip
        assert masked(text, ["iban"], Counter()) == left


def test_a_single_check_digit_is_right():
    for end in ("", "0", "12", "987"):
        cards = [f"411111111111{end}{digit}" for digit in range(10)]
        assert sum(masked(card, ["card-number"], Counter()) != card for card in cards) == 1
    accounts = [f"DE{digits:02} 3704 0044 0532 0130 00" for digits in range(2, 99)]
    assert [text[2:4] for text in accounts if masked(text, ["iban"], Counter()) != text] == ["89"]


def test_what_stands_behind_an_account_or_a_card_is_not_part_of_it():
    text = "DE89 3704 0044 0532 0130 00 BIC COBADEFF, BE68 5390 0754 7034 NEXT, 4111 1111 1111 1111 12/27"
    assert masked("2001:4860::8.8.8.8", [*PATTERNS], counts := Counter()) == "2001:4860::<IP_ADDRESS>"
    assert counts.total() == 1
    assert masked(text, [*PATTERNS], Counter()) == "<IBAN> BIC COBADEFF, <IBAN> NEXT, <CARD_NUMBER> 12/27"


def test_records_are_masked_in_all_their_texts_and_counted(tmp_path):
    rows = [
        {"text": "Ask me@home.org or you@home.org.", "email": "me@home.org", "n": 1},
        {"messages": [{"role": "user", "content": "Call (415) 555-2671"}, {"role": "assistant", "content": "No."}]},
        {"prompt": "Who is 8.8.8.8?", "chosen": "It is 8.8.8.8.", "rejected": "me@home.org"},
        {"text": "Nothing."},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    report = filter_data(path, tmp_path / "out", rules="pii")
    assert rows_of(tmp_path / "out" / "data.jsonl") == [
        {"text": "Ask <EMAIL> or <EMAIL>.", "email": "me@home.org", "n": 1},
        {"messages": [{"role": "user", "content": "Call <PHONE>"}, {"role": "assistant", "content": "No."}]},
        {"prompt": "Who is <IP_ADDRESS>?", "chosen": "It is <IP_ADDRESS>.", "rejected": "<EMAIL>"},
        {"text": "Nothing."},
    ]
    assert report["pii"]["email"] == {"found": 3, "records": 2}
    assert report["pii"]["ip-address"] == {"found": 2, "records": 1}
    assert report["pii"]["phone"] == {"found": 1, "records": 1}
    assert report["pii"]["iban"] == {"found": 0, "records": 0}


def test_dropped_records_are_named_with_how_many_and_not_with_what_was_found(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "Ask me@home.org or 8.8.8.8 or you@home.org."}, {"text": "Nothing."}])
    filter_data(path, tmp_path / "out", rules="pii", pii="drop")
    assert rows_of(tmp_path / "out" / "removed.jsonl") == [
        {"source": f"{path}:1", "reason": "email", "value": 2, "bound": "none", "also": {"ip-address": 1}}
    ]
    assert rows_of(tmp_path / "out" / "data.jsonl") == [{"text": "Nothing."}]
    for name in ("removed.jsonl", "report.json"):
        said = (tmp_path / "out" / name).read_text()
        assert "home.org" not in said
        assert "8.8.8.8" not in said


def test_two_answers_that_a_mask_makes_equal_are_removed(tmp_path):
    row = {"prompt": "Who?", "chosen": "me@home.org", "rejected": "you@home.org"}
    report = filter_data(write(tmp_path / "a.jsonl", [row]), tmp_path / "out", rules="pii")
    assert [*report["reasons"]] == ["no example once masked"]
    assert "home.org" not in (tmp_path / "out" / "report.json").read_text()
    assert "home.org" not in (tmp_path / "out" / "removed.jsonl").read_text()


def test_a_named_field_alone_is_masked(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "me@home.org", "text": "me@home.org"}])
    filter_data(path, tmp_path / "out", rules="pii", field="body")
    assert rows_of(tmp_path / "out" / "data.jsonl") == [{"body": "<EMAIL>", "text": "me@home.org"}]


@pytest.mark.parametrize(
    "piece", ["a", "a.", "a@", "a@a.", "1", "1 ", "1-", "1.", "4111 ", "DE89 ", "A", "::", "1:", "+1("]
)
def test_time_grows_with_the_text_and_not_with_its_square(piece):
    started = time.process_time()
    masked(piece * 200_000, [*PATTERNS], Counter())
    assert time.process_time() - started < 60


# Preferences in stats
def test_stats_know_preferences_as_tune_reads_them(tmp_path, capsys):
    from tokenizer_samples import TINY

    from phi3_mlx.text.tokenizer import read_tokenizer
    from phi3_mlx.tuning.pairs import encode_labelled, encode_pairs, read_labelled, read_pair

    pair = {"prompt": "Who?", "chosen": "A dog.", "rejected": "Two cats."}
    whole = {name: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": name}]
             for name in ("chosen", "rejected")}  # fmt: skip
    label = {"prompt": "Who?", "completion": "Me", "label": False}
    longer = [*whole["chosen"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]
    talk = write(
        tmp_path / "talk.jsonl", [{"prompt": whole["chosen"][:1], "chosen": longer[1:], "rejected": longer[1:2]}]
    )
    assert data_stats(talk)["characters"]["total"] == len("Hi\n\nchosen\n\nAnd?\n\nBye")
    path = write(tmp_path / "a.jsonl", [pair, whole, label, {"text": "x"}, {**label, "label": "spam"}])
    tokenizer = read_tokenizer(TINY)
    report = data_stats(path, tokenizer=tokenizer)
    assert report["tune"]["objectives"] == {"dpo": 2, "kto": 1, "sft": 2}
    assert report["tune"]["refused"] == 0
    assert run("stats", path) == 0
    assert "5 (2 for dpo, 1 for kto, 2 for sft), refuses 0" in capsys.readouterr().out
    said = ("Who?\n\nA dog.\n\nTwo cats.", "Hi\n\nchosen\n\nrejected", "Who?\n\nMe", "x", "Who?\n\nMe")
    assert report["characters"]["total"] == sum(map(len, said))
    only = data_stats(write(tmp_path / "b.jsonl", [pair, whole, label]), tokenizer=tokenizer)["tune"]
    encoded = [
        encode_pairs([read_pair(row, "", {}) for row in (pair, whole)], tokenizer, max_length=1000),
        encode_labelled([read_labelled(label, "", {})], tokenizer, max_length=1000, batch_size=1),
    ]
    assert only["learnt_tokens"] == sum(part.trained_tokens for part in encoded) > 8
    assert only["tokens"]["total"] == sum(sum(part.lengths) for part in encoded)


def test_null_counts_as_absent_as_in_tables_of_several_kinds_of_records(tmp_path):
    nothing = dict.fromkeys(("text", "prompt", "completion", "chosen", "rejected"))
    rows = [
        nothing | {"prompt": "me@home.org?", "completion": "Yes"},
        nothing | {"text": "me@home.org"},
        nothing | {"prompt": "Who?", "chosen": "me@home.org", "rejected": "b"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert data_stats(path)["tune"]["objectives"] == {"sft": 2, "dpo": 1}
    filter_data(path, tmp_path / "out", rules="email")
    kept = rows_of(tmp_path / "out" / "data.jsonl")
    assert [row["prompt"] for row in kept] == ["<EMAIL>?", None, "Who?"]
    assert (kept[1]["text"], kept[2]["chosen"]) == ("<EMAIL>", "<EMAIL>")


def test_a_preference_that_is_none_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Who?", "chosen": "A dog.", "rejected": "A dog."}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'chosen' and 'rejected' say the same"):
        data_stats(path)
