"""The command line as a user meets it: what goes where, and what bad input gets."""

import io
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from phi3_mlx.cli import main

TINY = ROOT / "weights" / "tiny"
COMMAND = [sys.executable, "-c", "from phi3_mlx.cli import main; main()"]


class Stdin(io.TextIOWrapper):
    """Bytes on stdin, as from a pipe or (tty=True) a terminal."""

    def __init__(self, data=b"", tty=False):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self):
        return self._tty


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*args, stdin=b"") -> (exit code, stdout, stderr)."""

    def call(*args, stdin=b"", tty=False):
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, tty))
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


def one_line(err):
    """The message, which must be a single line that begins with the program's name."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("phi3-mlx: ")
    assert "Traceback" not in err
    return lines[0]


def process(*args, stdin=b"", env=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run([*COMMAND, *args], input=stdin, capture_output=True, env=environment)


# ------------------------------------------------------------------------------------------- generate


def test_generate_writes_the_answer_to_stdout_and_nothing_else(run):
    code, out, err = run("generate", "-p", "What is 3 + 4?", "--max-tokens", 20)
    assert code == 0
    assert out.strip()
    assert out.endswith("\n")
    assert "<|" not in out
    assert err == ""


def test_prompt_from_argument_stdin_dash_and_file_is_the_same(run, tmp_path):
    text = "Tell me a story about a dog."
    file = tmp_path / "prompt.txt"
    file.write_text(text + "\n")
    answers = {
        run("generate", "--max-tokens", 12, *args, stdin=stdin)
        for args, stdin in [
            (["-p", text], b""),
            ([], text.encode()),
            (["-p", "-"], text.encode() + b"\n"),
            (["-f", file], b""),
            (["-f", "-"], text.encode()),
        ]
    }
    assert len(answers) == 1
    assert next(iter(answers))[0] == 0


def test_prompt_and_file_are_joined(run, tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("The dog ran.")
    joined = run("generate", "--max-tokens", 8, "-p", "Repeat this text:", "-f", file)
    assert joined == run("generate", "--max-tokens", 8, "-p", "Repeat this text:\n\nThe dog ran.")


def test_json_has_the_text_tokens_and_figures(run):
    code, out, _ = run("generate", "-p", "Tell me a story.", "--max-tokens", 7, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["text"] == "".join(token["text"] for token in answer["tokens"])
    assert len(answer["tokens"]) == answer["generation_tokens"] == 7
    assert answer["finish_reason"] == "length"
    assert answer["model"] == "tiny"
    assert {"prompt_tokens", "prompt_tps", "generation_tps", "peak_memory"} <= set(answer)
    assert all(set(token) == {"id", "text", "logprob"} for token in answer["tokens"])


def test_files_are_put_one_after_another(run, tmp_path):
    for name, text in (("a.txt", "Tom has a cat.\n"), ("b.txt", "\nMax has a dog.\n")):
        (tmp_path / name).write_text(text)
    ask = ["generate", "--max-tokens", 10]
    code, both, _ = run(*ask, "-f", tmp_path / "a.txt", "-f", tmp_path / "b.txt", "-p", "Who has a dog?")
    assert code == 0
    assert both == run(*ask, "-p", "Who has a dog?\n\nTom has a cat.\n\nMax has a dog.")[1]


def test_a_text_beyond_the_context_is_said_to_be_so_however_small_the_memory(run, tmp_path):
    (tmp_path / "book.txt").write_text("word " * 5000)
    code, _, err = run("generate", "-f", tmp_path / "book.txt", "--memory", "20MB")
    assert code == 1
    assert "the model's context is 4,096" in err


def test_stats_go_to_stderr(run):
    _, out, err = run("generate", "-p", "Tell me a story.", "--max-tokens", 5, "--stats")
    assert "tok/s" in err
    assert "tok/s" not in out


def test_sampling_options_reach_the_sampler(run):
    ask = ["generate", "-p", "Tell me a story.", "--max-tokens", 25]
    greedy = run(*ask)[1]
    warm = [*ask, "--temperature", 1.5]
    assert run(*warm, "--seed", 1)[1] == run(*warm, "--seed", 1)[1] != run(*warm, "--seed", 2)[1]
    for narrow in (["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1.0]):
        assert run(*warm, "--seed", 1, *narrow)[1] == greedy
    assert run(*ask, "--repetition-penalty", 1.8)[1] != greedy
    word = greedy.split()[4]
    assert run(*ask, "--stop", word)[1].strip() == greedy[: greedy.index(word)].strip()


def test_raw_and_system_change_what_is_sent(run):
    ask = ["generate", "-p", "Once upon a time", "--max-tokens", 10]
    assert len({run(*ask)[1], run(*ask, "--raw")[1]}) == 2
    assert run(*ask, "--system", "You are a pirate.")[0] == 0
    code, _, err = run(*ask, "--raw", "--system", "x")
    assert code == 2
    assert "--raw" in one_line(err)


def test_a_system_message_the_template_would_drop_is_kept_and_said(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>\\n' + m['content'] + '<|end|>\\n<|assistant|>\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    ask = ["generate", "-m", model, "--max-tokens", 5]
    code, out, err = run(*ask, "-p", "Hello", "--system", "Be kind.")
    assert code == 0
    assert "system message" in err
    assert out == run(*ask, "-p", "Be kind.\n\nHello")[1]


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["-m", "phi-9"], 1, "phi-9"),
        (["-m", "./nowhere"], 1, "nowhere"),
        (["-p", "   "], 1, "empty"),
        (["-f", "missing.txt"], 1, "missing.txt"),
        (["-f", str(ROOT)], 1, "directory"),
        (["-p", "x", "--temperature", "-1"], 2, "temperature -1.0"),
        (["-p", "x", "--top-p", "1.5"], 2, "--top-p 1.5"),
        (["-p", "x", "--top-k", "-3"], 2, "--top-k -3"),
        (["-p", "x", "--min-p", "2"], 2, "--min-p 2.0"),
        (["-p", "x", "--max-tokens", "0"], 2, "--max-tokens 0"),
        (["-p", "x", "--max-tokens", "many"], 2, "many"),
        (["-p", "x", "--stop", ""], 2, "stop"),
        (["-p", "x", "--kv-group-size", "16"], 2, "--kv-group-size 16"),
        (["-p", "x", "--kv-bits", "5"], 2, "--kv-bits 5"),
        (["-p", "x", "--memory", "16"], 2, "write 16GB"),
        (["-p", "x", "--adapter", "there=much"], 2, "'much' is not an adapter's weight"),
        (["-p", "x", "y"], 2, "-p goes before it"),
        (["-p", ""], 1, "give -p"),
        (["-p", "x", "--tempo", "1"], 2, "--tempo"),
        (["-p", "-", "-f", "-"], 2, "stdin"),
        (["-p", "word " * 5000], 1, "5,00"),
    ],
)
def test_bad_arguments_get_one_line(run, args, code, words):
    args = args if "-p" in args or "-f" in args else [*args, "-p", "Hello"]
    got, out, err = run("generate", *args)
    assert got == code
    assert words in one_line(err)
    assert out == ""


def test_a_prompt_longer_than_the_context_names_both_numbers(run):
    _, _, err = run("generate", "-p", "word " * 5000)
    assert "4,096" in err
    assert "5,00" in err


def test_nothing_to_answer_at_a_terminal_says_what_to_type(run):
    code, _, err = run("generate", tty=True)
    assert code == 2
    assert "-p" in one_line(err)


def test_empty_and_broken_stdin(run):
    code, _, err = run("generate", stdin=b"")
    assert code == 1
    assert "empty" in one_line(err)
    code, _, err = run("generate", stdin=b"abc\xff\xfe")
    assert code == 1
    assert "stdin is not UTF-8 text (byte 4)" in one_line(err)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "-1"), ("--top-p", "2"), ("--max-tokens", "0"), ("--stop", "")]
)
def test_options_are_checked_before_a_model_is_looked_for(run, command, option, value):
    code, _, err = run(command, "-m", "nope", option, value, stdin=b"Hello")
    assert code == 2
    assert option in one_line(err) or option == "--stop"


