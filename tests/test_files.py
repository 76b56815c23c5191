"""Files of users: what is no regular file is refused at once, and text is read in every Unicode encoding."""

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from test_cli import one_line, run  # noqa: F401
from tokenizer_samples import TINY

from phi3_mlx import files, load, load_tokenizer, tune
from phi3_mlx.conversion.gguf.file import GgufFile
from phi3_mlx.engine.cache_file import read_facts
from phi3_mlx.errors import CacheError, CheckpointError, DataError, OptionError, Phi3Error, TokenizerError
from phi3_mlx.files import LARGEST, as_utf8, decode, json_text, not_unicode, open_file, read_bytes
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.tuning.data import read_data
from phi3_mlx.tuning.settings_file import read_settings

WINDOWS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
LINE = {"prompt": "naïve “日本” 🐶", "completion": "yes \u2028 yes"}


@pytest.fixture(autouse=True)
def _in_time():
    """Whatever waits for a FIFO's writer fails instead."""
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it hangs")))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def put(path: Path, kind: str) -> Path:
    """A FIFO, an endless device or a loop of links in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name}[kind])
    return path


# ------------------------------------------------------------------------------------ what is no file


KINDS = ["fifo", "device", "directory"]
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "special_tokens_map.json", "chat_template.jinja", "chat_template.json"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_the_place_of_a_models_file_is_refused_at_once(model, name, kind):
    put(model / name, kind)
    with pytest.raises((CheckpointError, TokenizerError)) as caught:
        load(str(model))
    said = str(caught.value)
    assert str(model / name) in said
    assert ("Is a directory" if kind == "directory" else "not a regular file") in said


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_place_of_other_vocabularies_is_refused_at_once(tmp_path, kind):
    for name in ("tokenizer.model", "added_tokens.json", "cl100k_base.tiktoken"):
        folder = Path(shutil.copytree(TINY, tmp_path / name.partition(".")[0]))
        (folder / "tokenizer.json").unlink()
        if name == "added_tokens.json":  # is read where tokenizer_config.json lists none
            (folder / "tokenizer_config.json").unlink()
        if name.endswith("tiktoken"):
            (folder / "tokenizer.model").unlink()
        put(folder / name, kind)
        with pytest.raises(TokenizerError, match=name):
            load_tokenizer(folder)


@pytest.mark.parametrize("kind", [*KINDS, "loop"])
def test_what_stands_in_the_place_of_a_users_file_is_refused_at_once(tmp_path, kind):
    path = put(tmp_path / "given", kind)
    for read, error in [
        (read_data, DataError),
        (read_settings, OptionError),
        (read_facts, CacheError),
        (GgufFile, CheckpointError),
        (lambda path: tune("tiny", path, tmp_path / "run"), Phi3Error),
    ]:
        if kind == "directory" and error is DataError:
            continue  # a directory with train.jsonl may be data
        with pytest.raises(error, match="given"):
            read(path)


def test_a_prompt_comes_from_a_pipe_too_but_not_without_end(run, tmp_path, monkeypatch):  # noqa: F811
    fifo = put(tmp_path / "fifo", "fifo")
    with monkeypatch.context() as context:
        context.setattr(files, "_PATIENCE", 0.01)
        assert "empty" in one_line(run("generate", "-f", fifo, "--max-tokens", 2)[2])  # nobody writes to it
    writer = threading.Thread(target=fifo.write_text, args=("Tell me a story.",))
    writer.start()
    code, from_pipe, _ = run("generate", "-f", fifo, "--max-tokens", 4)
    writer.join()
    assert code == 0
    assert from_pipe == run("generate", "-p", "Tell me a story.", "--max-tokens", 4)[1]
    assert "longer than 100 MB" in one_line(run("generate", "-f", "/dev/zero", "--max-tokens", 2)[2])
    assert "Is a directory" in one_line(run("generate", "-f", tmp_path, "--max-tokens", 2)[2])


def test_a_file_is_read_up_to_a_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, most=5) == b"12345"
    with pytest.raises(OSError, match="longer than 0 MB"):
        read_bytes(path, most=4)
    assert read_bytes(path, most=None) == b"12345"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room on the disk
    (tmp_path / "model").mkdir()
    path.rename(tmp_path / "model" / "config.json")
    with pytest.raises(CheckpointError, match="longer than 100 MB"):
        read_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        open_file(path)


# ------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("encoding", ["utf-8", *WINDOWS])
@pytest.mark.parametrize("text", ["", "a", "ab\n", "é first", "x 日本 🐶 \u2028\n"])
def test_text_is_read_in_every_encoding_of_unicode(encoding, text):
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_tells_the_encoding_of_any_first_character(encoding):
    assert decode("日本".encode(encoding)) == "日本"


def test_bytes_that_are_not_utf8_are_let_be_for_who_reads_them_line_by_line():
    assert as_utf8(b"good\nca\xe9\n") == b"good\nca\xe9\n"


@pytest.mark.parametrize("encoding", ["utf-8", *WINDOWS])
def test_every_text_file_may_be_in_any_encoding(model, encoding, run, tmp_path):  # noqa: F811
    def again(path):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))

    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("Who is “Tom”?".encode(encoding))
    right = run("generate", "-p", "Who is “Tom”?", "--max-tokens", 3)[:2]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        again(model / name)
    assert run("generate", "-m", model, "-f", prompt, "--max-tokens", 3)[:2] == right
    assert run("generate", "-m", model, "--max-tokens", 3, stdin=prompt.read_bytes())[:2] == right

    data, settings = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    text = "".join(json.dumps(LINE, ensure_ascii=False) + "\r\n" for _ in range(3))
    data.write_bytes(text.encode(encoding))
    records = read_data(data).train
    assert [record.source for record in records] == [f"{data}:{n}" for n in (1, 2, 3)]
    assert [message["content"] for message in records[2].messages] == list(LINE.values())
    settings.write_bytes("data: é.jsonl\n".encode(encoding))
    assert read_settings(settings) == {"data": "é.jsonl"}


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\xff\xfe\x00\xd8", b"\xff\xfe\x00\x00a", b"a\x00b\x00c"])
def test_broken_utf16_is_said_to_be_that(data, run, tmp_path):  # noqa: F811
    path = tmp_path / "file.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"file\.jsonl begins as UTF-\d\d-LE text and is none"):
        read_data(path)
    assert "begins as UTF-" in one_line(run("generate", "-f", path)[2])


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv here")
def test_the_command_that_is_advised_makes_the_file_readable(run, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "it's old.txt"
    path.write_bytes("naïve “café”".encode("cp1252"))
    said = one_line(run("generate", "-f", path)[2])
    assert "not UTF-8 text (byte 3)" in said
    command = said.partition("convert it: ")[2]
    assert command.startswith("iconv ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert decode((tmp_path / "utf-8.txt").read_bytes()) == "naïve “café”"

    said = one_line(run("generate", stdin=path.read_bytes())[2])
    command = said.partition("pipe it through ")[2]
    piped = subprocess.run(command, shell=True, input=path.read_bytes(), capture_output=True, check=True)
    assert decode(piped.stdout) == "naïve “café”"


def test_no_encoding_is_guessed_that_the_bytes_cannot_be_in():
    data = "日本".encode("shift-jis") + b"\x81"
    with pytest.raises(UnicodeDecodeError) as caught:
        decode(data)
    assert "iconv" not in not_unicode(caught.value, data, "file")


def test_a_faulty_line_keeps_its_number_in_every_encoding(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes((json.dumps(LINE) + "\n\nno\n").encode("utf-16"))
    with pytest.raises(DataError, match=r"file\.jsonl:3: is not JSON"):
        read_data(path)


def test_json_that_is_written_is_json_to_every_reader():
    """JSON has no NaN; UTF-8 has no half of a character, as a file name of Latin-1 bytes gives it to Python."""

    def refuse(constant):
        raise AssertionError(constant)

    value = {"loss": float("nan"), "more": [1.5, float("inf"), (float("-inf"), True, None)], "who": "Müller \udcfc 🦊"}
    text = json_text(value, indent=1)
    assert "Müller" in text
    assert json.loads(text.encode(), parse_constant=refuse) == {
        "loss": None,
        "more": [1.5, None, [None, True, None]],
        "who": value["who"],
    }


def test_files_joined_with_their_marks_and_old_encodings_in_several_lines(tmp_path):
    path = tmp_path / "file.jsonl"
    line = json.dumps(LINE, ensure_ascii=False).encode("utf-8-sig") + b"\n"
    path.write_bytes(line * 2)
    assert [message["content"] for message in read_data(path).train[1].messages] == list(LINE.values())
    path.write_bytes(b'{"text": "coffee"}\n' + b'{"text": "caf\xe9"}\n' * 3)
    with pytest.raises(DataError) as caught:
        read_data(path)
    said = str(caught.value)
    assert said.count("iconv") == 1
    assert f"{path}:2: is not UTF-8 text (byte " in said
    assert f"{path}:4: is not UTF-8 text" in said


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv here")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_chat_reads_lines_so_the_message_has_what_makes_them(run, encoding):  # noqa: F811
    talk = "Tell me a story.\r\nAnd now?\r\n"
    said = one_line(run("chat", "--max-tokens", 2, stdin=talk.encode(encoding))[2])
    command = said.partition("pipe it through ")[2]
    lines = subprocess.run(command, shell=True, input=talk.encode(encoding), capture_output=True, check=True).stdout
    assert run("chat", "--max-tokens", 2, stdin=lines) == run("chat", "--max-tokens", 2, stdin=talk.encode())
