"""`phi3-mlx serve` as a user types it, and the bundled model behind it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import mlx.core as mx
from conftest import ROOT
from served import chat_body, events, serving, wait_until
from tuning_models import make_directory

from phi3_mlx import generate, load, load_tokenizer, score, stream_generate
from phi3_mlx.cli import main
from phi3_mlx.cli.serve import adapters_of
from phi3_mlx.errors import OptionError
from phi3_mlx.server import prompts
from phi3_mlx.server.models import Models
from phi3_mlx.server.worker import Worker

STORY = "Tell me a story about a duck and a frog."
ENDLESS = {str(token): -100 for token in load_tokenizer("tiny").stop_ids}  # so no token ends an answer
LONG = "Mia has a red boat. " * 40


@pytest.fixture(scope="module")
def served():
    models = Models(["tiny"])
    worker = Worker(models)
    with serving(worker, listed=models.listed) as served:
        yield served
    worker.close(wait=False)


def said_by(capsys, *words):
    """(exit code, what is said to stderr) of a command that ends by itself."""
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *words])
    return exit_.value.code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask, and there is no key"),
        (["--host", "::"], "--host :: lets other machines ask"),
        (["--host", "no.such.invalid"], "--host no.such.invalid is no address of this machine"),
        (["--api-key-file", "no-such-file"], "--api-key-file no-such-file cannot be read"),
        (["--adapter", "folder"], "--adapter folder has no name and folder; write --adapter NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "two adapters are called a"),
        (["--temperature", "-1"], "--temperature -1.0 is outside its range"),
        (["--kv-bits", "5"], "5"),
        (["-m", "mlx-lm:tiny", "--kv-bits", "4"], "--kv-bits is for the Phi family alone"),
        (["-m", "mlx-lm:tiny", "--longrope", "short"], "--longrope is for the Phi family alone"),
        (["--port", "65536"], "--port 65536 is outside its range; give 0 to 65535"),
        (["--queue", "0"], "--queue 0 is outside its range; give 1 or more"),
        (["--memory", "plenty"], "'plenty' is not a size"),
        (
            ["--allowed-host", "http://mac.local"],
            "--allowed-host http://mac.local is no name; give one such as mac.local",
        ),
        (["--allowed-host", "mac.local:8080"], "--allowed-host mac.local:8080 is no name"),
        (["--cors-origin", "page.example"], "--cors-origin page.example is no origin; give one such as https://"),
        (["--cors-origin", "https://page.example/chat"], "--cors-origin https://page.example/chat is no origin"),
        (["tiny"], "unexpected extra argument (tiny); -m goes before it"),
    ],
)
def test_a_wrong_command_line_is_a_line(capsys, monkeypatch, words, message):
    monkeypatch.delenv("PHI3_MLX_API_KEY", raising=False)
    code, said = said_by(capsys, "--port", "0", *words)
    assert code == 2
    assert said.startswith("phi3-mlx: ")
    assert message in said
    assert "\n" not in said


def test_a_folder_that_is_no_adapter_is_named_before_anybody_asks(capsys):
    code, said = said_by(capsys, "--port", "0", "--adapter", "mine=nowhere")
    assert code == 1
    assert said == "phi3-mlx: nowhere has no adapter_config.json, so it is no adapter folder; check the path"


def test_an_adapter_belongs_to_the_model_that_it_was_trained_on(tmp_path):
    one, other = (make_directory(tmp_path / name, hidden_size=64) for name in ("one", "other"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 1.0}}
    config["base_model"] = {"name": str(other.resolve())}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x": mx.zeros(1)})
    names = [str(one), str(other)]
    assert adapters_of([f"tales={folder}"], names) == {"tales": (str(other), str(folder))}
    assert adapters_of([f"tales={folder}"], names[:1]) == {"tales": (str(one), str(folder))}  # loading checks it
    with pytest.raises(OptionError, match="which is not among the models; add -m"):
        adapters_of([f"tales={folder}"], ["tiny", str(one)])


@pytest.mark.parametrize("key", ["", "two words", "kéy", "a\nb"])
def test_a_key_that_no_client_could_send_is_refused(capsys, monkeypatch, tmp_path, key):
    monkeypatch.setenv("PHI3_MLX_API_KEY", key)
    code, said = said_by(capsys)
    assert (code, "PHI3_MLX_API_KEY has no key" in said) == (2, True)
    file = tmp_path / "key"
    file.write_text(f" {key}\n")
    assert f"{file} has no key" in said_by(capsys, "--api-key-file", str(file))[1]
    assert key not in said or not key


def test_a_port_in_use_is_a_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = said_by(capsys, "--port", str(port))
    assert code == 1
    assert said == f"phi3-mlx: 127.0.0.1:{port} cannot be listened at: Address already in use; give another --port"


def test_without_the_packages_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = said_by(capsys)
    assert code == 1
    assert said.endswith('which are not installed: pip install "phi3-mlx[serve]"')


def test_help_and_other_commands_import_no_web_server():
    code = "import sys; from phi3_mlx.cli import main\ntry: main(['serve', '-h'])\nexcept SystemExit: pass\n"
    code += "assert not {'starlette', 'uvicorn', 'mlx'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_process_serves_and_ends_politely(tmp_path, number, code):
    file = tmp_path / "key"
    file.write_text("secret\n")
    command = [sys.executable, "-m", "phi3_mlx", "serve", "--port", "0", "--api-key-file", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            first = process.stderr.readline()
            address, page = r"http://127\.0\.0\.1:(\d+)", r"http://127\.0\.0\.1:\1/ \(Ctrl-C stops it\)\n"
            port = re.fullmatch(f"tiny at {address}/v1, with a page to try it at {page}", first)[1]
            body = json.dumps(chat_body(STORY, model="tiny", max_tokens=20))
            for key, status in (("secret", 200), ("other", 401)):
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
                connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
                assert connection.getresponse().status == status
                connection.close()
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(120) == code, rest  # MLX has aborted processes whose threads had streams
        finally:
            process.kill()
    assert "Traceback" not in rest
    assert "secret" not in rest


_STUCK = """
import sys, time
from phi3_mlx.cli import main
from phi3_mlx.server.worker import Worker
Worker.close = lambda self, wait=True: time.sleep(60)
main(["serve", "--port", "0"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stuck", [False, True])
def test_a_second_signal_ends_the_process_at_once(number, stuck):
    command = [sys.executable, *(["-c", _STUCK] if stuck else ["-m", "phi3_mlx", "serve", "--port", "0"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            port = re.search(r":(\d+)/v1", process.stderr.readline())[1]
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
            with contextlib.closing(connection):
                body = chat_body(STORY, model="tiny", max_tokens=100_000, stream=True, logit_bias=ENDLESS)
                connection.request("POST", "/v1/chat/completions", json.dumps(body))
                answer = connection.getresponse()
                answer.readline()
                process.send_signal(number)
                time.sleep(0.5)
                assert process.poll() is None  # one lets answers end
                assert answer.readline()
                started = time.monotonic()
                process.send_signal(number)
                told = answer.read()
                code = process.wait(120)
            assert time.monotonic() - started < 25  # answers have 30 seconds
            assert b"the server stopped before the answer ended" in told
            assert code == (128 + number if stuck else {signal.SIGINT: 130, signal.SIGTERM: 0}[number])
        finally:
            process.kill()


def test_what_was_read_is_there_after_the_server_was_killed(tmp_path):
    command = [sys.executable, "-m", "phi3_mlx", "serve", "--port", "0", "--prefixes", str(tmp_path / "kept")]
    counts = []
    for question in ("Who is she?", "Where is she?"):
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        ) as process:
            try:
                port = re.search(r":(\d+)/v1", process.stderr.readline())[1]
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
                body = chat_body(f"{LONG} {question}", model="tiny", max_tokens=3)
                connection.request("POST", "/v1/chat/completions", json.dumps(body))
                counts.append(json.loads(connection.getresponse().read())["usage"])
                connection.close()
                wait_until(lambda: [*tmp_path.glob("kept/*.cache")])
            finally:
                process.kill()
    assert [usage["prompt_tokens_details"]["cached_tokens"] > 200 for usage in counts] == [False, True]


def test_a_chat_is_generates_answer(served):
    model, tokenizer = load("tiny")
    expected = generate(model, tokenizer, STORY, max_tokens=40)
    assert served.chat(STORY, model="tiny", max_tokens=40)[2]["choices"][0]["message"]["content"] == expected
    data, _ = events(served.chat(STORY, model="tiny", max_tokens=40, stream=True)[2])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data[:-1])
    assert text == expected


def test_many_chats_at_once_are_what_each_is_alone(served):
    model, tokenizer = load("tiny")
    prompts = [f"Tell me a story about a {animal}." for animal in ("duck", "frog", "cat", "dog", "owl", "lion")]
    answers = [None] * len(prompts)

    def ask(number, prompt):
        answers[number] = served.chat(prompt, model="tiny", max_tokens=20)[2]["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=item) for item in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [generate(model, tokenizer, prompt, max_tokens=20) for prompt in prompts]


def test_the_second_turn_reads_only_what_is_new(served):
    first = served.chat(STORY, model="tiny", max_tokens=40)[2]
    said = first["choices"][0]["message"]
    messages = [{"role": "user", "content": STORY}, said, {"role": "user", "content": "And then?"}]
    usage = served.chat(model="tiny", messages=messages, max_tokens=5)[2]["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] + 30
    assert cached < usage["prompt_tokens"]


def test_a_prompt_that_never_fits_the_context_is_told_with_the_numbers(served):
    status, _, reply = served.chat("word " * 5000, model="tiny")
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert "4,096" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/v1/responses", "input")]
)
def test_the_field_of_a_long_prompt_is_named(served, path, name):
    prompt = [{"role": "user", "content": "word " * 5000}] if name == "messages" else "word " * 5000
    status, _, reply = served.request("POST", path, {"model": "tiny", name: prompt})
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert reply["error"]["param"] == name


def test_the_field_that_the_engine_refuses_is_named(served):
    error = served.chat(STORY, model="tiny", logit_bias={"99999": 1})[2]["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "logit_bias")


@pytest.fixture
def never_encoded(monkeypatch):
    """What is encoded all the same, which for a minute keeps others waiting."""

    def encoded(*_, **__):
        raise AssertionError("the prompt is encoded")

    monkeypatch.setattr(prompts, "encode_prompt", encoded)


@pytest.mark.usefixtures("never_encoded")
def test_many_empty_messages_are_too_long_too(served):
    messages = [{"role": "user", "content": ""}] * 100_000
    assert served.chat(model="tiny", messages=messages)[2]["error"]["code"] == "context_length_exceeded"


@pytest.mark.usefixtures("never_encoded")
@pytest.mark.parametrize("text", ["a" * 4_000_000, "é漢 " * 500_000])
def test_a_huge_prompt_is_refused_before_it_is_encoded(served, text):
    status, _, reply = served.chat(text, model="tiny")
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert "tokens or more" in reply["error"]["message"]


def test_a_prompt_of_the_longest_tokens_is_not_taken_for_too_long(served):
    _, tokenizer = load("tiny")
    words = [token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token).strip().isalpha()]
    prompt = tokenizer.decode([max(words, key=lambda token: len(tokenizer.token_bytes(token)))] * 4000)
    status, _, reply = served.request("POST", "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1})
    assert status == 200, reply["error"]["message"]


def test_a_response_format_holds_the_answer(served):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    kind = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    for form in ({"response_format": kind}, {"regex": '[{]"a":(true|false)[}]'}):
        reply = served.request("POST", "/v1/chat/completions", chat_body(STORY, model="tiny", **form))[2]
        assert reply["choices"][0]["message"]["content"] in ('{"a":true}', '{"a":false}')
        assert reply["choices"][0]["finish_reason"] == "stop"


TOOL = {
    "name": "colour",
    "parameters": {
        "type": "object",
        "properties": {"name": {"enum": ["red", "blue"]}},
        "required": ["name"],
        "additionalProperties": False,
    },
}


def test_a_tool_that_must_be_called_is_called_with_arguments_that_fit(served):
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": TOOL}]
    choice = {"type": "function", "function": {"name": "colour"}}
    reply = served.chat(STORY, model="tiny", tools=tools, tool_choice=choice)[2]["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    (call,) = reply["message"]["tool_calls"]
    assert call["function"]["name"] == "colour"
    assert json.loads(call["function"]["arguments"]) in ({"name": "red"}, {"name": "blue"})
    result = {"role": "tool", "tool_call_id": call["id"], "content": "nice"}
    messages = [{"role": "user", "content": STORY}, reply["message"], result]
    for more in ({"tools": tools}, {}):
        status, _, reply = served.chat(model="tiny", messages=messages, max_tokens=5, **more)
        assert status == 200, reply


def test_an_answer_stands_right_behind_the_prompt_that_is_echoed(served):
    body = {"model": "tiny", "prompt": "Once upon", "echo": True, "logprobs": 1, "max_tokens": 4}
    choice = served.request("POST", "/v1/completions", body)[2]["choices"][0]
    assert choice["text"] == "Once upon a time, there"
    pieces, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert all(choice["text"].startswith(piece, offset) for offset, piece in zip(offsets[1:], pieces[1:], strict=True))
    assert offsets == [0, 4, 9, 11, 16, 17]
    # By itself it has no space in front, and neither has one of a given form.
    assert (
        served.request("POST", "/v1/completions", {**body, "echo": False})[2]["choices"][0]["text"] == "a time, there"
    )
    pytest.importorskip("llguidance")
    choice = served.request("POST", "/v1/completions", {**body, "regex": "a t[a-z]+"})[2]["choices"][0]
    assert re.fullmatch("a t[a-z]+", choice["text"].removeprefix("Once upon"))


def test_completions_score_a_prompt_that_is_echoed(served):
    model, tokenizer = load("tiny")
    ids = [int(token) for token in tokenizer.encode("Once upon a time, there was a duck.")]
    body = {"model": "tiny", "prompt": [ids, ids[:5]], "echo": True, "logprobs": 2, "max_tokens": 0}
    first, second = served.request("POST", "/v1/completions", body)[2]["choices"]
    (expected,) = score(model, tokenizer, ids[:1], [ids[1:]])
    assert first["logprobs"]["token_logprobs"][0] is None
    assert first["logprobs"]["token_logprobs"][1:] == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(second["logprobs"]["tokens"]) == 5
    assert second["logprobs"]["text_offset"][0] == 0
    assert len(first["logprobs"]["top_logprobs"][3]) in (2, 3)
    text = tokenizer.decode(ids)
    assert first["text"] == text
    for offset, piece in zip(first["logprobs"]["text_offset"], first["logprobs"]["tokens"], strict=True):
        assert text[offset:].lstrip().startswith(piece.strip())
    assert first["finish_reason"] == "length"


def test_log_probabilities_of_an_answer_are_generates(served):
    model, tokenizer = load("tiny")
    expected = list(stream_generate(model, tokenizer, STORY, max_tokens=8, lookup=0))
    reply = served.chat(STORY, model="tiny", max_tokens=8, logprobs=True, top_logprobs=3)[2]["choices"][0]
    told = reply["logprobs"]["content"]
    assert [token["logprob"] for token in told] == pytest.approx([chunk.logprob for chunk in expected], abs=1e-4)
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in told)  # the likeliest was taken
    assert {len(token["top_logprobs"]) for token in told} == {3}
