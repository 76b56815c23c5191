"""Publishing on a fake hub, with the real library: what goes where, what stays, the card, and everything refused."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from fake_hub import TOKEN, fake_hub
from huggingface_hub import ModelCard
from test_tuning_adapters import make_adapter
from tokenizer_samples import TINY
from tuning_models import make_directory

from phi3_mlx import export_adapter, export_gguf, publish
from phi3_mlx.errors import CheckpointError, OptionError
from phi3_mlx.publishing import facts
from phi3_mlx.tuning.settings import Settings

SENT = {
    *("README.md", "REPORT.md", "config.json", "generation_config.json", "model.safetensors", "report.json"),
    *("report.png", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}


@pytest.fixture
def hub():
    with fake_hub() as running:
        yield running


@pytest.fixture
def model(tmp_path):
    """The bundled model with what may lie around, and no README of its own."""
    directory = tmp_path / "my model"
    shutil.copytree(TINY, directory)
    (directory / "README.md").unlink()
    for name in (".env", "token.txt", "notes.txt", ".DS_Store", "evaluation.json"):
        (directory / name).write_text("HF_TOKEN=x")
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "model.safetensors").write_text("old")
    return directory


def run(hub, *arguments, token=TOKEN, host=None):
    """(exit code, stdout, stderr) of `phi3-mlx publish`."""
    environment = {**os.environ, "HF_ENDPOINT": host or hub.host, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": "/nowhere", "HF_TOKEN": token or ""}
    command = [sys.executable, "-m", "phi3_mlx", "publish", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def card_of(directory, **facts):
    return ModelCard(publish(directory, "me/mine", dry_run=True, **facts).card)


def test_what_belongs_goes_in_one_commit_and_the_rest_stays_and_is_named(hub, model):
    code, _, said = run(hub, model, "me/mine", "--base", "microsoft/Phi-3.5-mini-instruct")
    assert code == 0, said
    repository = hub.repositories["me/mine"]
    assert repository["files"].keys() == SENT
    assert repository["commits"] == 1
    assert repository["private"]
    for name in SENT - {"README.md"}:
        assert repository["files"][name] == (model / name).read_bytes(), name
    assert "stay here: checkpoints/, .DS_Store, .env, evaluation.json, notes.txt, token.txt" in said
    assert ".env, token.txt: by the name a secret" in said
    assert f"{hub.host}/me/mine has 10 files" in said
    assert said.rstrip().endswith("private")


def test_a_dry_run_asks_nobody(hub, model):
    code, shown, said = run(hub, model, "me/mine", "--dry-run", token="", host="http://127.0.0.1:9")
    assert code == 0
    assert not hub.asked
    assert all(name in shown for name in SENT)
    assert "3.4 MB  model.safetensors" in shown
    assert "# mine" in shown
    assert "nothing was sent" in said


def test_public_is_asked_for(hub, model):
    assert run(hub, model, "me/mine", "--public")[0] == 0
    assert hub.repositories["me/mine"]["private"] is False
    code, _, said = run(hub, model, "me/mine")
    assert code == 1
    assert "me/mine exists already and is public, not private; give --public" in said
    hub.repositories["me/mine"]["private"] = True
    assert "is private, not public; change that on its page" in run(hub, model, "me/mine", "--public")[2]
    assert hub.repositories["me/mine"]["commits"] == 1


def test_an_upload_that_was_cut_goes_on(hub, model):
    shutil.copy(model / "model.safetensors", model / "model-2.safetensors")
    with (model / "model-2.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    hub.breaks_after = 1
    code, _, said = run(hub, model, "me/mine")
    assert code == 1
    assert "me/mine (400: " in said
    assert "the same command again goes on with it" in said
    assert not hub.repositories["me/mine"]["files"]  # nothing appears before all of it does
    assert len(hub.objects) == 1
    hub.breaks_after = None
    sent = hub.count("PUT")
    assert run(hub, model, "me/mine")[0] == 0
    assert hub.count("PUT") == sent + 1  # what had arrived was not sent again
    assert hub.repositories["me/mine"]["files"].keys() == {*SENT, "model-2.safetensors"}


@pytest.mark.parametrize(
    ("token", "host", "expected"),
    [
        ("hf_anotherTokenThatIsNotKnownHere", None, "does not know who you are; type `hf auth login`"),
        ("", None, "does not know who you are; type `hf auth login`"),
        (TOKEN, "http://127.0.0.1:9", "the upload of me/mine stopped ("),
    ],
)
def test_who_is_not_known_and_no_network_are_one_line(token, host, expected, hub, model):
    code, shown, said = run(hub, model, "me/mine", token=token, host=host)
    assert code == 1
    assert not shown
    assert expected in said
    assert "Traceback" not in said
    assert not token or token not in said
    assert not hub.repositories


@pytest.mark.parametrize("name", ["mine", "", "a/b/c", "me/", "me/mi ne", "me/..", "../x", "me/é", "me/x.git", "/", 3])
def test_rubbish_names_are_refused(name, model):
    with pytest.raises(OptionError, match="repo_id"):
        publish(model, name, dry_run=True)
    with pytest.raises(OptionError, match="base"):
        publish(model, "me/mine", base=name, dry_run=True)


@pytest.mark.parametrize(
    ("secret", "what"),
    [
        (TOKEN, "a Hugging Face token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("AKIAABCDEFGHIJKLMNOP", "an AWS key"),
    ],
)
def test_a_secret_in_a_file_is_refused_and_not_repeated(secret, what, model):
    (model / "README.md").write_text(f"Log in with {secret}.")
    with pytest.raises(CheckpointError, match=rf"README\.md holds {what}; take it out") as refused:
        publish(model, "me/mine", dry_run=True)
    assert secret not in str(refused.value)


def test_links_out_of_the_directory_are_refused(model, tmp_path):
    (tmp_path / "private.json").write_text("{}")
    (model / "added_tokens.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(CheckpointError, match=r"is a link to .*private\.json, outside"):
        publish(model, "me/mine", dry_run=True)
    (model / "added_tokens.json").unlink()
    (model / "added_tokens.json").symlink_to("generation_config.json")
    assert "added_tokens.json" in publish(model, "me/mine", dry_run=True).files


def test_what_is_no_whole_model_is_refused(model, tmp_path):
    for name, match in (("model.safetensors", "no complete model"), ("config.json", "holds no model, adapter or GGUF")):
        (model / name).unlink()
        with pytest.raises(CheckpointError, match=match):
            publish(model, "me/mine", dry_run=True)
    with pytest.raises(CheckpointError, match="is no directory"):
        publish(tmp_path / "nothing", "me/mine", dry_run=True)


def test_a_huge_list_of_files_is_refused_early(model, monkeypatch):
    monkeypatch.setattr("phi3_mlx.publishing.contents._MOST_FILES", 20)
    for n in range(30):
        (model / f"{n}.txt").touch()
    with pytest.raises(CheckpointError, match="more than 20 files"):
        publish(model, "me/mine", dry_run=True)


def test_the_card_of_a_packed_model_says_base_bits_cost_and_scores(model, tmp_path):
    scores = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01}, "gsm": {"exact_match,strict": 0.25}}
    (tmp_path / "results.json").write_text(json.dumps({"results": scores, "n-shot": {"arc": 25}}))
    card = card_of(model, base="microsoft/Phi-3.5-mini-instruct", results=tmp_path)
    data = card.data
    assert (data.base_model, data.license) == ("microsoft/Phi-3.5-mini-instruct", "mit")
    assert data.get("base_model_relation") == "quantized"
    assert (data.library_name, data.pipeline_tag) == ("mlx", "text-generation")
    assert {(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results} == {
        ("arc", "acc", 0.5),
        ("gsm", "exact_match", 0.25),
    }
    text = card.text
    assert "quantized to 4 bits in groups of 64" in text or "quantized to 4 bits in groups of 32" in text
    assert "5.01 bits a weight" in text
    kl = json.loads((model / "report.json").read_text())["kl"]
    assert f"| KL divergence from the original, nats a token | {kl:.5f} |" in text
    assert "| arc | 25 | acc | 0.5000 ± 0.0100 |" in text
    for command in ("phi3-mlx generate -m me/mine", "mlx_lm.generate --model me/mine", "llama-cli", "ollama create"):
        assert command in text
    assert "--dequantize" in text  # for transformers


def test_what_is_not_known_is_said_and_not_made_up(model):
    done = publish(model, "me/mine", dry_run=True)
    assert ModelCard(done.card).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert any("base=OWNER/REPO" in note for note in done.notes)
    assert any("licence=NAME" in note for note in done.notes)
    assert card_of(model, base="me/other").data.license is None
    assert card_of(model, base="me/other", licence="apache-2.0").data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
        ("me/other", "me/other"),
        ("/gone/since/base", None),
        ("models", None),
    ],
)
def test_the_base_is_what_the_report_names_where_the_hub_has_it(source, base, model):
    report = json.loads((model / "report.json").read_text())
    (model / "report.json").write_text(json.dumps({**report, "source": source}))
    assert card_of(model).data.base_model == base


def test_a_downloaded_base_is_known_with_its_revision(model):
    report = json.loads((model / "report.json").read_text())
    known = {**report, "source": "microsoft/phi-4", "revision": "a" * 40}
    (model / "report.json").write_text(json.dumps(known))
    card = card_of(model)
    assert card.data.base_model == "microsoft/phi-4"
    assert f"at revision `{'a' * 40}`" in card.text


def test_a_readme_that_is_there_is_kept_and_completed(model):
    (model / "README.md").write_text("---\nlicense: gpl-3.0\nlanguage: en\n---\n# Mine\n")
    card = card_of(model, base="microsoft/phi-4")
    assert (card.data.license, card.data.get("language"), card.data.base_model) == ("gpl-3.0", "en", "microsoft/phi-4")
    assert card.text.strip() == "# Mine"
    (model / "README.md").write_text("# Only text\n")
    card = card_of(model)
    assert (card.data.library_name, card.text.strip()) == ("mlx", "# Only text")
    (model / "README.md").write_text("---\n: [\n---\n# Mine\n")
    with pytest.raises(CheckpointError, match="does not begin with a card's YAML"):
        card_of(model)


@pytest.fixture
def adapter(tmp_path):
    """A run's folder, whose base is a directory of this disk."""
    folder = tmp_path / "run"
    make_adapter(make_directory(tmp_path / "base"), folder)
    settings = {"data": [str(tmp_path / "letters.jsonl")], "learning_rate": 0.001, "samples": ["private"]}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "last").mkdir()
    return folder


