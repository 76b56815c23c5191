"""Pretraining: token shards, rows, mixes, schedules, and runs that end as if they had never been interrupted."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import moe_models
import numpy as np
import pytest
import small_models
from conftest import ROOT, long_after
from mlx.utils import tree_flatten, tree_map
from tuning_models import RAW, TINY, write_jsonl

from phi3_mlx import load, load_tokenizer, pretrain, tokenize_data
from phi3_mlx.cli import main
from phi3_mlx.errors import CheckpointError, ConfigError, DataError, MemoryLimitError, OptionError, TrainingError
from phi3_mlx.models import parse_config
from phi3_mlx.pretraining.mixture import MixedBatches, Phase
from phi3_mlx.pretraining.next_token import NextToken
from phi3_mlx.pretraining.optimizer import make_pretraining_optimizer, rate_of
from phi3_mlx.pretraining.rows import Rows, Sources
from phi3_mlx.pretraining.run import prepare_pretraining
from phi3_mlx.pretraining.settings import PretrainSettings, shares
from phi3_mlx.pretraining.shards import ShardWriter, TokenShards, tokenizer_fingerprint
from phi3_mlx.pretraining.weights import fresh_model
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.tuning.course import Course
from phi3_mlx.tuning.gradients import Gradients
from phi3_mlx.tuning.log import read_metrics
from phi3_mlx.tuning.trainer import Trainer

WORDS = "the a duck frog hat ball ran saw found and then it was red big happy in on sun moon".split()
SMALL = {"max_length": 48, "batch_size": 4, "holdout": 0.1, "learning_rate": 3e-3}


def story(rng, least=3, most=90):
    return " ".join(rng.choice(WORDS, int(rng.integers(least, most)))) + "."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [story(rng) for _ in range(60)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, texts, tokenizer):
    folder = tmp_path_factory.mktemp("shards")
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    tokenize_data(folder / "texts.jsonl", folder / "shards", tokenizer)
    return folder / "shards"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a config and the bundled tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**RAW, "num_hidden_layers": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", lambda *_: True)


def weights(folder):
    return {name: np.array(array) for name, array in mx.load(str(folder / "model.safetensors")).items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def curve(folder):
    return [(line["kind"], line["step"], line["loss"]) for line in read_metrics(folder)]


# Token shards


def test_shards_hold_what_tune_would_learn_of_each_text(shards, texts, tokenizer):
    opened = TokenShards(shards)
    assert len(opened) == len(texts)
    for n in (0, 7, len(texts) - 1):
        ids = opened.read(n, 0, int(opened.lengths[n])).tolist()
        assert ids == [*tokenizer.encode(texts[n], special=True), tokenizer.eos_token_id]
    assert opened.characters.tolist() == [*map(len, texts)]
    header = json.loads((shards / "tokens.json").read_text())
    assert header["tokens"] == opened.lengths.sum() == (shards / "tokens-00000.bin").stat().st_size / 2
    assert json.loads((shards / "report.json").read_text())["outputs"]["tokens"]["tokens"] == header["tokens"]


def test_several_files_of_ids_hold_whole_documents(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_mlx.pretraining.shards._SHARD_TOKENS", 300)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in [*texts[:20], ""]])
    report = tokenize_data(tmp_path / "texts.jsonl", tmp_path / "shards", tokenizer)
    assert report["removed"] == 1
    opened = TokenShards(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("tokens-*.bin"))) > 2
    for n in range(20):
        ids = opened.read(n, 0, int(opened.lengths[n])).tolist()
        assert ids == [*tokenizer.encode(texts[n], special=True), tokenizer.eos_token_id]


def test_ids_of_several_inputs_are_the_bytes_of_one(texts, tokenizer, tmp_path, monkeypatch):
    """However the inputs are dealt out, and where a document is longer than a file of ids may be."""
    monkeypatch.setattr("phi3_mlx.pretraining.shards._SHARD_TOKENS", 150)
    lines = [{"text": text} for text in [*texts[:6], " ".join(texts[6:10]), *texts[10:16], "", *texts[16:20]]]
    assert len(tokenizer.encode(lines[6]["text"])) > 150
    whole = write_jsonl(tmp_path / "whole.jsonl", lines)
    parts = [
        write_jsonl(tmp_path / f"{first:02d}.jsonl", lines[first:end])
        for first, end in ((0, 5), (5, 7), (7, 13), (13, 14), (14, 18))
    ]
    tokenize_data(whole, tmp_path / "one", tokenizer)
    monkeypatch.setattr("phi3_mlx.data.shards._SMALL_BYTES", 1)
    tokenize_data(parts, tmp_path / "several", tokenizer)
    names = {path.name for path in (tmp_path / "one").iterdir()} - {"report.json"}
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes(), name
    header = json.loads((tmp_path / "one" / "tokens.json").read_text())
    assert header["documents"] == sum(shard["documents"] for shard in header["shards"]) == 17
    sizes = [shard["tokens"] for shard in header["shards"]]
    assert [size > 150 for size in sizes].count(True) == 1
    opened = TokenShards(tmp_path / "several")
    kept = [line["text"] for line in lines if line["text"]]
    for n, text in enumerate(kept):
        assert opened.read(n, 0, int(opened.lengths[n])).tolist()[:-1] == tokenizer.encode(text)
    assert opened.first_ids(np.arange(17)).tolist() == [tokenizer.encode(text)[0] for text in kept]
    other = write_jsonl(tmp_path / "other.jsonl", [*lines[:3], {"text": f"{lines[3]['text']} So."}, *lines[4:]])
    tokenize_data(other, tmp_path / "other", tokenizer)
    assert TokenShards(tmp_path / "other").fingerprint != opened.fingerprint


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_of_large_vocabularies_are_wide_enough(tmp_path, size, dtype):
    documents = [np.array([1, size - 1, 2]), np.array([size - 1])]
    with ExitStack() as files:
        writer = ShardWriter(tmp_path, size, files)
        for ids in documents:
            writer.add(ids, 5)
    writer.finish("made here")
    header = json.loads((tmp_path / "tokens.json").read_text())
    assert (header["dtype"], header["characters"]) == (dtype, 10)
    opened = TokenShards(tmp_path)
    assert [opened.read(n, 0, len(ids)).tolist() for n, ids in enumerate(documents)] == [
        *map(np.ndarray.tolist, documents)
    ]


def test_a_tokenizer_that_makes_other_ids_has_another_fingerprint(tmp_path):
    prints = {tokenizer_fingerprint(load_tokenizer("tiny")), tokenizer_fingerprint(load_tokenizer(TINY))}
    assert len(prints) == 1
    for n, changed in enumerate(({"add_bos_token": True}, {"eos_token": "<|end|>"})):
        (tmp_path / f"{n}").mkdir()
        shutil.copy(TINY / "tokenizer.json", tmp_path / f"{n}")
        given = json.loads((TINY / "tokenizer_config.json").read_text())
        (tmp_path / f"{n}" / "tokenizer_config.json").write_text(json.dumps({**given, **changed}))
        prints.add(tokenizer_fingerprint(read_tokenizer(tmp_path / f"{n}")))
    assert len(prints) == 3


def damaged(shards, to, change):
    shutil.copytree(shards, to)
    change(to)
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda to: (to / "tokens.json").unlink(), "has no tokens.json"),
        (lambda to: (to / "tokens.json").write_text("[]"), "tokens.json"),
        (lambda to: (to / "tokens.json").write_text('{"format": "other"}'), "is no header of token shards"),
        (lambda to: os.truncate(to / "tokens-00000.bin", 100), "has 100 bytes, expected"),
        (lambda to: os.truncate(to / "documents.bin", 8), "has 8 bytes, expected"),
        (lambda to: (to / "documents.bin").unlink(), "cannot be read"),
        (
            lambda to: (to / "documents.bin").write_bytes(bytes((to / "documents.bin").stat().st_size)),
            "is not that of these tokens",
        ),
    ],
)
def test_damaged_shards_are_refused(shards, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        TokenShards(damaged(shards, tmp_path / "damaged", change))


def test_ids_beyond_the_vocabulary_are_refused_when_they_are_read(shards):
    opened = TokenShards(shards)
    rows = Rows(opened, np.arange(len(opened), dtype=np.int32), 48, 0, 100)
    with pytest.raises(DataError, match=r"document.*vocabulary of 100"):
        [rows[i] for i in range(len(rows))]


# Rows and mixes


@pytest.mark.parametrize("length", [5, 48, 512])
def test_rows_hold_every_token_once_and_never_more_than_fit(shards, length):
    opened = TokenShards(shards)
    rows = Rows(opened, np.arange(len(opened), dtype=np.int32), length, 3, 4032)
    predicted = []
    for i, row in enumerate(rows):
        read = [len(sequence) - 1 for sequence in row.sequences]
        assert sum(read) == rows.lengths[i] <= length
        assert rows.scores[i] == sum(n * n for n in read)
        documents = [document for document, _ in rows.pieces(i)]
        assert row.source.endswith(", ".join(map(str, documents[:3])) + (", ..." if len(documents) > 3 else ""))
        for sequence in row.sequences:
            assert not sequence.trained[0]
            assert sequence.trained[1:].all()
            predicted += sequence.ids[1:].tolist()
    whole = [opened.read(n, 1, int(opened.lengths[n]) - 1).tolist() for n in range(len(opened))]
    assert sorted(predicted) == sorted(i for ids in whole for i in ids)
    if length == 512:  # room for whole documents, of which each is one sequence
        held = sorted(tuple(sequence.ids.tolist()) for row in rows for sequence in row.sequences)
        assert held == sorted(tuple(opened.read(n, 0, int(opened.lengths[n])).tolist()) for n in range(len(opened)))
        assert rows.lengths[:-1].mean() > 0.7 * length
    other = Rows(opened, np.arange(len(opened), dtype=np.int32), length, 4, 4032)
    assert [row.source for row in other] != [row.source for row in rows]


def test_every_beginning_of_a_phase_has_its_shares():
    rows, tokens = [50, 700, 31], [50 * 40, 700 * 20, 31 * 30]
    mixes = [(0.7, 0.25, 0.05), (0.1, 0.0, 0.9)]
    batches = MixedBatches(rows, tokens, [Phase(0, mixes[0]), Phase(4000, mixes[1])], batch_size=5, steps=6000, seed=1)
    source_of = np.repeat(np.arange(3), rows)
    means = np.array(tokens) / rows
    for first, mix in ((0, mixes[0]), (4000, mixes[1])):
        taken = np.zeros(3)
        for step in range(first, first + 2000):
            taken += np.bincount(source_of[batches.batch(step)], minlength=3) * means
            if step > first + 40:
                assert np.abs(taken / taken.sum() - mix).max() < 2 / (step - first) ** 0.5 * 0.3
        assert np.abs(taken / taken.sum() - mix).max() < 0.003


def test_a_source_is_read_whole_before_any_of_it_comes_again():
    batches = MixedBatches(
        [7, 20], [70, 200], [Phase(0, (0.5, 0.5)), Phase(9, (0.2, 0.8))], batch_size=3, steps=60, seed=5
    )
    drawn = [row for step in range(60) for row in batches.batch(step)]
    for low, high in ((0, 7), (7, 27)):
        mine, size = [row for row in drawn if low <= row < high], high - low
        readings = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(readings) > 1
        assert all(sorted(reading) == [*range(low, high)] for reading in readings)
        assert readings[0] != readings[1]


def test_a_step_alone_says_its_rows(monkeypatch):
    make = lambda: MixedBatches(  # noqa: E731
        [7, 20], [70, 200], [Phase(0, (0.5, 0.5)), Phase(30, (0.2, 0.8))], batch_size=3, steps=60, seed=5
    )
    monkeypatch.setattr("phi3_mlx.pretraining.mixture._BLOCK", 8)
    batches = make()
    in_turn = [batches.batch(step) for step in range(60)]
    assert [make().batch(step) for step in range(59, -1, -1)] == in_turn[::-1]
    monkeypatch.setattr("phi3_mlx.pretraining.mixture._BLOCK", 1000)
    assert [make().batch(step) for step in range(60)] == in_turn


def test_how_many_rows_of_each_source_some_steps_read(monkeypatch):
    monkeypatch.setattr("phi3_mlx.pretraining.mixture._BLOCK", 16)
    phases = [Phase(0, (0.6, 0.4)), Phase(30, (0.2, 0.8))]
    batches = MixedBatches([7, 20], [70, 200], phases, batch_size=3, steps=60, seed=5)
    for first, end in ((0, 60), (0, 30), (30, 60), (11, 12), (5, 5)):
        rows = [row for step in range(first, end) for row in batches.batch(step)]
        assert batches.counts(first, end).tolist() == [sum(row < 7 for row in rows), sum(row >= 7 for row in rows)]


@pytest.mark.parametrize(("rows", "steps"), [([7, 20], 9), ([7, 21], 10), ([1], 1), ([2, 2], 2)])
def test_an_epoch_has_as_many_steps_as_read_all_rows(rows, steps):
    phases = [Phase(0, (1.0,) * len(rows))]
    assert MixedBatches(rows, rows, phases, batch_size=3, steps=60, seed=5).steps_per_epoch == steps


@pytest.mark.parametrize("given", [("a=0",), ("a=x",), ("=1",), ("a=inf",), ("a=1", "a=2"), ("a=-1",)])
def test_shares_that_are_none_are_refused(given):
    with pytest.raises(OptionError, match="data"):
        shares(given)
    for mix in ("data", "phase2_data"):
        with pytest.raises(OptionError, match="data"):
            PretrainSettings(**{"config": "c", "data": ("d",), "output": "o", mix: given}).check()


def test_a_folder_whose_name_has_a_sign_of_equality_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=2").mkdir()
    assert shares(("a=2", "b=0.5", "c")) == {"a=2": 1.0, "b": 0.5, "c": 1.0}


# Rates


def settings(**given):
    return PretrainSettings(config="c", data=("d",), output="o", **given)


def test_rates_rise_and_fall_as_the_schedules_say():
    rates = lambda **given: [rate_of(settings(learning_rate=1.0, **given), step, 100) for step in range(100)]  # noqa: E731
    wsd = rates(schedule="wsd", warmup=9, decay=0.2)
    assert wsd[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert wsd[9:80] == [1.0] * 71
    assert wsd[80:] == pytest.approx([1 - n / 20 for n in range(20)])
    cosine = rates(schedule="cosine", warmup=0, final_rate=0.1)
    assert cosine == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * n / 100)) / 2 for n in range(100)])
    risen = rates(schedule="cosine", warmup=20)
    assert risen[20:] == pytest.approx([(1 + math.cos(math.pi * n / 80)) / 2 for n in range(80)])
    assert rates(schedule="linear", warmup=20)[20:] == pytest.approx([1 - n / 80 for n in range(80)])
    assert rates(schedule="constant", warmup=4)[4:] == [1.0] * 96
    assert rates(schedule="linear", warmup=0) == pytest.approx([1 - n / 100 for n in range(100)])
    assert rates(schedule="constant")[0] == 0.5  # 1 % of the steps warm up
    second = rates(schedule="constant", warmup=0, phase2_from=0.7, phase2_rate=0.25)
    assert second == [1.0] * 70 + [0.25] * 30
    assert settings(phase2_from=0.29).phase2_step(100) == 29  # 0.29 * 100 is a little less
    assert [settings().warmup_steps(steps) for steps in (40, 60, 1960)] == [0, 1, 20]
    assert settings(warmup=0).warmup_steps(1960) == 0


# Weights to begin with


def test_weights_are_drawn_by_seed_and_name_and_as_wide_as_is_said():
    config = parse_config({**RAW, "hidden_size": 128, "num_hidden_layers": 8})
    one, again, other = (dict(tree_flatten(fresh_model(config, seed, 0.05).parameters())) for seed in (0, 0, 1))
    deeper = dict(tree_flatten(fresh_model(dataclasses.replace(config, num_hidden_layers=9), 0, 0.05).parameters()))
    for name, array in one.items():
        drawn = np.array(array)
        assert np.array_equal(drawn, np.array(again[name]))
        if "norm" in name:
            assert (drawn == 1).all()
            continue
        assert not np.array_equal(drawn, np.array(other[name]))
        std = 0.05 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        assert drawn.std() == pytest.approx(std, rel=0.02), name
        assert abs(drawn.mean()) < std / 20
        assert np.array_equal(drawn, np.array(deeper[name])) == (std == 0.05)


def test_biases_begin_at_zero_and_norms_at_one():
    raw = {**MEMBERS["phi3small"], "vocab_size": 4032}
    for name, array in tree_flatten(fresh_model(parse_config(raw), 0).parameters()):
        if array.ndim < 2:
            assert (np.array(array) == (0.0 if name.endswith("bias") else 1.0)).all(), name


# Runs


def test_a_run_learns_and_leaves_a_model(model, shards, tokenizer, tmp_path):
    seen, reports = [], []
    result = pretrain(
        model,
        shards,
        tmp_path / "out",
        **SMALL,
        steps=24,
        validate_every=8,
        samples=["the duck"],
        sample_tokens=3,
        on_validation=lambda *told: seen.append(told),
        on_step=reports.append,
        notify=lambda _: None,
    )
    assert result.finished
    assert result.product == "model"
    assert reports[0].loss == pytest.approx(math.log(4032), abs=0.2)
    assert reports[-1].loss < reports[0].loss - 2
    assert [step for step, _, _ in seen] == [8, 16, 24]
    assert sum(report.tokens for report in reports) == result.tokens
    lines = [line for line in read_metrics(tmp_path / "out") if line["kind"] == "valid"]
    # Bits per character, from the model that was written, document by document.
    trained, _ = load(tmp_path / "out")
    opened = TokenShards(shards)
    held = np.random.default_rng(0).permutation(len(opened))[:6]
    nats = characters = tokens = 0
    for n in held.tolist():
        ids = opened.read(n, 0, int(opened.lengths[n]))
        for first in range(0, len(ids) - 1, 48):
            piece = mx.array(ids[first : first + 49])
            logits = trained(piece[None, :-1])[0].astype(mx.float32)
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            nats -= float(mx.take_along_axis(scores, piece[1:, None], axis=-1).sum())
        tokens += len(ids) - 1
        characters += int(opened.characters[n])
        characters -= len(tokenizer.decode([ids[0]]))  # nothing predicts it
    assert nats / tokens == pytest.approx(result.best_loss, abs=1e-4)
    best = min(lines, key=lambda line: line["loss"])
    assert best["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, abs=1e-4)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "out" / "last"))
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 3


def test_the_model_goes_through_convert_generate_and_tune(model, shards, tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out, err

    out = tmp_path / "a model"
    _, err = call("pretrain", model / "config.json", "-d", shards, "-o", out, "--steps", 3, "--max-length", 32)
    assert f"the model is in {out}" in err
    assert "bits a character" in err
    text, _ = call("generate", "-m", out, "--raw", "-p", "the duck", "--max-tokens", 3)
    assert text
    call("convert", out, "-o", tmp_path / "packed", "--bits", 4, "--group-size", 32, "--no-report")
    call("generate", "-m", tmp_path / "packed", "--raw", "-p", "the duck", "--max-tokens", 3)
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "Who?", "completion": "The duck."}] * 4)
    call("tune", "-m", out, "-d", tmp_path / "x.jsonl", "-o", tmp_path / "adapter", "--steps", 1, "--rank", 1)


MEMBERS = {
    "phimoe": {**moe_models.RAW, "num_hidden_layers": 1},
    "phi3small": {**small_models.RAW, "hidden_size": 64, "ff_intermediate_size": 64, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_other_members_of_the_family_are_pretrained(shards, tmp_path, name):
    raw = {**MEMBERS[name], "vocab_size": 4032, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    losses = []
    pretrain(
        tmp_path / "config.json",
        shards,
        tmp_path / "out",
        tokenizer=str(TINY),
        **SMALL,
        steps=8,
        warmup=0,
        optimizer="muon",
        on_step=lambda report: losses.append(report.loss),
        notify=lambda _: None,
    )
    assert losses[-1] < losses[0] - 0.1
    trained, _ = load(tmp_path / "out")
    assert bool(mx.isfinite(trained(mx.array([[5, 6, 7]]))).all())


@pytest.mark.parametrize("bos", [False, True])
def test_bits_a_character_count_the_characters_of_what_is_predicted(texts, tmp_path, bos):
    """With BOS every character is; without it the first token of a document says some that cost nothing."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "add_bos_token": bos}))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    tokenizer = load_tokenizer(tmp_path)
    write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in [*texts[:8], "<|endoftext|>"]])
    tokenize_data(tmp_path / "t.jsonl", tmp_path / "valid", tokenizer)
    write_jsonl(tmp_path / "u.jsonl", [{"text": text} for text in texts[8:12]])
    tokenize_data(tmp_path / "u.jsonl", tmp_path / "shards", tokenizer)
    given = {
        "config": str(tmp_path),
        "data": (str(tmp_path / "shards"),),
        "output": "o",
        "valid": str(tmp_path / "valid"),
    }
    corpus = prepare_pretraining(PretrainSettings.of(given)).corpus
    ids = [tokenizer.encode(text) for text in texts[:8]]
    predicted, characters = sum(map(len, ids)), sum(map(len, texts[:8]))
    if bos:  # each first token too, and the last text, which is two tokens
        predicted, characters = predicted + len(ids) + 1, characters + len("<|endoftext|>")
    else:
        characters -= sum(len(tokenizer.decode(document[:1])) for document in ids)
    assert corpus.tokens_per_character == pytest.approx(predicted / characters)


