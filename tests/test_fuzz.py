"""Every reader of a file, given files that were changed a little.

It takes them and what it gives is right, or it refuses them with a Phi3Error, in bounded time. `make test-long` tries
many more than every day's tests do.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, seed, settings
from mutants import byte_files, json_files, json_values, safetensors_files
from safetensors.numpy import load_file, save
from tokenizer_samples import tiktoken_ranks
from tuning_models import make_directory, randomize, write_jsonl

from phi3_mlx import PromptCache, convert, generate, load, load_steering, save_steering, tokenize_data
from phi3_mlx.adapters.folder import adapter_files, base_of, write_adapter
from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.config import read_json
from phi3_mlx.conversion.split import phi3_config
from phi3_mlx.data.classifier import TextClassifier, read_classifier
from phi3_mlx.data.score_journal import ScoreJournal
from phi3_mlx.engine.cache_file import Document, read_facts
from phi3_mlx.errors import CheckpointError, Phi3Error
from phi3_mlx.evaluation.journal import ANSWERS, opened
from phi3_mlx.generation.prompt_cache import check_writable, document_ids, read_document
from phi3_mlx.models import parse_config, shapes
from phi3_mlx.pretraining.rows import Rows
from phi3_mlx.pretraining.shards import HEADER, TokenShards
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.safetensors import read_metadata
from phi3_mlx.text.chat import render_chat, render_training_chat
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.tuning.checkpoints import read_checkpoint, save_checkpoint
from phi3_mlx.tuning.data import read_data
from phi3_mlx.tuning.examples import encode_records
from phi3_mlx.tuning.log import METRICS, plot_losses, read_metrics
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.settings_file import read_settings
from phi3_mlx.tuning.stored import stored_settings
from phi3_mlx.tuning.trainer import TrainingProgress

LONGEST = 30  # seconds for one file; each takes some milliseconds
TINY = ROOT / "weights" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a file that failed
TALK = [{"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Yes."}]
IDS = mx.array([[1, 2, 3]])


@contextmanager
def bounded():
    def ring(*_):
        raise TimeoutError(f"a file took more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def step(model):
    logits = model(IDS)
    assert logits.shape == (1, 3, model.config.vocab_size)
    mx.eval(logits)
    return logits


def finite(model):
    assert bool(mx.all(mx.isfinite(step(model))))


def words(directory):
    tokenizer = read_tokenizer(directory)
    ids = tokenizer.encode("Hello <|user|> wörld", special=True)
    stream = tokenizer.stream()
    text = "".join([*map(stream.add, ids), stream.finish()])
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(text, str)
    render_chat(tokenizer, [{"role": "system", "content": "s"}, *TALK[:1]])
    render_training_chat(tokenizer, TALK)


def put(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file.read_bytes()


def _changed_lines(lines):
    """Of a JSON lines file."""
    return json_values(lines).map(
        lambda changed: "\n".join(map(json.dumps, changed if isinstance(changed, list) else [changed])).encode()
    )


# Each makes small files in a folder and gives: the file that is changed, its changes, and what reads it.


def weights(folder):
    base = make_directory(folder / "m", num_hidden_layers=1)
    file = base / "model.safetensors"
    return file, safetensors_files(file.read_bytes()), lambda: step(read_model(base))


def index(folder):
    base = make_directory(folder / "m", num_hidden_layers=1)
    arrays = mx.load(str(base / "model.safetensors"))
    names = sorted(arrays)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, held in shards.items():
        mx.save_safetensors(str(base / shard), {name: arrays[name] for name in held})
    (base / "model.safetensors").unlink()
    content = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    file = base / "model.safetensors.index.json"
    return file, json_files(put(file, json.dumps(content))), lambda: finite(read_model(base))


def config(folder):
    base = make_directory(folder / "m", num_hidden_layers=1)
    return base / "config.json", json_files((base / "config.json").read_bytes()), lambda: step(read_model(base))


def packed_config(folder):
    base = make_directory(folder / "m", bits=4, num_hidden_layers=1)
    return base / "config.json", json_files((base / "config.json").read_bytes()), lambda: step(read_model(base))


def others_config(folder):
    """Of Llama's kind, which `convert` makes a Phi-3 config of."""
    raw = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": None,
        "layer_types": ["full_attention"],
    }
    file = folder / "config.json"
    content = put(file, json.dumps(raw))
    return file, json_files(content), lambda: shapes(parse_config(phi3_config(read_json(file), str(file))))