def test_a_runs_folder_gives_the_adapter_alone_and_no_places_of_this_disk(hub, adapter, tmp_path):
    code, _, said = run(hub, adapter, "me/mine", "--base", "microsoft/Phi-3.5-mini-instruct")
    assert code == 0, said
    files = hub.repositories["me/mine"]["files"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapters.safetensors"}
    assert "stay here: last/, metrics.jsonl, run.json" in said
    assert json.loads(files["adapter_config.json"])["base_model"]["name"] == "microsoft/Phi-3.5-mini-instruct"
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    card = ModelCard(files["README.md"].decode())
    assert card.data.get("base_model_relation") == "adapter"
    assert "| data | letters.jsonl |" in card.text
    assert "| learning rate | 0.001 |" in card.text
    assert "private" not in card.text
    assert "--adapter adapter" in card.text
    assert "llama-cli -m Phi-3.5-mini-instruct.gguf --lora adapter.gguf" in card.text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"objective": "sft", "train on": "answers", "epochs": "3.0"}),
        ({"steps": 20}, {"objective": "sft", "train on": "answers", "steps": "20"}),
        ({"objective": "dpo", "beta": 0.3}, {"beta": "0.3", "dpo loss": "sigmoid", "label smoothing": "0.0"}),
        ({"objective": "dpo", "dpo_loss": "ipo"}, {"dpo loss": "ipo"}),
        ({"objective": "orpo"}, {"objective": "orpo"}),
        ({"objective": "simpo"}, {"simpo gamma": "0.5"}),
        ({"objective": "kto"}, {"desirable weight": "1.0", "undesirable weight": "1.0"}),
    ],
    ids=str,
)
def test_the_card_of_an_adapter_shows_the_settings_that_did_something(given, expected, adapter):
    settings = Settings.of({"data": "letters.jsonl", "output": "run", **given})
    (adapter / "run.json").write_text(json.dumps({"settings": settings.as_dict()}))
    text = card_of(adapter, base="microsoft/phi-4").text
    shown = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.M))
    assert shown.items() >= {**expected, "data": "letters.jsonl", "kind": "lora"}.items()
    assert "rank" in shown
    idle = {name.replace("_", " ") for name, _ in settings.without_effect()}
    assert not idle & shown.keys()
    there = {field.name for field in dataclasses.fields(Settings)}
    assert {name.replace(" ", "_") for name in shown.keys() - {"setting", "kind", "scale", "step"}} <= there


