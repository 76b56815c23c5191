"""What `pretrain --dry-run` says, its settings in a file, and the settings that all runs have."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from tuning_models import RAW, TINY, write_jsonl

from phi3_mlx import load_tokenizer, tokenize_data
from phi3_mlx.cli import main
from phi3_mlx.errors import OptionError
from phi3_mlx.pretraining import dryrun
from phi3_mlx.pretraining.dryrun import describe_pretraining
from phi3_mlx.pretraining.run import prepare_pretraining
from phi3_mlx.pretraining.settings import PretrainSettings
from phi3_mlx.store.family import parameter_count
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.run_settings import RunSettings, in_order
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.settings_file import read_settings

WORDS = "the a duck frog hat ball ran saw found and then it was red big happy in on sun moon".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a shape and two folders of token shards."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "config.json").write_text(json.dumps({**RAW, "num_hidden_layers": 1}))
    rng, tokenizer = np.random.default_rng(0), load_tokenizer("tiny")
    for name, longest in (("web", 90), ("books", 12)):
        texts = [" ".join(rng.choice(WORDS, int(rng.integers(3, longest)))) for _ in range(40)]
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in [*texts, "<|endoftext|>"]])
        tokenize_data(folder / f"{name}.jsonl", folder / name, tokenizer)
    return folder


@pytest.fixture
def call(place, capsys, monkeypatch):
    """(exit code, stdout, stderr) of a command in that folder, whose place is cut out of what is said."""
    monkeypatch.chdir(place)

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        out, err = capsys.readouterr()
        return ended.value.code, out.replace(f"{place}/", ""), err

    return run


SHAPE = ("pretrain", "config.json", "--tokenizer", TINY)
MIX = ("-d", "web=0.75", "-d", "books=0.25", "--phase2-data", "books=1", "--phase2-from", "0.5")
SIZE = ("--steps", 40, "--batch-size", 4, "--max-length", 32, "--holdout", "0.1")


def lines_after(text, head):
    """The lines of a part of the report."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(head))
    end = next((n for n in range(first + 1, len(lines)) if not lines[n].startswith(" ")), len(lines))
    return lines[first:end]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(place, call):
    before = sorted(place.iterdir())
    rates = ("--optimizer", "muon", "--schedule", "wsd", "--warmup", 4, "--phase2-rate", "1e-4")
    code, out, err = call(*SHAPE, *MIX, *SIZE, *rates, "--dry-run")
    assert (code, err) == (0, "")
    assert sorted(place.iterdir()) == before
    prepared = prepare_pretraining(
        PretrainSettings(
            config="config.json",
            tokenizer=str(TINY),
            data=("web=0.75", "books=0.25"),
            phase2_data=("books=1",),
            phase2_from=0.5,
            steps=40,
            batch_size=4,
            max_length=32,
            holdout=0.1,
            output="o",
        )
    )
    train, batches = prepared.corpus.train, prepared.corpus.batches
    numbers = parameter_count(prepared.config)
    assert out.startswith(
        f"Model     {numbers:,} parameters: 1 layers of 64, vocabulary 4,032; {4 * numbers / 1e6:.1f} MB"
    )
    web, books = train.sources
    data = lines_after(out, "Data")
    assert data[0].startswith(
        f"Data      web: {web.documents} documents to train on, {web.lengths.sum():,} tokens in {len(web)} rows of at "
        f"most 32; {web.cut} longer than a row and cut into pieces"
    )
    assert data[1].startswith(f"          books: {books.documents} documents to train on")
    assert web.cut > 5
    assert books.cut == 0
    assert "cut" not in data[1]
    assert sum("1 left out, of one token" in line for line in data) == 2
    assert web.documents + books.documents + 8 + 2 == 82
    assert "          8 of 82 documents were held out to validate on" in data
    # Rows as the batches have them, step by step.
    source_of = np.repeat([0, 1], [len(web), len(books)])
    for number, steps in ((1, range(20)), (2, range(20, 40))):
        counts = np.bincount([source_of[row] for step in steps for row in batches.batch(step)], minlength=2)
        said = lines_after(out, f"Phase {number}")
        assert said[0] == f"Phase {number}   steps {steps[0] + 1} to {steps[-1] + 1}"
        tokens = counts * [web.lengths.mean(), books.lengths.mean()]
        expected = [
            f"          {name}: {count} rows, {share:.1%} of the tokens; read {count / len(rows):.2f} times"
            for name, rows, count, share in zip(
                ("web", "books"), (web, books), counts, tokens / tokens.sum(), strict=True
            )
            if count
        ]
        assert said[1:] == expected
    total = sum(
        train[row].sequences[0].ids.size * 0 + train.lengths[row] for s in range(40) for row in batches.batch(s)
    )
    told = re.search(r"Steps     40 of 4 rows, about ([\d,]+) tokens each: ([\d,]+) tokens, ([\d.]+) times", out)
    each, whole = (int(told[n].replace(",", "")) for n in (1, 2))
    assert whole == pytest.approx(total, rel=0.05)
    assert each == pytest.approx(whole / 40, abs=1)
    assert float(told[3]) == pytest.approx(whole / train.lengths.sum(), abs=0.01)
    rate = {int(line.split()[0]): [*map(float, line.split()[1:])] for line in lines_after(out, "Rates")[1:]}
    assert rate[1] == [0.0002, 0.004]
    assert rate[5] == rate[20] == [0.001, 0.02]
    assert rate[21] == [0.0001, 0.002]
    assert rate[33] == [0.0001, 0.002]  # the last fifth falls
    assert rate[40] == pytest.approx([0.0001 / 8, 0.002 / 8], rel=1e-2)
    assert "Memory    about" in out
    assert "fits in" in out
    assert re.search(r"Time      about .* of training; [\d,]+ tok/s in one batch", out)