def tokenizer_json(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder / "tokenizer.json", json_files((TINY / "tokenizer.json").read_bytes()), lambda: words(folder)


def sentencepiece(folder):
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    content = (TINY / "tokenizer.model").read_bytes()
    return folder / "tokenizer.model", byte_files(content, 3000), lambda: words(folder)


def ranks(folder):
    pytest.importorskip("tiktoken")
    made = tiktoken_ranks(folder / "t")
    file = next(made.glob("*.tiktoken"))
    return file, byte_files(file.read_bytes()), lambda: words(made)


def tokenizer_config(folder):
    shutil.copy(TINY / "tokenizer.model", folder)
    file = folder / "tokenizer_config.json"
    return file, json_files(put(file, (TINY / "tokenizer_config.json").read_bytes())), lambda: words(folder)


def added_tokens(folder):
    shutil.copy(TINY / "tokenizer.model", folder)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    file = folder / "added_tokens.json"
    return file, json_files(put(file, '{"<|end|>": 4007, "<|a|>": 4020}')), lambda: words(folder)


def generation_config(folder):
    shutil.copy(TINY / "tokenizer.json", folder)
    file = folder / "generation_config.json"
    shutil.copy(TINY / "tokenizer_config.json", folder)
    return file, json_files(put(file, '{"eos_token_id": [4000, 4007], "bos_token_id": 1}')), lambda: words(folder)


def chat_template(folder):
    shutil.copy(TINY / "tokenizer.json", folder)
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    file = folder / "chat_template.jinja"
    return file, byte_files(put(file, template)), lambda: words(folder)


def _adapter(folder):
    base = make_directory(folder / "m", num_hidden_layers=1)
    model = read_model(base)
    adapters = attach(model, find_targets(model.config, ("o_proj",), None), 2, 4.0)
    randomize(adapters)
    write_adapter(folder / "a", *adapter_files(adapters, 1, base_of(base, str(base))))
    return base, folder / "a"


def adapter_config(folder):
    base, adapter = _adapter(folder)
    file = adapter / "adapter_config.json"
    return file, json_files(file.read_bytes()), lambda: finite(load(str(base), adapter=str(adapter))[0])


def adapter_arrays(folder):
    base, adapter = _adapter(folder)
    file = adapter / "adapters.safetensors"
    return file, safetensors_files(file.read_bytes()), lambda: finite(load(str(base), adapter=str(adapter))[0])


def _peft(folder, name, changes):
    base, adapter = _adapter(folder)
    export_peft(adapter, folder / "peft")

    def read():
        shutil.rmtree(folder / "out", ignore_errors=True)
        import_peft(folder / "peft", folder / "out", str(base))
        finite(load(str(base), adapter=str(folder / "out"))[0])

    file = folder / "peft" / name
    return file, changes(file.read_bytes()), read


def peft_config(folder):
    return _peft(folder, "adapter_config.json", json_files)


def peft_arrays(folder):
    return _peft(folder, "adapter_model.safetensors", safetensors_files)


def _cache(folder, changes):
    base = make_directory(folder / "m", num_hidden_layers=1)
    model, tokenizer = load(str(base))
    document = Document("Tom had a dog. " * 4, None, str(base))
    cache = PromptCache(model, document=document)
    cache.read(document_ids(tokenizer, document))
    file, prompt = folder / "x.cache", [*cache.ids, 5, 6, 7]
    cache.save(file)
    written = mx.load(str(file), format="safetensors")
    mx.eval(written)
    answer = generate(model, tokenizer, prompt, max_tokens=3, prompt_cache=cache)

    def read():
        check_writable(file)
        document_ids(tokenizer, read_document(file)[0])
        again = PromptCache.load(file, model)
        again.check_prefix(prompt, "x.cache")
        held = [array for layer in again.layers_for(model) for array in layer.state]
        assert all(mx.array_equal(array, written[f"{n // 2}.{n % 2}"]) for n, array in enumerate(held))
        assert generate(model, tokenizer, prompt, max_tokens=3, prompt_cache=again) == answer

    return file, changes(file), read


def cache_file(folder):
    return _cache(folder, lambda file: safetensors_files(file.read_bytes()))


def cache_facts(folder):
    def changes(file):
        facts, arrays = dataclasses.asdict(read_facts(file)), mx.load(str(file), format="safetensors")
        mx.eval(arrays)
        facts["format"] = "phi3-mlx prompt cache 4"

        def written(changed):
            mx.save_safetensors(str(folder / "edited.safetensors"), arrays, {"phi3-mlx": json.dumps(changed)})
            return (folder / "edited.safetensors").read_bytes()

        return json_values(facts).map(written)

    return _cache(folder, changes)


def examples(folder):
    tokenizer = read_tokenizer(TINY)
    lines = [{"messages": TALK}, {"prompt": "a", "completion": "b", "system": "c"}, {"text": "Hello <|end|> x"}]
    file = write_jsonl(folder / "d.jsonl", lines)

    def read():
        splits = read_data(file)
        for overflow, trained in (("drop", "answers"), ("split", "all"), ("truncate", "last")):
            encode_records(splits.train, tokenizer, max_length=16, overflow=overflow, train_on=trained)

    return file, _changed_lines(lines) | byte_files(file.read_bytes()), read


def recipe(folder):
    base = make_directory(folder / "m", num_hidden_layers=1)
    content = {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32},
    }

    def read():
        shutil.rmtree(folder / "out", ignore_errors=True)
        convert(base, folder / "out", recipe=folder / "recipe.json", report=False)
        finite(read_model(folder / "out"))

    return folder / "recipe.json", json_files(put(folder / "recipe.json", json.dumps(content))), read


