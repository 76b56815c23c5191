"""What is given as a model or an adapter and is none: the message says what it is, and what to type."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from test_cli import one_line, run  # noqa: F401
from test_gguf import WIDE, sample
from tokenizer_samples import TINY

import phi3_mlx
from phi3_mlx import load, load_tokenizer
from phi3_mlx.conversion.pipeline import convert
from phi3_mlx.errors import AdapterError, CheckpointError, ModelNotFoundError, Phi3Error, TokenizerError
from phi3_mlx.paths import instead_of_adapter, instead_of_model

FAULTS = (ModelNotFoundError, CheckpointError, TokenizerError)


def adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {"model.layers.0.self_attn.o_proj.lora_a": mx.ones((2, 2))}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft(folder: Path, weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / weights).touch()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(TINY / "tokenizer.json", folder)  # as a trainer saves it
    return folder


def refused(path: Path) -> str:
    with pytest.raises(FAULTS) as caught:
        load(str(path))
    said = str(caught.value)
    assert "\n" not in said
    for other in (lambda: phi3_mlx.load_model(path), lambda: convert(path, path.parent / "new")):
        with pytest.raises(FAULTS) as caught:
            other()
        assert str(caught.value).partition("; ")[2] == said.partition("; ")[2]
    return said


def test_an_adapter_given_as_a_model_names_its_model_and_both_ways_to_use_it(tmp_path, run):  # noqa: F811
    ours = adapter(tmp_path / "a run", base_model={"name": "phi-3.5-mini", "revision": None, "fingerprint": "0"})
    said = refused(ours)
    assert f"it is an adapter of phi-3.5-mini, to be given beside that (adapter='{ours}')" in said
    assert f"`phi3-mlx fuse --adapter '{ours}' -o NEW_DIRECTORY`" in said
    typed = one_line(run("generate", "-m", ours, "-p", "Hi")[2])
    assert f"(--adapter '{ours}')" in typed
    assert "adapter=" not in typed
    assert "it is an adapter of phi-3.5-mini" in refused(ours / "adapters.safetensors")
    theirs = adapter(tmp_path / "mlx-lm", model="mlx-community/Phi-3", fine_tune_type="lora")
    assert "it is an adapter of mlx-community/Phi-3" in refused(theirs)
    for config in ({}, {"base_model": 3}, {"base_model": {"name": None}}, {"model": ["x"]}):
        (theirs / "adapter_config.json").write_text(json.dumps(config))
        assert "it is an adapter of " in refused(theirs)
    (theirs / "adapter_config.json").write_text("{")
    assert "it is an adapter of a model" in refused(theirs)


def test_a_run_whose_best_is_missing_names_its_last(tmp_path):
    last = adapter(tmp_path / "run" / "last", model="tiny")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert f"its folder last is an adapter of tiny, to be given beside that (adapter='{last}')" in refused(last.parent)
    with pytest.raises(AdapterError, match=rf"its folder last is one; name {last}"):
        load("tiny", adapter=str(last.parent))


def test_pefts_folder_names_the_command_that_imports_it(tmp_path):
    for n, ending in enumerate(["", "/adapter_model.safetensors"]):
        folder = peft(tmp_path / str(n))
        command = f"`phi3-mlx adapter import {folder} -o NEW_FOLDER -m MODEL`"
        assert command in refused(Path(f"{folder}{ending}"))
    with pytest.raises(AdapterError, match="phi3-mlx adapter import"):
        load("tiny", adapter=str(folder))
    assert "as a pickle, which is never read" in refused(peft(tmp_path / "old", "adapter_model.bin"))


def test_a_model_given_as_an_adapter_is_said_to_be_one(tmp_path, run):  # noqa: F811
    with pytest.raises(AdapterError, match=rf"it is a model, to be given as such \(model='{TINY}'\)"):
        load("tiny", adapter=TINY)
    assert f"(--model {TINY})" in one_line(run("generate", "-p", "Hi", "--adapter", TINY)[2])
    assert instead_of_adapter(tmp_path / "none") == "check the path"
    file = adapter(tmp_path / "a") / "adapters.safetensors"
    assert instead_of_adapter(file) == f"it is a file; name its folder, {file.parent}"


def test_files_of_a_model_name_its_directory(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"is a file, not a model directory; name the directory it is in, {TINY}" in refused(TINY / name)
    (tmp_path / "alone.safetensors").touch()
    assert "with config.json and tokenizer files beside it" in refused(tmp_path / "alone.safetensors")


def test_what_a_directory_without_config_holds_is_said(tmp_path):
    def made(name: str, *files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()
        return folder

    assert refused(made("empty")).endswith("it is empty; name one that has")
    assert "it has weights; copy config.json" in refused(made("weights", "model.safetensors"))
    assert "its weights are pickles" in refused(made("pickles", "pytorch_model.bin"))
    assert "its folder 4bit has one; name" in refused(made("models", "4bit/config.json", "8bit/config.json"))
    assert "; name one that has" in refused(made("other", "notes.txt"))
    cached = made("models--owner--name", "snapshots/main")
    assert "it is a repository in the hub's cache; name owner/name" in refused(cached)
    words = made("words")
    shutil.copy(TINY / "tokenizer.json", words)
    assert "it has a tokenizer alone" in refused(words)
    assert load_tokenizer(words).encode("a dog")  # which is all that it is asked for


def test_a_gguf_file_is_known_by_how_it_begins(tmp_path, run):  # noqa: F811
    (tmp_path / "gguf").mkdir()
    named = sample(tmp_path / "gguf", "phi3", WIDE)
    blob = named.with_name(f"sha256-{'a' * 64}")
    shutil.copy(named, blob)
    for file in (named, blob):
        assert f"it is a GGUF file: `phi3-mlx convert {file} -o NEW_DIRECTORY`" in one_line(
            run("generate", "-m", file, "-p", "Hi")[2]
        )
        convert(file, tmp_path / f"of {file.name}", dequantize=True, report=False)
    one, other = (tmp_path / f"of {file.name}" / "model.safetensors" for file in (named, blob))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(TokenizerError, match=r"it holds a GGUF file: `phi3-mlx convert .*model\.gguf -o"):
        load(str(named.parent))
    named.unlink()
    with pytest.raises(TokenizerError, match=rf"it holds a GGUF file: `phi3-mlx convert {blob} -o"):
        load(str(named.parent))
    shutil.copy(TINY / "config.json", named.parent)
    shutil.copy(TINY / "tokenizer.json", named.parent)
    with pytest.raises(CheckpointError, match=r"has no weights: .*found sha256-a+; type `phi3-mlx convert"):
        load(str(named.parent))
    with pytest.raises(Phi3Error, match="a revision is for Hugging Face repositories"):
        convert(blob, tmp_path / "revision", revision="main")
    (tmp_path / "not.gguf").write_bytes(b"GGML and more")
    assert "does not begin as a GGUF file" in instead_of_model(tmp_path / "not.gguf")
    with pytest.raises(CheckpointError, match=r"not\.gguf"):
        convert(tmp_path / "not.gguf", tmp_path / "no")


def test_a_fifo_given_as_a_model_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.gguf")
    for given in (tmp_path / "fifo", tmp_path / "fifo.gguf"):
        for use in (load, lambda path: convert(path, tmp_path / "new")):
            with pytest.raises(Phi3Error, match="fifo"):
                use(given)


def test_weights_that_are_not_found_say_what_is_there(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(
        CheckpointError, match=r"found consolidated\.safetensors; if it is the whole model, name it mod"
    ):
        load(folder)
    (folder / "model.safetensors").symlink_to("blob")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that is gone"):
        load(folder)