def test_a_dry_run_shows_a_row_with_the_borders_of_its_documents(place, call):
    code, out, _ = call(*SHAPE, "-d", "books", "--steps", 2, "--batch-size", 4, "--max-length", 64, "--dry-run")
    assert code == 0
    row = lines_after(out, "Row")
    texts = [json.loads(line)["text"] for line in (place / "books.jsonl").read_text().splitlines()]
    count = int(re.match(r"Row       of the first step, from books: \d+ tokens of (\d+) documents$", row[0])[1])
    assert count > 4
    shown = [re.match(r"          document (\d+) ⟦(.*)⟧$", line) for line in row[1:5]]
    assert [match[2] for match in shown] == [f"{texts[int(match[1])]}<|endoftext|>" for match in shown]
    assert row[5] == f"          and {count - 4} more"
    # A piece of a long document says where it begins.
    code, out, _ = call(*SHAPE, "-d", "web", "--steps", 2, "--batch-size", 40, "--max-length", 8, "--dry-run")
    rows = [line for line in lines_after(out, "Row") if "document" in line]
    assert any(re.search(r"document \d+ from token (9|17|25|33|41|49|57|65) on ⟦", line) for line in rows), rows


class Row:
    def __init__(self, *lengths):
        self.sequences = [Example(np.arange(length) + 10, np.ones(length, bool), "a:1") for length in lengths]


def test_a_long_document_is_shown_by_its_beginning_and_the_row_of_most_documents_is_taken():
    class Rows(list):
        directory, lengths = "web", np.array([71, 30])

        def pieces(self, place):
            return [[(3, 0), (8, 30)], [(5, 0)]][place]

    rows = Rows([Row(31, 40), Row(30)])
    train = SimpleNamespace(find=lambda row: (rows, row))
    decoder = SimpleNamespace(decode=lambda ids, skip_special: f"{len(ids)} tokens from {ids[0]}")
    assert dryrun._row_lines(train, [1, 0], decoder) == [
        "Row       of the first step, from web: 71 tokens of 2 documents",
        "          document 3 ⟦30 tokens from 10 … 1 more tokens⟧",
        "          document 8 from token 31 on ⟦30 tokens from 10 … 10 more tokens⟧",
    ]
    assert dryrun._row_lines(train, [1], decoder) == [
        "Row       of the first step, from web: 30 tokens of 1 document",
        "          document 5 ⟦30 tokens from 10⟧",
    ]


def test_a_dry_run_says_what_does_not_fit_as_the_run_would(call):
    code, out, _ = call(*SHAPE, "-d", "web", *SIZE, "--memory", "2MB", "--dry-run")
    assert code == 0
    assert "does NOT fit in 2.0 MB; even with --gradient-checkpointing" in out
    assert "Time" not in out
    assert "Time" in call(*SHAPE, "-d", "web", *SIZE, "--memory", "2MB", "--dry-run", "--force")[1]