def steering_vectors(folder):
    file = save_steering({1: mx.ones(16), 2: mx.zeros(16)}, folder / "x.safetensors")
    return file, safetensors_files(file.read_bytes()), lambda: finite_arrays(load_steering(file))


def steering_gguf(folder):
    pytest.importorskip("gguf")
    file = save_steering({1: mx.ones(16), 2: mx.zeros(16)}, folder / "x.gguf")
    return file, byte_files(file.read_bytes()), lambda: finite_arrays(load_steering(file))


def text_classifier(folder):
    file = folder / "classifier.safetensors"
    TextClassifier(np.linspace(-1, 1, 2**18, dtype=np.float32), 0.5, 2.0, -0.25).write(file)
    content, arrays = file.read_bytes(), load_file(file)
    head = json.loads(read_metadata(file)["phi3_mlx_classifier"])
    heads = json_values(head).map(lambda changed: save(arrays, {"phi3_mlx_classifier": json.dumps(changed)}))

    def read():
        for text in ("", "A text of words.", "\0 \ud800"):
            assert 0 <= read_classifier(folder).probability(text) <= 1

    return file, safetensors_files(content) | heads, read


def finite_arrays(vectors):
    assert all(mx.isfinite(vector).all() for vector in vectors.values())


def gguf_file(folder):
    samples = pytest.importorskip("gguf_samples")
    raw = json.loads((make_directory(folder / "m", num_hidden_layers=1, vocab_size=64) / "config.json").read_text())
    tensors = samples.phi3_tensors(raw, samples.weights_of(raw))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    meta = {**samples.metadata_of(raw, "phi3"), **samples.TOY_TOKENS, "tokenizer.chat_template": template}
    file = samples.write_gguf(folder / "x.gguf", "phi3", meta, tensors)
    content = file.read_bytes()

    def read():
        shutil.rmtree(folder / "out", ignore_errors=True)
        convert(file, folder / "out", dequantize=True, allow_nan=True)
        step(read_model(folder / "out"))
        words(folder / "out")

    return file, byte_files(content, 600) | byte_files(content, 2000) | byte_files(content), read


def run_yaml(folder):
    content = {"data": "d.jsonl", "output": "o", "rank": 8, "alpha": 16.0, "targets": ["q_proj"], "samples": ["Hi."]}
    text = json_values(content).map(lambda changed: yaml.safe_dump(changed, allow_unicode=False).encode())
    file = folder / "run.yaml"
    whole = put(file, yaml.safe_dump(content))
    return file, text | byte_files(whole), lambda: Settings(**read_settings(file)).check()


def run_json(folder):
    content = {"settings": Settings(data="d", output="o").as_dict(), "base_model": {"name": "tiny"}}
    file = folder / "run.json"
    return file, json_files(put(file, json.dumps(content))), lambda: stored_settings(folder)


def metrics(folder):
    lines = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "valid", "step": 1, "loss": 3.0}]
    file = write_jsonl(folder / METRICS, lines)

    def read():
        assert all(type(line["step"]) is int and "kind" in line for line in read_metrics(folder))
        plot_losses(folder)

    return file, _changed_lines(lines) | byte_files(file.read_bytes()), read


def _checkpoint(folder, name, changes):
    progress = TrainingProgress(
        step=4, tokens=100, trained_tokens=50, best_loss=1.5, best_step=2, last_loss=2.0, worse=1
    )
    made = save_checkpoint(folder, 4, {"a": mx.ones((2, 3))}, {"v": mx.ones(2)}, vars(progress))

    def read():
        arrays, optimizer, state = read_checkpoint(made)
        assert all(bool(mx.all(mx.isfinite(array))) for array in [*arrays.values(), *optimizer.values()])
        assert TrainingProgress.of(state).step == 4

    return made / name, changes((made / name).read_bytes()), read


