"""Models of other families: mlx-lm's own tokens behind the same request, and what they cannot do is said in a line."""

import io
import json
import math
import sys
import threading

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from other_models import CONTROL, KINDS, WINDOW, make_checkpoint

import phi3_mlx
from phi3_mlx import cli
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.plan import Workload
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import CheckpointError, ConfigError, ContextLengthError, MemoryLimitError, OptionError, Phi3Error
from phi3_mlx.generation.request import Request
from phi3_mlx.server.models import Models
from phi3_mlx.server.work import Ended, Failed, Piece, Work
from phi3_mlx.server.worker import Worker
from phi3_mlx.store import hub, other

PROMPT = [*range(60, 60 + 3 * WINDOW), 7, 5, 3, 2]  # longer than the windows
END = 256 + CONTROL.index("<|im_end|>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("other")
    return {kind: make_checkpoint(base / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def llama(folders):
    return phi3_mlx.load(folders["llama"])


def naive(folder, ids, tokens):
    """mlx-lm's own greedy tokens, up to the one that ends an answer."""
    model, _ = mlx_lm.utils.load_model(folder)
    answer = []
    for token, _ in zip(generate_step(mx.array(ids), model, max_tokens=tokens), range(tokens), strict=False):
        answer.append(token[0])
        if token[0] == END:
            break
    return answer


def tokens_of(model, tokenizer, ids, tokens=24, **options):
    return [chunk.token for chunk in phi3_mlx.stream_generate(model, tokenizer, ids, max_tokens=tokens, **options)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_mlx_lm(kind, folders):
    model, tokenizer = phi3_mlx.load(folders[kind])
    assert tokens_of(model, tokenizer, PROMPT) == naive(folders[kind], PROMPT, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cache_keeps_is_what_mlx_lm_reads_anew(kind, folders):
    model, tokenizer = phi3_mlx.load(folders[kind])
    cache = phi3_mlx.PromptCache(model)
    tokens_of(model, tokenizer, PROMPT, 8, prompt_cache=cache)
    other_end = [*PROMPT[:50], 9, 8]  # goes back further than a window, and than a state that only grows
    chunks = list(phi3_mlx.stream_generate(model, tokenizer, other_end, max_tokens=12, prompt_cache=cache))
    assert [chunk.token for chunk in chunks] == naive(folders[kind], other_end, 12)
    assert chunks[-1].prefilled_tokens == 2


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_answered_together_give_what_each_gives_alone(kind, folders):
    model, _ = phi3_mlx.load(folders[kind])
    prompts = [PROMPT, PROMPT[:5], [3]]
    scheduler = Scheduler(model, chunk=16)
    rows = [scheduler.submit(Job(prompt, 10)) for prompt in prompts]
    while scheduler.busy:
        scheduler.step()
    assert [row.error for row in rows] == [None] * 3
    alone = [naive(folders[kind], prompt, 10) for prompt in prompts]
    # mlx-lm ends at a token that these jobs do not name.
    assert [row.answer[: len(answer)] for row, answer in zip(rows, alone, strict=True)] == alone


def test_a_chunk_that_was_broken_off_is_not_taken_for_read(folders, monkeypatch):
    model, tokenizer = phi3_mlx.load(folders["llama"])
    cache = phi3_mlx.PromptCache(model)
    tokens_of(model, tokenizer, PROMPT[:30], 2, prompt_cache=cache)
    network = type(model.model.network)

    def broken(self, *args, **more):
        whole(self, *args, **more)
        raise KeyboardInterrupt

    whole = network.__call__
    monkeypatch.setattr(network, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(model, tokenizer, PROMPT, 2, prompt_cache=cache)
    monkeypatch.undo()
    fresh, again = (
        [chunk.logprob for chunk in phi3_mlx.stream_generate(model, tokenizer, PROMPT, max_tokens=4, prompt_cache=kept)]
        for kept in (None, cache)
    )
    assert again == pytest.approx(fresh, abs=1e-4)


@pytest.fixture
def lengths(llama, monkeypatch):
    """How many tokens the network reads, call after call."""
    network, calls = type(llama[0].model.network), []
    whole = network.__call__

    def counting(self, ids, *args, **more):
        calls.append(ids.shape[1])
        return whole(self, ids, *args, **more)

    monkeypatch.setattr(network, "__call__", counting)
    return calls


def test_the_last_token_of_a_prompt_is_read_alone_and_no_chunk_is_read_for_nothing(llama, lengths):
    scheduler = Scheduler(llama[0], chunk=16)
    scheduler.submit(Job(PROMPT[:40], 3))
    while scheduler.busy:
        scheduler.step()
    assert lengths == [16, 16, 7, 1, 1, 1]


def test_no_token_is_guessed_and_none_is_read_because_a_form_forces_it(llama, lengths):
    pytest.importorskip("llguidance")
    model, tokenizer = llama
    repeating = [5, 6, 7, 8] * 12
    (*_, last) = phi3_mlx.stream_generate(model, tokenizer, repeating, max_tokens=20, lookup=8)
    assert last.drafted_tokens == 0
    lengths.clear()
    assert phi3_mlx.generate(model, tokenizer, [5, 6, 7], regex="all of this is forced") == "all of this is forced"
    assert {*lengths[1:]} == {1}


def test_text_and_chats_become_the_ids_of_mlx_lm_s_tokenizer(folders, llama):
    theirs, ours = mlx_lm.utils.load_tokenizer(folders["llama"]), llama[1]
    for text in ("A plain text, ünïcode 鴨", "with <|im_end|> in it", "\n"):
        assert ours.encode(text, special=True) == theirs.encode(text)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    assert phi3_mlx.encode_prompt(ours, chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)
    assert ours.stop_ids == theirs.eos_token_ids


def test_only_what_the_files_name_ends_an_answer(llama, folders):
    assert llama[1].stop_ids == {END}
    assert phi3_mlx.load_tokenizer(f"mlx-lm:{folders['llama']}").stop_ids == {END}


def test_a_chat_has_no_token_that_its_template_does_not_write(folders, tmp_path):
    folder = make_checkpoint(tmp_path / "bos")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = phi3_mlx.load_tokenizer(folder)
    assert tokenizer.decode(phi3_mlx.encode_prompt(tokenizer, "Hi")[:1], skip_special=False) == "<|im_start|>"
    assert tokenizer.decode(phi3_mlx.encode_prompt(tokenizer, "Hi", raw=True)[:1], skip_special=False) == CONTROL[0]


def test_draws_repeat_with_their_seed_and_have_the_model_s_log_probabilities(llama):
    model, tokenizer = llama
    draw = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    chunks = list(phi3_mlx.stream_generate(model, tokenizer, PROMPT, **draw))
    again = list(phi3_mlx.stream_generate(model, tokenizer, PROMPT, **draw))
    differently = list(phi3_mlx.stream_generate(model, tokenizer, PROMPT, **{**draw, "seed": 4}))
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in again]
    assert [chunk.token for chunk in chunks] != [chunk.token for chunk in differently]
    ids = [*PROMPT, *(chunk.token for chunk in chunks)]
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32), dtype=np.float64)
    for place, chunk in enumerate(chunks, len(PROMPT) - 1):
        expected = logits[place, chunk.token] - np.logaddexp.reduce(logits[place])
        assert chunk.logprob == pytest.approx(expected, abs=1e-4)


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(llama):
    model, tokenizer = llama
    whole = phi3_mlx.generate(model, tokenizer, PROMPT, max_tokens=24)
    assert len(whole) > 6
    stop = whole[4:6]
    assert phi3_mlx.generate(model, tokenizer, PROMPT, max_tokens=24, stop=stop) == whole[: whole.index(stop)]


def test_an_answer_has_the_form_that_is_asked_for(llama):
    pytest.importorskip("llguidance")
    model, tokenizer = llama
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["b"]}
    schema["additionalProperties"] = False
    answer = json.loads(phi3_mlx.generate(model, tokenizer, "Answer.", schema=schema, max_tokens=200))
    assert isinstance(answer["b"], bool)
    assert phi3_mlx.generate(model, tokenizer, "Answer.", choices=["yes", "no"], temperature=1.0) in ("yes", "no")


def test_scores_are_those_of_one_pass(llama):
    model, tokenizer = llama
    continuations = [[9, 8, 7], [9, 1], [4]]
    scores = phi3_mlx.score(model, tokenizer, PROMPT, continuations)
    for ids, score in zip(continuations, scores, strict=True):
        logits = np.array(model(mx.array([[*PROMPT, *ids]]))[0].astype(mx.float32), dtype=np.float64)
        rows = logits[len(PROMPT) - 1 : -1]
        expected = [row[token] - np.logaddexp.reduce(row) for row, token in zip(rows, ids, strict=True)]
        assert score.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_conversation_reads_only_what_is_new(llama):
    conversation = phi3_mlx.Conversation(*llama)
    first = list(conversation.send("One", max_tokens=4))
    second = list(conversation.send("Two", max_tokens=4))
    assert first[-1].prefilled_tokens == first[-1].prompt_tokens
    assert second[-1].prefilled_tokens < second[-1].prompt_tokens - 20


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_an_upper_estimate(kind, folders):
    model, tokenizer = phi3_mlx.load(folders[kind])
    for tokens in (40, 300):
        ids = [n % 250 for n in range(tokens)]
        plan = Workload.of_model(model, tokens + 20).plan(math.inf)
        before = mx.get_active_memory()
        peak = list(phi3_mlx.stream_generate(model, tokenizer, ids, max_tokens=20))[-1].peak_memory
        assert peak - (before - plan.weights) <= plan.total


@pytest.mark.parametrize("kind", KINDS)
def test_no_cache_is_larger_than_planned(kind, folders):
    model, _ = phi3_mlx.load(folders[kind])
    for chunks in ([1], [255, 1], [200, 57], [256, 1, 30], [100, 100, 100]):
        cache = model.make_cache()
        for length in chunks:
            mx.eval(model(mx.zeros((1, length), dtype=mx.int32), cache))
        assert 0 < cache[0].nbytes <= model.config.cache_bytes(sum(chunks))


def test_generate_plans_a_run_before_the_weights_are_read(folders, capsys, monkeypatch):
    monkeypatch.setattr(other, "read_weights", lambda model: pytest.fail("weights were read"))
    room = f"{(mx.get_active_memory() + 500_000) / 1e6:.3f}MB"
    given = ("-m", folders["llama"], "-p", "x" * 300, "--memory", room)
    code, out, err = run(capsys, monkeypatch, "generate", *given)
    assert (code, out) == (1, "")
    assert "of the prompt" in err
    assert "keys and values" in err


def test_what_does_not_fit_is_refused_with_its_numbers_before_it_is_read(folders, monkeypatch):
    monkeypatch.setattr(other, "read_weights", lambda model: pytest.fail("weights were read"))
    room = mx.get_active_memory() + 20_000
    with phi3_mlx.memory_limit(room), pytest.raises(MemoryLimitError, match=r"needs .*weights.*may be used"):
        phi3_mlx.load(folders["llama"])


def test_a_run_that_does_not_fit_is_refused_with_its_numbers(llama):
    model, tokenizer = llama
    needed = Workload.of_model(model, 300).plan(0).total
    with (
        phi3_mlx.memory_limit(mx.get_active_memory() + needed // 4),
        pytest.raises(MemoryLimitError, match=r"tokens .*need"),
    ):
        phi3_mlx.generate(model, tokenizer, [1] * 280, max_tokens=20)
    with pytest.raises(ContextLengthError, match="context is 400"):
        phi3_mlx.generate(model, tokenizer, [1] * 400)


def test_the_memory_is_given_back(folders):
    model, tokenizer = phi3_mlx.load(folders["llama"])
    phi3_mlx.unload(model)
    with pytest.raises(Phi3Error, match="was unloaded"):
        phi3_mlx.generate(model, tokenizer, "x")


# ------------------------------------------------------------------------------------------------ refusals


def test_a_repository_is_another_family_s_only_if_its_name_says_so(folders, monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda name, revision=None: folders["qwen3"])
    assert phi3_mlx.load("mlx-lm:somebody/model")[0].config.model_type == "qwen3"
    with pytest.raises(ConfigError, match=r"model_type 'qwen3' is not supported.*mlx-lm:NAME"):
        phi3_mlx.load("somebody/model")


def test_code_that_a_model_brings_is_never_run(tmp_path):
    folder = make_checkpoint(tmp_path / "code", model_file="evil.py")
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CheckpointError, match=r"brings code of its own .*never run"):
        phi3_mlx.load(folder)


def test_what_mlx_lm_cannot_load_is_said_in_a_line(tmp_path):
    folder = make_checkpoint(tmp_path / "unknown", model_type="duck9")
    with pytest.raises(CheckpointError, match=r"mlx-lm cannot load .*duck9") as unknown:
        phi3_mlx.load(folder)
    folder = make_checkpoint(tmp_path / "torn")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError) as torn:
        phi3_mlx.load(folder)
    folder = make_checkpoint(tmp_path / "thin", num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match="mlx-lm cannot load") as thin:
        phi3_mlx.load(folder)
    for error in (unknown, torn, thin):
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


def test_options_of_the_phi_family_are_refused_by_name(folders, llama):
    folder, (model, tokenizer) = folders["llama"], llama
    refused = {
        "kv_bits": lambda: phi3_mlx.generate(model, tokenizer, "x", kv_bits=4),
        "draft is": lambda: phi3_mlx.generate(model, tokenizer, "x", draft=llama),
        "draft takes": lambda: phi3_mlx.generate(*phi3_mlx.load("tiny"), "x", draft=llama),
        "prefixes": lambda: phi3_mlx.generate(model, tokenizer, "x", prefixes=phi3_mlx.PrefixStore("1MB")),
        "adapter": lambda: phi3_mlx.load(folder, adapter="somewhere"),
        "longrope": lambda: phi3_mlx.load(folder, longrope="long"),
        "a cache's file": lambda: phi3_mlx.PromptCache(model).save("x.cache"),
        "compare": lambda: phi3_mlx.compare(model, tokenizer, model, tokenizer, "some text"),
        "kv_bits is": lambda: phi3_mlx.Conversation(model, tokenizer, kv_bits=4),
    }
    for words, call in refused.items():
        with pytest.raises(OptionError, match=rf"{words}.* Phi family alone"):
            call()


def run(capsys, monkeypatch, *args, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
    with pytest.raises(SystemExit) as exit:
        cli.main([*map(str, args)])
    return exit.value.code or 0, *capsys.readouterr()


NAME = "mlx-lm:nobody/nothing"  # which is refused before anybody looks for it
REFUSED = [
    (["tune", "-m", NAME, "-d", "x.jsonl", "-o", "y"], "can only answer"),
    (["convert", NAME, "-o", "y"], "can only answer"),
    (["cache", "build", "-m", NAME, "-f", __file__, "-o", "y"], "can only answer"),
    (["compare", NAME, "tiny"], "can only answer"),
    (["plan", "-m", NAME], "can only answer"),
    (["generate", "-m", "tiny", "--draft-model", NAME, "-p", "x"], "can only answer"),
    (["generate", "-m", "mlx-lm:", "-p", "x"], "mlx-lm: names no model; write mlx-lm:OWNER/REPO or mlx-lm:DIRECTORY"),
    (["generate", "-m", NAME, "-p", "x", "--adapter", "y"], "--adapter is for the Phi family alone"),
    (["generate", "-m", NAME, "-p", "x", "--longrope", "long"], "--longrope is for the Phi family alone"),
    (["generate", "-m", NAME, "-p", "x", "--kv-bits", "4"], "--kv-bits is for the Phi family alone"),
    (["generate", "-m", NAME, "-p", "x", "--draft-model", "tiny"], "--draft-model is for the Phi family alone"),
    (["generate", "-m", NAME, "-p", "x", "--prefixes", "y"], "--prefixes is for the Phi family alone"),
    (["chat", "-m", NAME, "--prefixes", "y"], "--prefixes is for the Phi family alone"),
    (["chat", "-m", NAME, "--kv-bits", "4"], "--kv-bits is for the Phi family alone"),
]


@pytest.mark.parametrize(("args", "words"), REFUSED, ids=[" ".join(args[:1] + args[-2:]) for args, _ in REFUSED])
def test_commands_and_options_that_cannot_take_one_say_so_in_a_line(args, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    code, out, err = run(capsys, monkeypatch, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_directory_of_another_family_is_refused_by_the_same_commands(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = folders["qwen3"]
    reading = ["cache", "build", "-m", folder, "-f", __file__, "-o", "y"]
    for args in (["plan", "-m", folder], reading, ["compare", folder, folder], ["compare", folder, folder, "--force"]):
        code, out, err = run(capsys, monkeypatch, *args)
        assert (code, out) == (1, "")
        assert "model_type 'qwen3' is not supported" in err
        assert "mlx-lm:NAME" in err
        assert err.count("\n") == 1


def test_a_cache_s_file_is_not_for_another_family(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A duck and a frog.")
    assert run(capsys, monkeypatch, "cache", "build", "-m", "tiny", "-f", "text.txt", "-o", "x.cache")[0] == 0
    code, out, err = run(capsys, monkeypatch, "generate", "-m", NAME, "--cache", "x.cache", "-p", "Who?")
    assert (code, out) == (2, "")
    assert "--cache is for the Phi family alone" in err


def test_generate_says_whose_code_runs_and_answers(folders, llama, capsys, monkeypatch):
    expected = phi3_mlx.generate(*llama, "Hello", max_tokens=12)
    for name in (folders["llama"], f"mlx-lm:{folders['llama']}"):
        code, out, err = run(capsys, monkeypatch, "generate", "-m", name, "-p", "Hello", "--max-tokens", 12)
        assert code == 0
        assert out.rstrip("\n") == expected.rstrip("\n")
        assert "exactness is promised for the Phi family alone" in err


def test_json_says_whose_code_has_answered(folders, capsys, monkeypatch):
    for name, code in ((folders["llama"], "mlx-lm"), ("tiny", "phi3-mlx")):
        _, out, _ = run(capsys, monkeypatch, "generate", "-m", name, "-p", "Hi", "--max-tokens", 2, "--json")
        assert json.loads(out)["code"] == code


def test_a_phi_model_runs_with_mlx_lm_s_code_where_that_is_asked_for(capsys, monkeypatch, tmp_path):
    code, out, err = run(capsys, monkeypatch, "generate", "-m", "mlx-lm:tiny", "-p", "A story.", "--max-tokens", 8)
    assert code == 0
    assert out.strip()
    assert "mlx-lm's code" in err


def test_chat_takes_one_turn_after_the_other(folders, capsys, monkeypatch):
    code, out, err = run(
        capsys, monkeypatch, "chat", "-m", folders["llama"], "--max-tokens", 4, "--stats", stdin="One\nTwo\n"
    )
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert err.count("of them new") == 2


# ------------------------------------------------------------------------------------------------ the server


def answers_of(worker, name, prompt, n=1, **options):
    """The texts of n answers, once all have ended."""
    events, over = [], threading.Event()

    def listen(event):
        events.append(event)
        if isinstance(event, Failed) or sum(isinstance(event, Ended) for event in events) == n:
            over.set()

    worker.submit(Work(name, prompt, Request(**options), n, 2), listen)
    assert over.wait(60)
    assert not [event for event in events if isinstance(event, Failed)]
    pieces = [event for event in events if isinstance(event, Piece)]
    return ["".join(piece.text for piece in pieces if piece.index == index) for index in range(n)]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mamba"])
def test_the_server_gives_the_answers_of_generate(kind, folders):
    name = f"mlx-lm:{folders[kind]}"
    model, tokenizer = phi3_mlx.load(name)
    worker = Worker(Models([name, "tiny"]))
    try:
        ours = phi3_mlx.generate(*phi3_mlx.load("tiny"), "Hi", max_tokens=6)
        expected = [
            phi3_mlx.generate(model, tokenizer, "Hello", temperature=1.0, seed=5 + i, max_tokens=9) for i in (0, 1)
        ]
        assert answers_of(worker, name, "Hello", 2, temperature=1.0, seed=5, max_tokens=9) == expected
        assert answers_of(worker, "tiny", "Hi", max_tokens=6) == [ours]
        assert answers_of(worker, name, "Hello", 2, temperature=1.0, seed=5, max_tokens=9) == expected
    finally:
        worker.close(wait=False)


def test_the_server_lists_them_as_what_they_are_and_gives_them_no_adapter(folders):
    name = str(folders["llama"])
    (card,) = Models([name]).listed()
    assert (card.name, card.context) == (name, 400)
    assert "exactness is promised for the Phi family alone" in card.about
    with pytest.raises(OptionError, match="adapter is for the Phi family alone"):
        Models([name], {"tales": (name, "somewhere")})
    with pytest.raises(OptionError, match="longrope is for the Phi family alone"):
        Models([name], longrope="short")


def test_the_server_reads_a_phi_s_files_in_two_ways_at_once():
    models = Models(["tiny", "mlx-lm:tiny"])
    assert models.tokenizer("tiny") is not models.tokenizer("mlx-lm:tiny")
    assert models.tokenizer("tiny").chat_begins_with_bos
    assert not models.tokenizer("mlx-lm:tiny").chat_begins_with_bos
