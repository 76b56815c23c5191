"""Prefixes in files: for later and for other processes, whatever else is in the directory."""

import io
import math
import os
import re
import subprocess
import sys
import threading
import time

import mlx.core as mx
import oracle
import pytest
from oracle import CONFIGS, slim
from test_prefixes import MODELS, PLAIN, answers, ids_of, read_by, small_steps  # noqa: F401

from phi3_mlx import PrefixStore, PromptCache, generate, load
from phi3_mlx.cli import main
from phi3_mlx.engine import prefix_files
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import CacheError, OptionError
from phi3_mlx.models.cache import KVBits
from phi3_mlx.store.atomic import hold

TEXT = ids_of(300, 0)
QUESTIONS = [[*TEXT, *ids_of(5 + i, 3 + i)] for i in range(6)]


def files_in(folder):
    return sorted(folder.iterdir())


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*"))


@pytest.mark.parametrize("bits", [None, KVBits(8, 4)], ids=["plain", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_what_one_store_has_read_another_takes_from_its_files(name, bits, tmp_path):
    model = MODELS[name]
    bits = bits if model.config.head_dim % 32 == 0 else None
    first, _ = answers(model, QUESTIONS[:1], PrefixStore(directory=tmp_path), bits=bits)
    later = PrefixStore(directory=tmp_path)
    for i, question in enumerate(QUESTIONS):
        said, read = answers(model, [question], later, bits=bits)
        assert said == answers(model, [question], bits=bits)[0]
        if model.config.sliding_window is None:
            assert read <= 5 + i
    again = [*QUESTIONS[0], *first[0], 9]
    assert answers(model, [again], PrefixStore(directory=tmp_path), bits=bits)[1] <= 3


def test_one_file_holds_a_text_and_later_answers_are_not_written(tmp_path):
    answers(PLAIN, QUESTIONS, PrefixStore(directory=tmp_path))
    (file,) = files_in(tmp_path)
    assert PromptCache.load(file, PLAIN).ids[:300] == TEXT  # as `cache build` writes it


def test_a_file_that_another_goes_on_from_is_removed(tmp_path):
    prefixes, ids = PrefixStore(directory=tmp_path), ids_of(100, 0)
    for turn in range(4):
        (said,), _ = answers(PLAIN, [ids], prefixes)
        ids = ids + said + ids_of(60, turn)
        assert len(files_in(tmp_path)) == 1
    assert answers(PLAIN, [ids], PrefixStore(directory=tmp_path))[1] < 130


def test_a_file_of_cache_build_is_used_and_never_removed(tmp_path):
    cache = PromptCache(PLAIN)
    cache.read(TEXT)
    cache.save(tmp_path / "text.cache")
    said, read = answers(PLAIN, QUESTIONS, PrefixStore(directory=tmp_path))
    assert read == sum(5 + i for i in range(6))
    assert said == answers(PLAIN, QUESTIONS)[0]
    assert files_in(tmp_path) == [tmp_path / "text.cache"]


def test_what_is_in_memory_is_not_read_from_its_file(tmp_path, monkeypatch):
    prefixes = PrefixStore(directory=tmp_path)
    answers(PLAIN, QUESTIONS[:1], prefixes)
    assert files_in(tmp_path)
    monkeypatch.setattr(prefix_files, "read_layers", None)
    assert answers(PLAIN, [QUESTIONS[1]], prefixes)[1] == 6


def test_a_short_text_is_not_worth_a_file(tmp_path):
    answers(PLAIN, [ids_of(40, 0)], PrefixStore(directory=tmp_path))
    assert files_in(tmp_path) == []


def test_other_weights_bits_and_regimes_take_nothing_from_a_file(tmp_path):
    answers(PLAIN, QUESTIONS[:1], PrefixStore(directory=tmp_path))
    model = oracle.make_ours(slim(CONFIGS["3.5-mini"]), seed=5)
    twin = oracle.make_ours(slim(CONFIGS["3.5-mini"]))
    read = len(QUESTIONS[1])
    assert answers(model, [QUESTIONS[1]], PrefixStore(directory=tmp_path))[1] == read
    assert answers(PLAIN, [QUESTIONS[1]], PrefixStore(directory=tmp_path), bits=KVBits(8, 8))[1] == read
    short = TEXT[:40]
    assert answers(PLAIN, [short], PrefixStore(directory=tmp_path)) == answers(PLAIN, [short])
    assert answers(twin, [QUESTIONS[1]], PrefixStore(directory=tmp_path))[1] == 6


def test_a_window_in_a_file_that_has_gone_on_is_no_beginning(tmp_path):
    model, cache = MODELS["mini-4k"], PromptCache(MODELS["mini-4k"])
    cache.read(TEXT)
    cache.save(tmp_path / "text.cache")
    for cut in (250, 290):
        prompt = [*TEXT[:cut], 91, 92]
        assert answers(model, [prompt], PrefixStore(directory=tmp_path))[0] == answers(model, [prompt])[0]
    assert answers(model, [[*TEXT[:250], 91]], PrefixStore(directory=tmp_path))[1] == 251


def test_a_shorter_file_is_taken_where_the_window_of_a_longer_one_has_gone_on(tmp_path):
    model = MODELS["mini-4k"]
    for name, tokens in (("long", 300), ("short", 200)):
        cache = PromptCache(model)
        cache.read(TEXT[:tokens])
        cache.save(tmp_path / f"{name}.cache")
    prompt = [*TEXT[:202], 91]
    assert answers(model, [prompt], PrefixStore(directory=tmp_path)) == (answers(model, [prompt])[0], 3)


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda content: b"", lambda content: b"rubbish" * 99, lambda _: b"\0" * 9]
)
def test_a_damaged_file_is_no_hit_and_is_removed(damage, tmp_path):
    answers(PLAIN, QUESTIONS[:1], PrefixStore(directory=tmp_path))
    (file,) = files_in(tmp_path)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    foreign = [tmp_path / name for name in ("notes.txt", "mine.cache", "prefix-1.cache")]
    for path in foreign:
        path.write_bytes(damage(content))
    (tmp_path / "folder.cache").mkdir()
    os.mkfifo(tmp_path / "pipe.cache")
    (tmp_path / "nowhere.cache").symlink_to(tmp_path / "gone")
    said, read = answers(PLAIN, [QUESTIONS[1]], PrefixStore(directory=tmp_path))
    assert said == answers(PLAIN, [QUESTIONS[1]])[0]
    assert read == len(QUESTIONS[1])
    assert [path.read_bytes() for path in foreign] == [damage(content)] * 3
    (written,) = [path for path in files_in(tmp_path) if path.name.startswith("prefix-") and path not in foreign]
    assert PromptCache.load(written, PLAIN).ids[:300] == TEXT


