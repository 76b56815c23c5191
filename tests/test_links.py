"""What is copied along with a model's weights is the model's own: links lead nowhere else."""

import os
import shutil
from pathlib import Path

import pytest
from test_tuning_adapters import make_adapter
from tuning_models import make_directory

from phi3_mlx import load, load_tokenizer
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.pipeline import convert
from phi3_mlx.errors import CheckpointError

SECRET = "PRIVATE KEY"
# How a file of a model directory may be a link to another's.
WAYS = ["direct", "relative", "chain", "through a folder", "through the model's folder", "into a folder beside it"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def link(file: Path, way: str) -> None:
    """Make `file` a link to a secret outside its folder."""
    home = file.parent.parent / "home"
    home.mkdir()
    (home / "secret").write_text(SECRET)
    if way == "direct":
        file.symlink_to(home / "secret")
    elif way == "relative":
        file.symlink_to("../home/secret")
    elif way == "chain":
        (file.parent / "one").symlink_to("two")
        (file.parent / "two").symlink_to(home / "secret")
        file.symlink_to("one")
    elif way == "through a folder":
        (file.parent / "sub").symlink_to(home)
        file.symlink_to("sub/secret")
    elif way == "through the model's folder":
        file.symlink_to(file.parent / ".." / "home" / "secret")
    else:  # a name that begins as the folder's own
        beside = file.parent.with_name(file.parent.name + "2")
        beside.mkdir()
        shutil.copy(home / "secret", beside)
        file.symlink_to(beside / "secret")


def texts(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "tokenizer_extra.json", "chat_template.jinja", "vocab.json"])
def test_a_link_out_of_the_directory_is_not_copied(model, tmp_path, name, way):
    link(model / name, way)
    with pytest.raises(CheckpointError) as caught:
        convert(model, tmp_path / "out", dequantize=True, report=False)
    said = str(caught.value)
    assert f"{model / name} is a link to {tmp_path}" in said
    assert "outside the model's directory" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        open_source(model).write_extras(tmp_path)
    assert SECRET not in texts(tmp_path / "out")


def test_fuse_copies_no_more_than_convert(model, tmp_path):
    make_adapter(model, tmp_path / "adapter")
    link(model / "LICENSE", "chain")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        fuse(tmp_path / "adapter", tmp_path / "out", model=str(model))
    assert not (tmp_path / "out").exists()


def test_what_a_text_is_measured_with_is_the_models_own_too(model, tmp_path):
    link(model / "chat_template.jinja", "direct")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        convert(model, tmp_path / "out", bits=4, method="gptq", calibration="Once upon a time. " * 20, report=False)


@pytest.mark.parametrize("kind", ["fifo", "gone", "loop", "device"])
def test_what_is_no_file_is_not_copied(model, tmp_path, kind):
    path = model / "LICENSE"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"gone": "nothing", "loop": "LICENSE", "device": "/dev/zero"}[kind])
    with pytest.raises(CheckpointError, match="LICENSE is"):
        convert(model, tmp_path / "out", dequantize=True, report=False)


def test_links_within_the_directory_are_followed(model, tmp_path):
    (model / "sub").mkdir()
    (model / "tokenizer.json").rename(model / "sub" / "words")
    (model / "tokenizer.json").symlink_to("sub/words")
    (model / "LICENSE").symlink_to(model / "sub" / "words")
    (model / "NOTICE").mkdir()
    (tmp_path / "other name").symlink_to(model)
    convert(tmp_path / "other name", tmp_path / "out", dequantize=True, report=False)
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "sub" / "words").read_bytes()
    assert (tmp_path / "out" / "LICENSE").is_file()
    assert load_tokenizer(tmp_path / "out").encode("a dog") == load_tokenizer(model).encode("a dog")


def snapshot(model: Path, repository: Path) -> Path:
    """The model as the hub's cache keeps it."""
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, file in enumerate(sorted(model.iterdir())):
        file.rename(repository / "blobs" / str(n))
        (folder / file.name).symlink_to(Path("..", "..", "blobs", str(n)))
    return folder


def test_a_snapshots_links_lead_to_its_own_blobs_alone(model, tmp_path):
    own, other = tmp_path / "models--a--own", tmp_path / "models--a--other"
    folder = snapshot(model, own)
    convert(folder, tmp_path / "out", dequantize=True, report=False)
    assert load_tokenizer(tmp_path / "out").encode("a dog") == load_tokenizer(folder).encode("a dog")
    load(str(tmp_path / "out"))

    for n, target in enumerate([other / "blobs" / "x", own / "elsewhere", tmp_path / "blobs" / "x"]):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(SECRET)
        (folder / "LICENSE").unlink(missing_ok=True)
        (folder / "LICENSE").symlink_to(target)
        with pytest.raises(CheckpointError, match="outside the model's directory"):
            convert(folder, tmp_path / f"out{n}", dequantize=True, report=False)


def test_a_folder_that_looks_like_blobs_is_none(model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret").write_text(SECRET)
    folder = snapshot(model, tmp_path / "models--a--b")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(home)
    for file in folder.iterdir():
        target = tmp_path / "moved" / os.readlink(file).rpartition("/")[2]
        file.unlink()
        shutil.copy(target, file)
    (folder / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        convert(folder, tmp_path / "out", dequantize=True, report=False)

    plain = tmp_path / "snapshots" / "mine"  # no repository of a cache
    plain.parent.mkdir()
    shutil.copytree(folder, plain, ignore=lambda *_: ["LICENSE"])
    (tmp_path / "blobs").mkdir()
    shutil.copy(home / "secret", tmp_path / "blobs")
    (plain / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        convert(plain, tmp_path / "out", dequantize=True, report=False)


def test_chat_templates_in_a_folder_are_copied_but_not_through_a_linked_one(model, tmp_path):
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("t", encoding="utf-8")
    convert(model, tmp_path / "out", dequantize=True, report=False)
    assert load_tokenizer(tmp_path / "out").named_templates == {"tool_use": "t"}
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        convert(model, tmp_path / "again", dequantize=True, report=False)