def test_every_setting_that_a_card_would_show_is_one_of_a_run():
    assert {*facts._RUN_SETTINGS, *facts._OF_OBJECTIVE} <= {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_an_adapter_that_llama_cpp_has_no_place_for_is_merged_in_the_cards_commands(kind, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": kind}))
    text = card_of(adapter, base="microsoft/phi-4").text
    assert f"| kind | {kind} |" in text
    assert "--adapter-only" not in text
    assert "phi3-mlx export -m microsoft/phi-4 --adapter adapter -o mine.gguf --modelfile" in text
    assert ("adapter export" in text) == (kind == "dora")


def written(path, **metadata):
    """A GGUF file of one small tensor that says these things of itself; double underscores stand for dots."""
    samples = pytest.importorskip("gguf_samples")
    path.parent.mkdir(exist_ok=True)
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    return samples.write_gguf(path, "phi3", named, {"output_norm.weight": np.zeros(32, np.float32)})


URL = "https://huggingface.co/microsoft/Phi-3.5-mini-instruct"


def test_gguf_files_go_with_their_modelfile_and_say_what_they_are(tmp_path):
    folder = tmp_path / "out"
    for name, number in (("mine.gguf", 15), ("mine-q8.gguf", 7)):
        written(folder / name, general__file_type=number, general__source__url=URL)
    for name in ("mine.Modelfile", "other.bin"):
        (folder / name).write_bytes(b"text")
    done = publish(folder, "me/mine", dry_run=True)
    assert done.files.keys() == {"README.md", "mine.gguf", "mine-q8.gguf", "mine.Modelfile"}
    card = ModelCard(done.card)
    assert (card.data.library_name, card.data.base_model) == ("gguf", "microsoft/Phi-3.5-mini-instruct")
    assert (card.data.license, card.data.get("base_model_relation")) == ("mit", "quantized")
    assert "| file | what | bits a weight |\n|---|---|--:|\n" in card.text
    assert "| mine.gguf | Q4_K_M | 32.00 |\n" in card.text
    assert "| mine-q8.gguf | Q8_0 | 32.00 |\n" in card.text
    assert "KL" not in card.text
    assert "llama-cli -hf me/mine" in card.text
    assert "ollama run hf.co/me/mine" in card.text
    assert card_of(folder, base="me/other").data.base_model == "me/other"
    written(folder / "third.gguf", general__source__url="https://example.org/elsewhere")
    card = card_of(folder)  # they are of different ones
    assert card.data.base_model is None
    assert "A model of the Phi family as GGUF files" in card.text


def test_the_card_of_gguf_files_says_what_rounding_cost_and_of_which_revision(tmp_path):
    pytest.importorskip("gguf")
    snapshot = tmp_path / "models--microsoft--Phi-3.5-mini-instruct" / "snapshots" / "0123abc"
    shutil.copytree(TINY, snapshot)
    folder = tmp_path / "out"
    text = "Once upon a time there was a duck. " * 4
    made = export_gguf(snapshot, folder / "four.gguf", type="q4_0", text=text)
    export_gguf(snapshot, folder / "six.gguf", type="q6_k", importance=False, report=False)
    card = card_of(folder)
    assert card.data.base_model == "microsoft/Phi-3.5-mini-instruct"
    assert "at revision `0123abc`" in card.text
    assert "| file | what | bits a weight | KL, nats a token | same likeliest token |\n" in card.text
    bits, kl, top1 = made.bits_per_weight, made.comparison.kl, made.comparison.top1
    assert f"| four.gguf | Q4_0 | {bits:.2f} | {kl:.5f} | {top1:.1%} |\n" in card.text
    assert re.search(r"^\| six\.gguf \| Q6_K \| [67]\.\d\d \|  \|  \|$", card.text, re.M)
    assert "on a text of its maker's, as phi3-mlx computes both" in card.text
    export_gguf(snapshot, folder / "four.gguf", type="q4_0", report=False, force=True)
    assert "KL" not in card_of(folder).text  # nothing of the earlier file is left


def test_the_card_of_a_gguf_adapter_says_what_it_stands_on(tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "out"
    base = make_directory(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", folder / "mine.gguf", modelfile=True)
    card = card_of(folder, base="microsoft/Phi-3.5-mini-instruct")
    assert card.data.get("base_model_relation") == "adapter"
    assert "An adapter of [microsoft/Phi-3.5-mini-instruct]" in card.text
    assert "phi3-mlx export -m microsoft/Phi-3.5-mini-instruct -o Phi-3.5-mini-instruct.gguf\n" in card.text
    assert 'llama-cli -m Phi-3.5-mini-instruct.gguf --lora "mine.gguf" -p "Hello"\n' in card.text
    assert 'ollama create mine -f "mine.Modelfile"' in card.text
    assert "convert" not in card.text
    assert "-hf" not in card.text
    (folder / "mine.Modelfile").unlink()
    assert "ollama create" not in card_of(folder).text
    about = {"general.type": "adapter", "general.base_model.0.repo_url": URL}
    written(folder / "mine.gguf", **about)
    assert card_of(folder).data.base_model == "microsoft/Phi-3.5-mini-instruct"


def test_parts_of_a_gguf_model_go_together_and_without_ollama_which_takes_none(tmp_path):
    pytest.importorskip("gguf")
    made = export_gguf("tiny", tmp_path / "out" / "mine.gguf", split_max_size="1MB")
    done = publish(tmp_path / "out", "me/mine", dry_run=True)
    assert done.files.keys() == {"README.md", *(file.name for file in made.files)}
    count = f"{len(made.files):05}"
    assert f'--include "mine-*-of-{count}.gguf"' in done.card
    assert f'phi3-mlx convert "mine-00001-of-{count}.gguf"' in done.card
    assert "ollama run" not in done.card
    made.files[1].rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=rf"mine-00002-of-{count}\.gguf cannot be read: No such file"):
        publish(tmp_path / "out", "me/mine", dry_run=True)
    (tmp_path / "kept").rename(made.files[1])
    made.files[0].unlink()
    with pytest.raises(CheckpointError, match=rf"but not mine-00001-of-{count}\.gguf; put all parts there"):
        publish(tmp_path / "out", "me/mine", dry_run=True)


def test_a_damaged_gguf_file_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"mine\.gguf is cut short"):
        publish(tmp_path, "me/mine", dry_run=True)


def test_the_recipe_goes_along_and_is_named(model):
    assert "recipe.json" not in card_of(model).text
    (model / "recipe.json").write_text("{}")
    done = publish(model, "me/mine", dry_run=True)
    assert "recipe.json" in done.files
    assert "`recipe.json` has the bits of each layer" in done.card


def test_the_yaml_of_every_card_is_what_the_hub_reads(model, adapter):
    for directory in (model, adapter):
        for base in (None, "microsoft/phi-4"):
            card = card_of(directory, base=base)
            again = ModelCard(str(card))
            assert again.data.to_dict() == card.data.to_dict()
            assert str(directory) not in str(card)