def test_a_file_that_says_it_holds_other_ids_is_no_hit(tmp_path):
    answers(PLAIN, QUESTIONS[:1], PrefixStore(directory=tmp_path))
    (file,) = files_in(tmp_path)
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    arrays["ids"][3] = 77
    mx.save_safetensors(str(tmp_path / "a.safetensors"), arrays, metadata)
    (tmp_path / "a.safetensors").rename(file)
    prompt = [*TEXT[:3], 77, *TEXT[4:], 5]
    assert answers(PLAIN, [prompt], PrefixStore(directory=tmp_path)) == answers(PLAIN, [prompt])
    assert not file.exists()


def test_files_stay_within_their_bytes_and_the_oldest_go(tmp_path, monkeypatch):
    answers(PLAIN, [ids_of(200, 0)], PrefixStore(directory=tmp_path / "one"))
    size = bytes_in(tmp_path / "one") + 70_000
    prefixes, folder = PrefixStore(directory=tmp_path / "three", disk=3 * size), tmp_path / "three"
    (folder / "mine.txt").write_bytes(b"x" * 10)
    for seed in (0, 1, 2):
        answers(PLAIN, [ids_of(200, seed)], prefixes)
    for i, path in enumerate(folder.glob("prefix-*")):
        os.utime(path, (1000 + i, 1000 + i))
    assert answers(PLAIN, [[*ids_of(200, 0), 9]], PrefixStore(directory=folder))[1] == 1  # used: it is the newest now
    for seed in (3, 4):
        answers(PLAIN, [ids_of(200, seed)], prefixes)
        assert bytes_in(folder) <= 3 * size
    kept = [answers(PLAIN, [[*ids_of(200, seed), 9]], PrefixStore(directory=folder))[1] == 1 for seed in range(5)]
    assert kept == [True, False, False, True, True]
    answers(PLAIN, [ids_of(200, 7)], PrefixStore(directory=tmp_path / "none", disk="100kB"))
    assert files_in(tmp_path / "none") == []


def test_a_full_disk_fails_no_answer_and_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_files, "write_cache", full)
    prefixes = PrefixStore(directory=tmp_path)
    assert answers(PLAIN, QUESTIONS[:1], prefixes) == answers(PLAIN, QUESTIONS[:1])
    assert "No space left" in repr(prefixes)