def checkpoint_state(folder):
    return _checkpoint(folder, "state.json", json_files)


def checkpoint_arrays(folder):
    return _checkpoint(folder, "weights.safetensors", safetensors_files)


def answers_of_an_evaluation(folder):
    lines = [
        {"phi3_mlx": "answers", "format": 1, "model": "abc", "limit": 3},
        {"kind": "loglikelihood", "questions": 2, "digest": hashlib.sha256(b"[1, 2]").hexdigest()},
        {"kind": "loglikelihood", "place": 1, "result": [-2.5, True]},
        {"kind": "generate_until", "questions": 1, "digest": hashlib.sha256(b"[3]").hexdigest()},
        {"kind": "generate_until", "place": 0, "result": ["a text", "stop"]},
    ]
    file = write_jsonl(folder / ANSWERS, lines)

    def read():
        with opened(folder, {"model": "abc", "limit": 3}) as journal:
            for kind, asked in (("loglikelihood", [1, 2]), ("generate_until", [3])):
                for place, (first, second) in journal.begin(kind, asked).items():
                    assert 0 <= place < len(asked)
                    assert type(first) is (str if kind == "generate_until" else float)
                    assert type(second) is (str if kind == "generate_until" else bool)

    return file, _changed_lines(lines) | byte_files(file.read_bytes()), read


def token_header(folder):
    texts = write_jsonl(folder / "texts.jsonl", [{"text": f"The frog number {n}."} for n in range(5)])
    tokenize_data(texts, folder / "shards", read_tokenizer(TINY))
    file = folder / "shards" / HEADER

    def read():
        shards = TokenShards(folder / "shards")
        rows = Rows(shards, np.arange(len(shards), dtype=np.int32), 8, 0, 4032)
        assert sum(len(sequence) - 1 for row in rows for sequence in row.sequences) == rows.lengths.sum()

    return file, json_files(file.read_bytes()), read


def kept_scores(folder):
    lines = [
        {"phi3_mlx": "scores", "format": 1, "model": "abc"},
        {"text": "12ab", "score": {"rating": 2.5, "cut": False}},
        {"text": "34cd", "score": {"rating": None, "cut": True}},
    ]
    file = write_jsonl(folder / "scores.jsonl", lines)

    def read():
        with file.open("r+b") as opened_file:
            journal = ScoreJournal(file, opened_file, {"model": "abc"}, ["rating", "cut"])
            for digest in ("12ab", "34cd"):
                score = journal.known(digest)
                assert score is None or all(math.isfinite(value or 0) for value in score.values())

    return file, _changed_lines(lines) | byte_files(file.read_bytes()), read


# How many files are tried: every day, and in the long run.
READERS = {
    weights: 30,
    index: 30,
    config: 50,
    packed_config: 50,
    others_config: 50,
    tokenizer_json: 15,
    sentencepiece: 30,
    ranks: 10,
    tokenizer_config: 25,
    added_tokens: 30,
    generation_config: 12,
    chat_template: 15,
    adapter_config: 15,
    adapter_arrays: 15,
    peft_config: 20,
    peft_arrays: 12,
    cache_file: 40,
    cache_facts: 40,
    examples: 40,
    recipe: 15,
    gguf_file: 30,
    steering_vectors: 40,
    steering_gguf: 40,
    text_classifier: 40,
    run_yaml: 40,
    run_json: 60,
    metrics: 5,
    answers_of_an_evaluation: 40,
    kept_scores: 40,
    checkpoint_state: 40,
    checkpoint_arrays: 40,
    token_header: 40,
}


def try_files(reader, folder, count, start):
    file, changed, read = reader(folder)
    read()  # as it is, it is read

    @seed(start)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed)
    def tried(content):
        file.write_bytes(content)  # the shortest that fails is left here
        refused = None
        try:
            with bounded():
                read()
        except Phi3Error as error:
            refused = error
        # A model's may be a list of what does not fit.
        assert refused is None or isinstance(refused, CheckpointError) or "\n" not in str(refused)

    tried()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_changed_file_is_read_right_or_refused(reader, tmp_path):
    try_files(reader, tmp_path, READERS[reader], 1)


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_many_changed_files_are_read_right_or_refused(reader, tmp_path):
    for start in (2, 3, 4):
        (tmp_path / str(start)).mkdir()
        try_files(reader, tmp_path / str(start), 200, start)