def test_a_models_other_chat_templates_go_along_every_time_it_is_written(model, shards, tmp_path):
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    pretrain(base, shards, tmp_path / "out", **SMALL, steps=2, validate_every=1, notify=lambda _: None)
    for place in (tmp_path / "out", tmp_path / "out" / "last"):
        assert load_tokenizer(place).named_templates == {"tool_use": "tools"}
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").symlink_to(model / "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        pretrain(base, shards, tmp_path / "again", **SMALL, steps=2)
    assert not (tmp_path / "again").exists()


def test_a_packed_models_shape_is_taken_without_its_packing(model, shards, tmp_path):
    """Its config says how its weights are packed, and in which type they are."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    raw = json.loads((base / "config.json").read_text())
    packed = {name: {"group_size": 32, "bits": 4} for name in ("quantization", "quantization_config")}
    (base / "config.json").write_text(json.dumps({**raw, **packed, "dtype": "bfloat16"}))
    pretrain(base, shards, tmp_path / "out", **SMALL, steps=1, notify=lambda _: None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {*packed, "dtype"} & written.keys()
    assert written["torch_dtype"] == "float32"
    assert load(tmp_path / "out")[0].config.quantization is None


def test_dropout_is_that_of_the_settings(model, shards, tmp_path):
    def first_loss(name, dropout):
        reports = []
        options = {**SMALL, "steps": 1, "dropout": dropout, "init_std": 0.2}
        pretrain(model, shards, tmp_path / name, **options, on_step=reports.append, notify=lambda _: None)
        return reports[0].loss

    without = first_loss("without", 0.0)
    assert first_loss("again", 0.0) == without
    assert abs(first_loss("with", 0.5) - without) > 1e-3 * without


def test_weights_in_sixteen_bits_are_written_as_such(model, shards, tmp_path):
    with pytest.warns(UserWarning, match="bfloat16, which loses updates") as caught:
        result = pretrain(model, shards, tmp_path / "out", **SMALL, steps=1, dtype="bfloat16")
    assert [warning.filename for warning in caught] == [__file__]
    assert any("loses updates" in note for note in result.notes)
    assert {array.dtype for array in mx.load(str(tmp_path / "out" / "model.safetensors")).values()} == {mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


MIXED = {
    **SMALL,
    "steps": 14,
    "phase2_from": 0.5,
    "phase2_rate": 1e-3,
    "schedule": "wsd",
    "dropout": 0.1,
    "accumulate": 2,
    "validate_every": 4,
    "save_every": 3,
}


@pytest.mark.parametrize("optimizer", long_after(1, ["muon", "adamw"]))
def test_a_killed_run_goes_on_to_the_same_bits(model, shards, tmp_path, optimizer, texts, tokenizer):
    """kill -9 in the middle: the curve and the weights are those of a run that was never killed."""
    write_jsonl(tmp_path / "b.jsonl", [{"text": text.upper()} for text in texts[:20]])
    tokenize_data(tmp_path / "b.jsonl", tmp_path / "b", tokenizer)
    options = {**MIXED, "optimizer": optimizer}
    mixes = {"data": {shards: 0.8, tmp_path / "b": 0.2}, "phase2_data": {tmp_path / "b": 1.0}}
    pretrain(model, output=tmp_path / "whole", **mixes, **options, notify=lambda _: None)
    script = (
        "import os, signal\nfrom phi3_mlx import pretrain\n"
        "def step(report):\n    if report.step == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"mixes = { ({k: {str(f): s for f, s in v.items()} for k, v in mixes.items()})!r}\n"
        f"pretrain({str(model)!r}, output={str(tmp_path / 'cut')!r}, **mixes, **{options!r}, on_step=step, "
        "notify=lambda _: None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = pretrain(model, output=tmp_path / "cut", **mixes, **options, resume=True, notify=lambda _: None)
    assert result.finished
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "cut")) == 14 + 4
    for place in ("", "last"):
        assert same(weights(tmp_path / "cut" / place), weights(tmp_path / "whole" / place))
    with pytest.raises(TrainingError, match=r"another setting \(seed was 0\)"):
        pretrain(model, output=tmp_path / "cut", **mixes, **options, seed=1, resume=True)
    with pytest.raises(TrainingError, match="another set of training data"):
        pretrain(model, shards, tmp_path / "cut", phase2_data=mixes["phase2_data"], **options, resume=True)


def test_parts_of_a_batch_and_dropout_give_what_the_whole_batch_gives(shards):
    opened = TokenShards(shards)
    rows = Sources([Rows(opened, np.arange(len(opened), dtype=np.int32), 48, 0, 4032)])

    def gradients(accumulate, dropout=0.3):
        given = settings(**{**SMALL, "batch_size": 8}, accumulate=accumulate, dropout=dropout)
        net = fresh_model(parse_config(RAW), 0)
        for layer in net.layers:
            layer.residual_dropout = dropout
        batches = MixedBatches(
            [len(rows)], [int(rows.lengths.sum())], [Phase(0, (1.0,))], batch_size=8, steps=4, seed=0
        )
        course = Course(NextToken(), batches, make_pretraining_optimizer(given), lambda step: 1e-3)
        trainer = Trainer(net, rows, [], given, Path("none"), {}, course=course)
        trainer.model.train()
        loss, found, _ = trainer.gradients(1)
        return loss, dict(tree_flatten(found))

    whole, parts, plain = gradients(1), gradients(4), gradients(1, 0.0)
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert all(mx.allclose(whole[1][name], parts[1][name], rtol=1e-3, atol=1e-3) for name in whole[1])
    assert abs(whole[0] - plain[0]) > 1e-3 * plain[0] / 100
    assert not all(mx.allclose(whole[1][name], plain[1][name], rtol=1e-3, atol=1e-3) for name in whole[1])


def test_norms_do_not_decay_and_all_else_does():

    for optimizer in ("adamw", "muon"):
        given = settings(optimizer=optimizer, learning_rate=0.01, weight_decay=0.5)
        net = fresh_model(parse_config(RAW), 0)
        before = {name: np.array(array) for name, array in tree_flatten(net.parameters())}
        made = make_pretraining_optimizer(given)
        made.init(net.trainable_parameters())

        made.learning_rate = 0.01
        made.update(net, tree_map(mx.zeros_like, net.trainable_parameters()))
        for name, array in tree_flatten(net.parameters()):
            muons = optimizer == "muon" and ".layers." in name
            rate = 0.0 if "norm" in name else 0.02 if muons else 0.01
            assert np.allclose(np.array(array), before[name] * (1 - rate * 0.5), rtol=1e-5), name


def test_what_cannot_be_trained_is_refused_before_it_begins(model, shards, tmp_path, tokenizer):
    def refused(kind, message, config=model, data=shards, **given):
        with pytest.raises(kind, match=message):
            pretrain(config, data, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    refused(DataError, "has no tokens.json", data=tmp_path)
    refused(DataError, "both trained and validated on", valid=shards)
    for wrong in (3, b"x", [3], {3: 1.0}, {"x": "0.5"}, {"x": None}):
        refused(OptionError, "data|share", data=wrong)
    refused(OptionError, "max_length 1,000 is more than the model's context, 512", max_length=1000)
    refused(MemoryLimitError, "accumulate=", memory="40MB")
    refused(OptionError, "decay 0.1 has no effect with schedule='cosine'", decay=0.1)
    refused(OptionError, "muon_rate 0.1 has no effect", muon_rate=0.1)
    refused(OptionError, "final_rate 0.1 has no effect with schedule='constant'", schedule="constant", final_rate=0.1)
    refused(OptionError, "phase2_from 0.5 has no effect without a second phase", phase2_from=0.5)
    refused(OptionError, "holdout 0.1 has no effect where validation data", valid=tmp_path, holdout=0.1)
    refused(OptionError, "tokens 9 has no effect with steps=3", tokens=9, steps=3)
    refused(OptionError, "epochs 2.* has no effect with tokens=9", epochs=2, tokens=9)
    refused(OptionError, "sample_tokens 9 has no effect without a prompt in samples", sample_tokens=9)
    refused(OptionError, "epochs 2.* has no effect with steps=3", epochs=2, steps=3)
    (tmp_path / "c").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps({**RAW, "vocab_size": 4000}))
    refused(ConfigError, "vocab_size 4,000 is less than the 4,0", config=tmp_path / "c")
    other = damaged(
        shards,
        tmp_path / "other",
        lambda to: (to / "tokens.json").write_text(
            (to / "tokens.json").read_text().replace(TokenShards(shards).tokenizer, "f" * 32)
        ),
    )
    refused(DataError, "made with another tokenizer", data=other)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text(json.dumps(RAW))
    refused(OptionError, "has no tokenizer; name a model", config=tmp_path / "d")
    for value in ("x", True, -1, 0):
        (tmp_path / "d" / "config.json").write_text(json.dumps({**RAW, "initializer_range": value}))
        refused(ConfigError, "initializer_range", config=tmp_path / "d", tokenizer=str(TINY))
    refused(OptionError, "learning_rate inf is not a number to train with", learning_rate=float("inf"))
    refused(OptionError, "dtype float16 cannot train whole weights: .*; leave dtype out", dtype="float16")
    write_jsonl(tmp_path / "e.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="no text"):
        tokenize_data(tmp_path / "e.jsonl", tmp_path / "e", tokenizer)
    assert not (tmp_path / "e").exists()


def test_epochs_steps_and_tokens_say_how_long_a_run_is(model, shards):

    def length(**given):
        prepared = prepare_pretraining(
            PretrainSettings.of(
                {
                    "config": str(model),
                    "data": (str(shards),),
                    "output": "o",
                    "max_length": 48,
                    "batch_size": 4,
                    **given,
                }
            )
        )
        return prepared.corpus.batches.steps, prepared.corpus.train

    steps, train = length(epochs=2.0)
    assert steps == round(2 * len(train) / 4)
    assert length(epochs=1e-6)[0] == length(tokens=1)[0] == 1
    assert length(steps=7)[0] == 7
    tokens = int(train.lengths.sum())
    assert length(tokens=3 * tokens)[0] == pytest.approx(3 * len(train) / 4, abs=1)


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(model, shards, tmp_path):
    launch = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launch is None or not mx.distributed.is_available():
        pytest.skip("MLX's launcher is not here")
    program = tmp_path / "phi3.py"
    program.write_text("from phi3_mlx.cli import main\nmain()\n")
    words = f"pretrain {model} -d {shards} --steps 5 --batch-size 5 --max-length 48 --holdout 0.1 --validate-every 2"
    words += " --dropout 0.1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"steps": 5, "batch_size": 5, "max_length": 48, "holdout": 0.1, "validate_every": 2, "dropout": 0.1}
    pretrain(model, shards, tmp_path / "one", **options, notify=lambda _: None)
    two = [launch, "-n", "2", "--python", sys.executable, "--backend", "ring", str(program)]
    done = subprocess.run(
        [*two, *words.split(), "-o", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("the model is in") == 1
    alone, together = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line[:2] for line in alone] == [line[:2] for line in together]
    assert np.allclose([line[2] for line in alone], [line[2] for line in together], atol=1e-4)
    before, after = weights(tmp_path / "one" / "last"), weights(tmp_path / "two" / "last")
    assert all(np.allclose(before[name], after[name], atol=2e-3) for name in before)


def test_the_command_line_resumes_by_the_folder_alone(model, shards, tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        return ended.value.code, capsys.readouterr().err

    out = tmp_path / "out"
    words = ("--steps", 4, "--max-length", 48, "--batch-size", 4)
    assert call("pretrain", model, "-d", shards, "-o", out, *words)[0] == 0
    assert call("pretrain", "--resume", "-o", out)[0] == 0
    code, err = call("pretrain", "--resume", "-o", out, "--seed", 3)
    assert (code, "seed was 0; leave it out" in err) == (2, True), err
    code, err = call("pretrain", model, "-d", shards, "-o", out, *words)
    assert code == 1
    assert "--resume goes on with it" in err
    assert call("pretrain", model, "-o", tmp_path / "b")[0] == 2
    assert call("pretrain", "-d", shards, "-o", tmp_path / "b")[0] == 2
    code, err = call("tune", "--resume", "-o", out)
    assert code != 0
    assert "unknown setting" in err


def test_gradients_of_rows_are_those_of_their_documents_alone(shards):
    """No document sees another: the loss of a row is the sum of its documents', each read alone."""
    opened = TokenShards(shards)
    rows = Rows(opened, np.arange(len(opened), dtype=np.int32), 200, 0, 4032)
    row = max(rows, key=lambda row: len(row.sequences))
    assert len(row.sequences) > 2
    net = fresh_model(parse_config(RAW), 0)
    loss, _, _ = Gradients(net, NextToken()).of(NextToken().part([row], [[]], 0.0))
    alone = 0.0
    for sequence in row.sequences:
        logits = net(mx.array(sequence.ids[None, :-1]))[0]
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        alone -= float(mx.take_along_axis(scores, mx.array(sequence.ids[1:, None]), axis=-1).sum())
    assert loss == pytest.approx(alone, rel=1e-5)