def test_two_threads_with_stores_of_their_own_share_a_directory(tmp_path):
    said = {}

    def work(first):
        prefixes = PrefixStore(directory=tmp_path, disk="2MB")
        for i in range(first, 6, 2):
            said[i] = answers(PLAIN, [QUESTIONS[i]], prefixes)[0][0]

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[i] for i in range(6)] == [answers(PLAIN, [question])[0][0] for question in QUESTIONS]


# Processes

STORY = "Once there was a dog who had a red ball and a blue hat. " * 8
ASK = """
import sys
from phi3_mlx import PrefixStore, load, stream_generate
{patch}
model, tokenizer = load("tiny")
prefixes = PrefixStore(directory=sys.argv[1], disk="50MB")
for question in sys.argv[3:]:
    chunks = list(stream_generate(model, tokenizer, sys.argv[2] + question, max_tokens=4, prefixes=prefixes))
    print("".join(chunk.text for chunk in chunks), chunks[-1].prefilled_tokens, sep="|")
"""
DIES = """
import os, signal
from phi3_mlx.engine import cache_file
def dies(layers, name):
    yield memoryview(b"half of a file")
    os.kill(os.getpid(), signal.SIGKILL)
cache_file._pieces = dies
"""


def start(folder, *questions, patch=""):
    command = [sys.executable, "-c", ASK.format(patch=patch), str(folder), STORY, *questions]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process):
    """What it said, and how many tokens it read, to each question."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [(line.rpartition("|")[0], int(line.rpartition("|")[2])) for line in output.splitlines()]


def test_a_process_that_is_killed_while_it_writes_leaves_the_directory_usable(tmp_path):
    killed = start(tmp_path, "Who had a hat?", patch=DIES)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert [path.suffix for path in files_in(tmp_path)] == [".partial"]
    first, again = (ended(start(tmp_path, question)) for question in ("Who had a hat?", "Who had a ball?"))
    assert first[0][1] > 100
    assert again[0][1] < 15
    assert [path.suffix for path in files_in(tmp_path)] == [".cache"]
    model, tokenizer = load("tiny")
    assert again[0][0] == generate(model, tokenizer, STORY + "Who had a ball?", max_tokens=4)


def test_two_processes_at_once_share_a_directory(tmp_path):
    both = [start(tmp_path, "Who had a hat?", "Where is it?"), start(tmp_path, "Who had a ball?", "What is red?")]
    for process in both:
        assert ended(process)[1][1] < 15
    assert [path.suffix for path in files_in(tmp_path)] == [".cache"]
    assert ended(start(tmp_path, "Is it blue?"))[0][1] < 15


# Written apart from the steps


class Slow:
    """`write_cache`, which begins once `go` is set."""

    def __init__(self, monkeypatch):
        self.go, self.begun, self.write = threading.Event(), threading.Event(), prefix_files.write_cache
        monkeypatch.setattr(prefix_files, "write_cache", self)

    def __call__(self, *given):
        self.begun.set()
        assert self.go.wait(60)
        self.write(*given)


def test_no_step_waits_for_a_file_and_the_end_of_a_run_does(tmp_path, monkeypatch):
    slow, prefixes = Slow(monkeypatch), PrefixStore(directory=tmp_path)
    runs = Scheduler(PLAIN, room=math.inf, chunk=64, prefixes=prefixes)
    stream, short = runs.submit(Job(ids_of(20, 9), 60)), runs.submit(Job(TEXT, 2))
    while not short.finished:
        runs.step()
    assert slow.begun.wait(60)
    while runs.busy:
        runs.step()
    assert len(stream.answer) == 60
    assert files_in(tmp_path) == []
    ending = threading.Thread(target=runs.end)
    ending.start()
    assert generate(*load("tiny"), "Hi", max_tokens=1) is not None  # nor do other runs
    assert ending.is_alive()
    slow.go.set()
    ending.join()
    assert PromptCache.load(files_in(tmp_path)[0], PLAIN).ids[:300] == TEXT


def test_what_is_forgotten_is_written_first(tmp_path):
    """Also what no answer ended with: of a row that failed."""

    class Fails:
        reads_answer = True

        def __call__(self, answer, logits):
            raise RuntimeError("cannot go on")

    token = nbytes_of_a_token()
    prefixes = PrefixStore(350 * token, directory=tmp_path)
    runs = Scheduler(PLAIN, room=math.inf, chunk=64, prefixes=prefixes)
    runs.submit(Job(TEXT, 4, processors=(Fails(),)))
    while runs.busy:
        runs.step()
    assert files_in(tmp_path) == []
    answers(PLAIN, [ids_of(200, 1)], prefixes)
    assert prefixes.nbytes <= prefixes.budget
    assert prefixes.shared(PLAIN, TEXT) < 200
    again = [*TEXT, 5]
    said, read = answers(PLAIN, [again], PrefixStore(directory=tmp_path))
    assert said == answers(PLAIN, [again])[0]
    assert read <= 64  # the last chunk, in which it failed


def nbytes_of_a_token():
    cache = PLAIN.make_cache(4)
    PLAIN(mx.array([[5, 6, 7, 8]]), cache)
    return sum(layer.nbytes for layer in cache) // 4


def test_while_a_file_is_written_the_store_holds_no_more_than_its_budget(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    prefixes = PrefixStore(350 * nbytes_of_a_token(), directory=tmp_path)
    runs = Scheduler(PLAIN, room=math.inf, chunk=64, prefixes=prefixes)
    runs.submit(Job(TEXT, 2))
    while runs.busy:
        runs.step()
    assert slow.begun.wait(60)
    row = runs.submit(Job(ids_of(290, 1), 4))
    while len(row.answer) < 2:
        runs.step()
        assert prefixes.nbytes <= prefixes.budget
    assert prefixes.shared(PLAIN, [*TEXT, 5]) == 300  # what is being written stays
    slow.go.set()
    while runs.busy:
        runs.step()
    runs.end()
    assert prefixes.nbytes <= prefixes.budget
    for text in (TEXT, ids_of(290, 1)):
        assert answers(PLAIN, [[*text, 5]], PrefixStore(directory=tmp_path))[1] == 1


def test_a_run_does_not_wait_for_the_file_of_what_memory_keeps(tmp_path, monkeypatch):
    prefixes, cache = PrefixStore(directory=tmp_path), read_by(PLAIN, ids_of(100, 0))
    with monkeypatch.context() as patch:
        patch.setattr(prefix_files.PrefixFiles, "settle", None)
        prefixes.give(PLAIN, cache, prefixes.state_of(PLAIN), save=True)
    prefixes.settle()
    assert len(files_in(tmp_path)) == 1


def test_what_is_moved_is_in_its_file_before(tmp_path, monkeypatch):
    """Or it would be there twice, while memory is short."""
    write, ids = prefix_files.write_cache, ids_of(100, 0)
    monkeypatch.setattr(prefix_files, "write_cache", lambda *given: (time.sleep(0.2), write(*given)))
    prefixes, cache = PrefixStore(directory=tmp_path), read_by(PLAIN, ids)
    prefixes.give(PLAIN, cache, prefixes.state_of(PLAIN), save=True)
    (layer, *_) = prefixes.cache_for(PLAIN, [*ids, 5], lacking=math.inf)
    assert (layer.offset, prefixes.nbytes, len(files_in(tmp_path))) == (100, 0, 1)


def test_what_is_written_gives_way_without_waiting(tmp_path):
    texts = [ids_of(100, seed) for seed in range(2)]
    caches = [read_by(PLAIN, ids) for ids in texts]
    prefixes = PrefixStore(sum(layer.nbytes for layer in caches[0]) * 3 // 2, directory=tmp_path)
    state = prefixes.state_of(PLAIN)
    prefixes.give(PLAIN, caches[0], state, save=True)
    prefixes.settle()
    prefixes.give(PLAIN, caches[1], state)
    assert [prefixes.shared(PLAIN, ids) for ids in texts] == [0, 99]


def test_a_text_larger_than_the_budget_is_in_a_file_as_a_whole(tmp_path):
    answers(PLAIN, [TEXT], PrefixStore(100 * nbytes_of_a_token(), directory=tmp_path))
    assert answers(PLAIN, [[*TEXT, 5]], PrefixStore(directory=tmp_path))[1] == 1


def test_a_file_is_used_too_while_memory_holds_what_is_in_it(tmp_path):
    prefixes = PrefixStore(directory=tmp_path)
    answers(PLAIN, [TEXT], prefixes)
    (file,) = files_in(tmp_path)
    os.utime(file, (1000, 1000))
    answers(PLAIN, [ids_of(200, 1)], prefixes)
    assert file.stat().st_mtime == 1000
    answers(PLAIN, [[*TEXT, 5]], prefixes)
    assert file.stat().st_mtime > 1000


def test_one_that_writes_waits_for_another_and_gives_up_in_the_end(tmp_path, monkeypatch):
    prefixes = PrefixStore(directory=tmp_path)
    with hold(tmp_path) as mine:
        assert mine
        run = threading.Thread(target=answers, args=(PLAIN, [TEXT], prefixes))
        run.start()
        run.join(1.0)
        assert run.is_alive()
        assert files_in(tmp_path) == []
    run.join()
    assert len(files_in(tmp_path)) == 1
    monkeypatch.setattr(prefix_files, "_WAIT", 0.1)
    with hold(tmp_path):
        answers(PLAIN, [ids_of(200, 1)], prefixes)
    assert len(files_in(tmp_path)) == 1


def test_where_no_thread_can_start_a_file_is_written_all_the_same(tmp_path, monkeypatch):
    def ends(_):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", ends)
    answers(PLAIN, [TEXT], PrefixStore(directory=tmp_path))
    assert len(files_in(tmp_path)) == 1


@pytest.mark.parametrize("given", [5, True, [], "a\0b"])
def test_another_thing_than_a_directory_is_refused_in_one_line(given):
    with pytest.raises(OptionError, match=r"^directory is .+; expected the name of a folder[^\n]*$"):
        PrefixStore(directory=given)


def test_a_directory_that_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match=r"^\S+file is no folder; name one, which is made if it is not there$"):
        PrefixStore(directory=tmp_path / "file")
    with pytest.raises(CacheError, match=r"^\S+below cannot be used \(.+\); name a folder$"):
        PrefixStore(directory=tmp_path / "file/below")


@pytest.mark.parametrize("disk", ["much", True, [], 0])
def test_a_bound_of_the_files_that_is_no_size_is_refused(disk, tmp_path):
    with pytest.raises(OptionError):
        PrefixStore(directory=tmp_path, disk=disk)


def test_a_bound_without_a_directory_is_refused():
    with pytest.raises(OptionError, match=r"^disk '2GB' has no effect without a directory"):
        PrefixStore(disk="2GB")


# On the command line


def called(capsys, *words):
    """The exit code, the answer, and what was said beside it."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code or 0, *capsys.readouterr()