def test_a_long_run_is_described_without_counting_row_by_row(place, monkeypatch):
    monkeypatch.chdir(place)
    settings = PretrainSettings(
        config="config.json", tokenizer=str(TINY), data=("web", "books=3"), output="o", steps=10**6, max_length=32
    )
    prepared = prepare_pretraining(settings)
    monkeypatch.setattr(type(prepared.corpus.batches), "read", None)
    rows = [
        int(n.replace(",", "")) for n in re.findall(r": ([\d,]+) rows, ", describe_pretraining(prepared, measure=False))
    ]
    assert sum(rows) == 32 * 10**6


# Settings in a file


def test_settings_of_a_file_are_overruled_by_options(place, call, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"config: config.json\ntokenizer: {TINY}\ndata: [web=0.5, books]\nmax_length: 32\nbatch_size: 2\nepochs: 3\n"
        "learning_rate: 1e-3\nholdout: 0\n"
    )
    out = tmp_path / "out"
    code, _, err = call("pretrain", "-c", file, "-o", out, "--steps", 1, "--batch-size", 3, "-d", "books")
    assert code == 0, err
    stored = json.loads((out / "run.json").read_text())["settings"]
    assert stored["data"] == [f"{place}/books=1.0"]
    assert (stored["steps"], stored["batch_size"], stored["max_length"], stored["holdout"]) == (1, 3, 32, 0.0)
    assert [*stored][-9:] == [field.name for field in dataclasses.fields(RunSettings)]
    assert call("pretrain", "--resume", "-c", file, "-o", out, "-d", "books")[2].startswith(
        "phi3-mlx: --resume uses the"
    )
    file.write_text("holdout: 0\n")
    assert call("pretrain", "--resume", "-c", file, "-o", out)[0] == 0
    code, _, err = call("pretrain", "--resume", "-c", file)
    assert (code, "--resume needs -o" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: 8", "unknown setting 'rank'"),
        ("learning_rate: fast", "learning_rate is 'fast'; expected a number"),
        ("muon_rates: 1", "did you mean muon_rate?"),
        ("zzz: 1", "known are config, data, output"),
        ("tokenizer: ''", "tokenizer is empty"),
    ],
)
def test_a_file_is_checked_by_the_settings_of_the_command(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(OptionError) as caught:
        read_settings(tmp_path / "run.yaml", PretrainSettings)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ([], "argument 'CONFIG'"),
        (["c.json"], "option '-d' / '--data'"),
        (["c.json", "-d", "x"], "option '-o' / '--output'"),
    ],
)
def test_what_is_missing_is_named(call, words, missing):
    code, _, err = call("pretrain", *words)
    assert code == 2
    assert err == f"phi3-mlx: Missing {missing}; see phi3-mlx pretrain -h\n"


def test_an_empty_sample_is_refused(call):
    code, _, err = call(*SHAPE, "-d", "web", *SIZE, "-o", "out", "--sample", " ")
    assert (code, err) == (2, "phi3-mlx: a sample prompt is empty; give some text\n")


# What all runs have


@pytest.mark.parametrize("kind", [Settings, PretrainSettings])
def test_a_batch_has_at_most_as_many_parts_as_examples(kind):
    given = {"data": "d", "output": "o"} | ({"config": "c"} if kind is PretrainSettings else {})
    assert kind.of({**given, "batch_size": 3, "accumulate": 3}).accumulate == 3
    with pytest.raises(OptionError, match="accumulate 4 is more than batch_size 3"):
        kind.of({**given, "batch_size": 3, "accumulate": 4})


@pytest.mark.parametrize("kind", [Settings, PretrainSettings])
def test_what_all_runs_have_is_the_same_and_comes_last(kind):
    shared = [field.name for field in dataclasses.fields(RunSettings)]
    names = [field.name for field in in_order(kind)]
    assert names[-len(shared) :] == shared
    assert len({*names}) == len(names)
    for field in in_order(kind):
        if field.name in shared and field.name != "dtype":
            assert field.metadata is next(f for f in dataclasses.fields(RunSettings) if f.name == field.name).metadata
    given = {"config": "c", "data": ("d",), "output": "o"} if kind is PretrainSettings else {"data": "d", "output": "o"}
    assert [*kind(**given).as_dict()] == names


def test_settings_of_a_kind_that_is_neither_cannot_be():
    with pytest.raises(TypeError, match="abstract"):
        RunSettings()