def test_shares_may_be_numbers_of_numpy(model, shards, tmp_path):
    result = pretrain(model, {str(shards): np.float64(0.5)}, tmp_path / "out", steps=1, **SMALL)
    assert result.finished


def test_what_has_nothing_to_validate_on_is_refused(model, shards, tokenizer, tmp_path):
    write_jsonl(tmp_path / "end.jsonl", [{"text": "<|endoftext|>"}])
    tokenize_data(tmp_path / "end.jsonl", tmp_path / "end", tokenizer)
    with pytest.raises(DataError, match="end has no document to validate on of two tokens or more"):
        pretrain(model, shards, tmp_path / "out", **{**SMALL, "holdout": None}, valid=tmp_path / "end", steps=3)


def test_python_warns_of_what_goes_wrong_on_the_way(model, shards, tmp_path, monkeypatch):
    def broken(folder, step):
        raise RuntimeError("no ink")

    monkeypatch.setattr("phi3_mlx.tuning.folder.plot_losses", broken)
    with pytest.warns(UserWarning, match="no loss.png: no ink") as caught:
        pretrain(model, shards, tmp_path / "out", **SMALL, steps=1)
    assert [warning.filename for warning in caught] == [__file__]
    notes = []
    result = pretrain(model, shards, tmp_path / "again", **SMALL, steps=1, notify=notes.append)
    assert tuple(notes) == result.notes
    assert len(notes) == 2