def test_a_second_call_reads_only_what_is_new(capsys, tmp_path):
    for question, most in (("Who had a hat?", 1000), ("Who had a ball?", 14)):
        words = ("generate", "-p", STORY + question, "--max-tokens", "4", "--stats")
        code, out, err = called(capsys, *words, "--prefixes", tmp_path / "kept")
        assert code == 0
        assert out == called(capsys, *words)[1]
        assert int(re.search(r"\(([\d,]+) read now\)", err)[1].replace(",", "")) < most
    assert len(files_in(tmp_path / "kept")) == 1


def test_a_chat_goes_on_from_the_files_of_an_earlier_one(capsys, tmp_path, monkeypatch):
    text = f"{STORY}Who had a hat?\nAnd a ball?\n"
    read = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code, _, err = called(capsys, "chat", "--max-tokens", "8", "--stats", "--prefixes", tmp_path)
        assert code == 0
        read.append([int(n) for n in re.findall(r"tokens, (\d+) of them new", err)])
    (first, second), (again, _) = read
    assert first > 100
    assert second < 15
    assert again == 1


def test_the_folder_of_prefixes_may_have_a_bound(capsys, tmp_path):
    words = ("generate", "-p", STORY, "--max-tokens", "2", "--prefixes")
    assert called(capsys, *words, f"{tmp_path / 'small'}=10kB")[0] == 0
    assert files_in(tmp_path / "small") == []
    (tmp_path / "a=b").mkdir()
    assert called(capsys, *words, tmp_path / "a=b")[0] == 0
    assert len(files_in(tmp_path / "a=b")) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["DIR/kept=much"], "kept=much: 'much' is not a size"),
        (["="], "--prefixes '=' names no folder; write --prefixes DIR or DIR=SIZE"),
        ([""], "--prefixes '' names no folder"),
        (["DIR/file/below"], "name a folder"),
        (["DIR", "--cache", "DIR/book.cache"], "leave out one of the two"),
    ],
)
def test_a_folder_of_prefixes_that_cannot_be_is_refused_in_one_line(words, expected, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    given = [word.replace("DIR", str(tmp_path)) for word in words]
    code, out, err = called(capsys, "generate", "-p", "Hi", "--prefixes", *given)
    assert code
    assert out == ""
    assert expected in err
    assert err.splitlines()[-1].startswith("phi3-mlx: ")


def test_a_file_that_cannot_be_written_is_said_and_fails_no_call(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_files, "write_cache", full)
    code, out, err = called(capsys, "generate", "-p", STORY, "--max-tokens", "2", "--prefixes", tmp_path)
    assert code == 0
    assert out
    assert "--prefixes has written no file: No space left on device\n" in err