def test_raw_sends_the_text_as_it_is_and_crlf_is_a_newline_otherwise(run, tmp_path):
    from phi3_mlx import load_tokenizer

    def sent(*args, stdin):
        answer = json.loads(run("generate", "--json", "--max-tokens", 1, *args, stdin=stdin)[1])
        return answer["prompt_tokens"], answer["text"]

    text = "Once upon a time.\n\n"
    assert sent("--raw", stdin=text.encode())[0] == len(load_tokenizer("tiny").encode(text))
    assert sent(stdin=b"Tell me.\r\nNow.\r\n") == sent(stdin=b"Tell me.\nNow.")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "generate", "-p", "Hi", "--max-tokens", "3"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 1
    assert "No space left" in one_line(done.stderr)


def test_closed_stdin_and_stdout_are_survived():
    script = f"{' '.join(map(shlex.quote, COMMAND))} generate -p Hi --max-tokens 3 "
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for closed in (">&-", "<&-"):
        done = subprocess.run(["sh", "-c", script + closed], capture_output=True, text=True, env=environment)
        assert done.returncode == 0
        assert done.stderr == ""


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def cut(model, n):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:n])


def edit_header(model, change):
    data = (model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def drop_norm(header):
    header["model.surplus.weight"] = header.pop("model.norm.weight")


def reshape_norm(header):
    header["model.norm.weight"]["shape"] = [2, 128]


FAULTS = {
    "no config": (lambda m: (m / "config.json").unlink(), ["no config.json"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no tokenizer": (lambda m: [(m / f"tokenizer.{e}").unlink() for e in ("json", "model")], ["tokenizer"]),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["model.safetensors"]),
    "pickle only": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ["pickle"],
    ),
    "empty weights": (lambda m: cut(m, 0), ["model.safetensors", "download"]),
    "truncated header": (lambda m: cut(m, 100), ["model.safetensors", "download"]),
    "truncated data": (lambda m: cut(m, -5000), ["model.safetensors", "download"]),
    "garbage": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 1000), ["model.safetensors"]),
    "missing and extra": (
        lambda m: edit_header(m, drop_norm),
        ["missing model.norm.weight", "unexpected model.surplus.weight"],
    ),
    "misshaped": (lambda m: edit_header(m, reshape_norm), ["model.norm.weight", "(2, 128)", "(256,)"]),
    "model type": (lambda m: change_config(m, model_type="mystery"), ["Model type mystery not supported"]),
    "model of another family": (lambda m: change_config(m, model_type="llama"), ["llama", "lacks", "original_max"]),
    "rope type": (lambda m: change_config(m, rope_scaling={"type": "linear", "factor": 2.0}), ["'linear'"]),
    "factor lists": (
        lambda m: change_config(m, rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ["short_factor has 1 entries, expected 32"],
    ),
    "lie about size": (lambda m: change_config(m, intermediate_size=512), ["gate_up_proj", "(1408, ", "(1024, "]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_model_directory_is_named_with_its_fault(run, tmp_path, fault):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    damage, words = FAULTS[fault]
    damage(model)
    code, out, err = run("generate", "-m", model, "-p", "Hello")
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    said = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("note: "))
    assert said.startswith("phi3-mlx: ")
    assert all(word in said for word in words), err


def test_debug_shows_the_traceback(run, monkeypatch, capsys):
    from phi3_mlx.errors import ModelNotFoundError

    monkeypatch.setenv("PHI3_MLX_DEBUG", "1")
    with pytest.raises(ModelNotFoundError):
        main(["generate", "-m", "./nowhere", "-p", "x"])


def test_a_closed_pipe_is_one_line_and_a_failure():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "generate", "-p", "Tell me a story.", "--max-tokens", "30"],
        stdout=writer,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    os.close(writer)
    assert done.returncode == 141
    assert "stopped" in one_line(done.stderr)


INTERRUPTED = """
import os, signal
from phi3_mlx import cli
from phi3_mlx.engine.rows import Row

say = Row.say

def interrupted(self, *given):
    if len(self.answer) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return say(self, *given)

Row.say = interrupted
cli.main()
"""


def test_ctrl_c_with_json_prints_what_was_said():
    """Nothing is printed until then, so the command interrupts itself at the 21st token."""
    words = ["generate", "-p", "Tell me.", "--max-tokens", "3900", "--temperature", "50", "--seed", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 130, done.stderr
    answer = json.loads(done.stdout)
    assert answer["generation_tokens"] == len(answer["tokens"]) == 20
    assert answer["finish_reason"] is None


def test_ctrl_c_keeps_what_was_said_and_exits_130():
    child = subprocess.Popen(
        [*COMMAND, "generate", "-p", "Tell me a story.", "--max-tokens", "4000", "--temperature", "2", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    begun = child.stdout.read(8)
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert len(begun) == 8
    assert rest.endswith(b"\n")
    assert b"Ctrl-C" in err
    assert b"Traceback" not in err


# ----------------------------------------------------------------------------------------------- chat


def test_chat_remembers_and_its_commands_work(run, tmp_path):
    saved = tmp_path / "chat.json"
    lines = f"Hello\nWhat is 2 + 3?\n/save {saved}\n/reset\nHello\n/help\n/nonsense\n/quit\nnever read\n"
    code, out, err = run("chat", "--max-tokens", 15, "--stats", stdin=lines.encode())
    assert code == 0
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    answers = out.splitlines()
    assert answers[0] == answers[-1]  # after /reset "Hello" is the first message again
    figures = [line for line in err.splitlines() if line.startswith("prompt ")]
    new = [int(line.split(" tokens, ")[1].split(" of them")[0]) for line in figures]
    total = [int(line.split()[1]) for line in figures]
    assert new[0] == total[0]
    assert new[1] < total[1] - total[0]
    assert "/save FILE" in err
    assert "'/nonsense' is no command" in err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"/save\n/system\n", ["/save needs a file name", "/system needs a text"]),
        (b"/save /nowhere/x.json\n", ["/nowhere/x.json cannot be written"]),
        (b"caf\xff\n", ["stdin is not UTF-8"]),
    ],
)
def test_chat_says_what_is_wrong(run, lines, words):
    _, _, err = run("chat", stdin=lines)
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert all(word in err for word in words)


def test_save_leaves_an_older_file_whole_until_it_is_replaced(run, tmp_path, monkeypatch):
    saved = tmp_path / "chat.json"
    saved.write_text("precious")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    _, _, err = run("chat", stdin=f"/save {saved}\n".encode())
    assert "No space left" in err
    assert saved.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [saved]


def test_at_a_terminal_ctrl_c_stops_an_answer_and_keeps_the_chat(tmp_path):
    import pty

    saved = tmp_path / "chat.json"
    parent, child_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    child = subprocess.Popen(
        [*COMMAND, "chat", "--max-tokens", "3500", "--temperature", "50", "--seed", "2"],
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        env=environment,
        start_new_session=True,
    )
    os.close(child_end)

    seen = ""

    def read_until(word):
        nonlocal seen
        end = time.time() + 60
        while word not in seen and time.time() < end:
            seen += os.read(parent, 4096).decode("utf-8", "replace")
        assert word in seen
        seen = seen.split(word, 1)[1]

    with child:
        try:
            read_until("> ")
            os.write(parent, b"Tell me a story.\n")
            read_until("story.")
            while not seen.strip():  # until the answer has begun
                seen += os.read(parent, 4096).decode("utf-8", "replace")
            child.send_signal(signal.SIGINT)
            read_until("[stopped]")
            read_until("> ")
            os.write(parent, f"/save {saved}\n".encode())
            read_until("2 messages written")
        finally:
            child.kill()
            os.close(parent)
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[1]["content"]


def test_chat_system_starts_over(run):
    code, _, err = run("chat", "--max-tokens", 3, stdin=b"Hi\n/system Be brief.\nHi\n")
    assert code == 0
    assert "new conversation" in err


# ------------------------------------------------------------------------------------- help, start-up


@pytest.mark.parametrize("args", [["-h"], ["--help"], ["generate", "-h"], ["chat", "-h"], ["models", "-h"], []])
def test_help_everywhere(args):
    done = process(*args)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == (0 if args else 2)
    assert text.startswith("Usage: phi3-mlx")


def test_version(run):
    from phi3_mlx import __version__

    assert run("--version")[1].strip() == f"phi3-mlx {__version__}"


def test_unknown_command_is_one_line(run):
    code, _, err = run("generat")
    assert code == 2
    assert "'generat'; did you mean generate? See phi3-mlx -h" in one_line(err)
    assert "'zzz'" in one_line(run("zzz")[2])


def imported(*args):
    """The modules a command imports."""
    script = f"import sys\nfrom phi3_mlx.cli import main\ntry:\n main({list(args)!r})\nexcept SystemExit: pass\n"
    script += "sys.stderr.write('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return set(done.stderr.split())


def test_help_imports_nothing_heavy():
    heavy = {"mlx", "mlx.core", "transformers", "torch", "numpy", "rich", "jinja2", "huggingface_hub", "tokenizers"}
    assert not heavy & imported("--help")
    assert not heavy & imported("generate", "--help")


def test_generate_imports_neither_transformers_nor_torch_nor_mlx_lm_nor_the_hub():
    modules = imported("generate", "-p", "Hello", "--max-tokens", "2")
    assert "mlx.core" in modules
    assert not {"transformers", "torch", "mlx_lm", "huggingface_hub", "sentencepiece", "tiktoken", "rich"} & modules


def test_models_lists_the_bundled_model_and_the_aliases(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, out, _ = run("models")
    assert code == 0
    assert "tiny" in out
    assert "phi-3.5-mini-4bit" in out
    assert "microsoft/Phi-3-mini-4k-instruct" in out
    code, out, _ = run("models", "--json")
    found = json.loads(out)
    tiny = next(row for row in found["models"] if row["name"] == "tiny")
    assert Path(tiny["path"]).is_dir()
    assert tiny["context"] == 4096
    family = {row["name"]: row for row in found["family"]}
    mini, medium = family["phi-3-mini-4k"], family["phi-3-medium-128k"]
    assert (mini["parameters"], mini["layers"], mini["heads"], mini["context"]) == (3_821_079_552, 32, 32, 4096)
    assert (medium["heads"], medium["kv_heads"]) == (40, 10)
    for row in family.values():  # weights are the least there is, the whole context the most
        assert row["longest"]["16"] <= row["longest"]["32"] <= row["context"]
        assert (row["longest"]["16"] > 0) == (row["bytes_4bit"] < 16 * 2**30 * 2 / 3)


# Ctrl-C, and another one while the first is told, or while Python ends (it waits for a thread).
TWICE = """
import signal, sys, threading, time
from phi3_mlx import cli

def interrupted(*_):
    if sys.argv.pop() == "told":
        tell = cli._say
        cli._say = lambda *words: (tell(*words), signal.raise_signal(signal.SIGINT))
    else:
        threading.Thread(target=lambda: (time.sleep(0.3), signal.raise_signal(signal.SIGINT))).start()
    raise KeyboardInterrupt

cli.cli.invoke = interrupted
cli.main()
"""


@pytest.mark.parametrize("moment", ["told", "ending"])
def test_a_second_ctrl_c_is_no_other_end(moment):
    done = subprocess.run([sys.executable, "-c", TWICE, "models", moment], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "\nphi3-mlx: stopped by Ctrl-C\n"