def test_what_a_model_made_is_pretrained_on(model, tokenizer, tmp_path):
    """Passages as `data synthesize` writes them: texts, with where they come from."""
    made = {"text": "The frog\n\nA frog ran to the moon.", "provenance": {"kind": "passages", "seed": 1}}
    write_jsonl(tmp_path / "made.jsonl", [made, {**made, "text": "The ball\n\nIt was red."}])
    tokenize_data(tmp_path / "made.jsonl", tmp_path / "shards", tokenizer)
    assert TokenShards(tmp_path / "shards").characters.tolist() == [len(made["text"]), 21]
    assert pretrain(model, tmp_path / "shards", tmp_path / "out", **{**SMALL, "holdout": 0.0}, steps=1).finished


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phase2_rate": 1e-3, "phase2_from": 1.0}, "phase2_from 1 of 3 steps leaves one of the two phases none"),
        ({"phase2_rate": 1e-3, "phase2_from": 0.1}, "phase2_from 0.1 of 3 steps leaves"),
        ({"holdout": 0.0, "patience": 2}, "patience 2 .*nothing is held out"),
        ({"holdout": 0.0, "samples": ("Once",)}, "samples .*nothing is held out"),
        ({"holdout": 0.001, "patience": 2}, "patience 2 .*without validation: too few documents to hold out"),
        ({"holdout": 0.001, "samples": ("Once",)}, "samples .*without validation: too few documents"),
    ],
)
def test_a_setting_that_would_never_count_is_refused(model, shards, tmp_path, options, said):
    with pytest.raises(OptionError, match=said):
        pretrain(model, shards, tmp_path / "out", steps=3, **{**SMALL, **options})
