"""Commands and examples of the README and the guides do what they say; every figure comes from a result file."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
import pytest
from conftest import ROOT
from tuning_models import make_directory

from bench.readme import BLOCKS, PAGES, filled, shown_in
from bench.terminal import PICTURE, draw
from phi3_mlx import save_steering
from phi3_mlx.cli import main

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
FINE_TUNING = TEXTS["docs/fine-tuning.md"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def blocks_of(language):
    """Those of all pages, each once."""
    found = [block for text in TEXTS.values() for block in re.findall(rf"^```{language}\n(.*?)```", text, re.S | re.M)]
    return list(dict.fromkeys(found))


def lines_of(language):
    """Those of all pages; one that stands on several pages comes once."""
    return list(dict.fromkeys(line.strip() for block in blocks_of(language) for line in block.splitlines() if line))


SHELL = lines_of("shell")  # each stands for itself
WALK = lines_of("sh")  # one after the other: fine-tuning, from its data to the end
COMMANDS = [line for line in SHELL if re.match("(echo .+ \\| )?phi3-mlx ", line)]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160
    assert len(README.encode()) <= 10_000


def test_every_shell_line_is_known_here():
    assert COMMANDS
    others = [line.split()[0] for line in SHELL if line not in COMMANDS]
    assert sorted(others) == ["make", "make", "pip", "python3", "python3", "python3"]
    targets = (ROOT / "Makefile").read_text()
    for line in SHELL:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", targets, re.M), line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model with the bundled tokenizer."""
    return make_directory(tmp_path_factory.mktemp("models") / "floats", hidden_size=128, intermediate_size=128)


def write_questions(folder):
    """What the commands of docs/evaluation.md ask: own questions and texts, and a directory with MMLU and more."""
    question = {"question": "Who ran?", "choices": ["a dog", "a cat", "an owl", "a hen"], "answer": 0}
    for split in ("dev", "test"):
        (folder / "eval" / split).mkdir(parents=True)
        (folder / "eval" / split / f"anatomy_{split}.csv").write_text("Who ran?,a dog,a cat,an owl,a hen,A\n" * 5)
    for file in ("questions.jsonl", "eval/arc_challenge_test.jsonl"):
        (folder / file).write_text(f"{json.dumps(question)}\n")
    (folder / "eval" / "gsm8k_test.jsonl").write_text('{"question": "How many ran?", "answer": "One.\\n#### 1"}\n')
    (folder / "test.jsonl").write_text('{"question": "Which of the animals in the story ran to the river first?"}\n')
    (folder / "book.txt").write_text("The dog ran.")
    (folder / "pages.jsonl").write_text('{"text": "The dog ran to the river. It saw a cat there."}\n')
    chat = {"messages": [{"role": role, "content": "Mail me at a@b.org."} for role in ("user", "assistant")]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n")
    (folder / "articles.jsonl").write_text('{"text": "The dog ran."}\n{"text": "The cat sat."}\n')


def write_texts(folder):
    """What the commands of docs/data.md read: texts and a rubric."""
    (folder / "facts.txt").write_text("Does it say how something works? Text: {text}\nAnswer no or yes.")
    (folder / "pool.jsonl").write_text('{"text": "The dog ran."}\n{"text": "Grass is green."}\n')


def make_before(words, folder, run):
    """What other commands make for this one, made small."""
    if "judge" in words:
        texts = [("Water boils for", 4), ("Buy it from", 1)]
        lines = [{"text": f"{text} {number}.", "rating": rating} for text, rating in texts for number in range(200)]
        (folder / "rated").mkdir()
        (folder / "rated" / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if "--classifier" in words:
            check(run(["data", "train-filter", "rated", "-o", "judge", "--top", "0.5"]))


def check(done):
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, checkpoint, tmp_path, monkeypatch, capsys):
    for part in ("notebooks", "weights"):  # of the clone
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "notes.txt").write_text("The dog ran.")
    (tmp_path / "stories.txt").write_text("Once upon a time a dog ran to the river. It saw a cat there. " * 40)
    (tmp_path / "topics.txt").write_text("a dog\nthe moon\n")
    (tmp_path / "my_tools.py").write_text('def now() -> str:\n    """The time of day."""\n    return "12:00"\n')
    (tmp_path / "my.jsonl").write_text('{"prompt": "Who ran?", "completion": "The dog."}\n' * 20)
    write_questions(tmp_path)
    write_texts(tmp_path)
    save_steering({2: mx.ones(256)}, tmp_path / "feeling.safetensors")
    given, _, command = command.rpartition("phi3-mlx ")
    words, given = shlex.split(command), f"{shlex.split(given)[1]}\n" if given else ""
    home = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "hub")}
    program = [sys.executable, "-c", "from phi3_mlx.cli import main; main()"]

    def run(words):
        return subprocess.run([*program, *words], capture_output=True, text=True, cwd=tmp_path, env=home, input=given)

    make_before(words, tmp_path, run)
    if "--cache" in words:  # another line makes it
        (build,) = [line for line in COMMANDS if line.startswith("phi3-mlx cache build")]
        assert run(shlex.split(build)[1:]).returncode == 0
    if words[:3] == ["eval", "-m", "./mini-4bit"]:  # what another command has made
        words[2] = str(checkpoint)
    if words[0] in ("convert", "compare") and words[1].startswith("phi-"):  # for those of the hub
        words[1] = str(checkpoint)
        words[2] = "tiny" if words[0] == "compare" else words[2]
    if words[0] == "publish":  # what another command has written
        shutil.copytree(checkpoint, tmp_path / words[1])
    words += made_short(words)
    if words[0] == "serve":  # until it is told to stop
        check_served([*program, "serve", "-m", "tiny", "--port", "0"], home)
    if "-m" in words and words[0] != "plan" and words[words.index("-m") + 1] != "tiny":  # a real model
        check_known(words, tmp_path, monkeypatch, capsys)
        # The same command with the bundled model instead.
        words[words.index("-m") + 1] = "tiny"
        if words[0] == "serve":
            return
        for option in {"--draft-model", "--against"}.intersection(words):
            words[words.index(option) + 1] = "tiny"
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr or words[0] == "chat"


def made_short(words):
    """Options behind a command that would else take long here."""
    if words[:2] == ["data", "synthesize"]:  # as many records as that would take hours
        return ["--dry-run"]
    fits = words[0] == "convert" and {"gptq", "--target-bpw"}.intersection(words)
    return ["--calibration", "stories.txt"] if fits and "--calibration" not in words else []


def check_known(words, folder, monkeypatch, capsys):
    """Without the network the model's name is known, and what is missing."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def check_served(command, home):
    """A server says where it is, and ends when it is told to."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=home) as process:
        assert process.stderr.readline().startswith("tiny at http://127.0.0.1:")
        process.terminate()
        assert process.wait(120) == 0


@pytest.mark.long
def test_the_walk_through_fine_tuning(tmp_path):
    """Line by line as it stands, in one folder, with less data than `bench.feelings` makes."""
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    for line in WALK:
        words = shlex.split(line)
        known = {"python": [sys.executable], "phi3-mlx": [sys.executable, "-m", "phi3_mlx"]}
        if words[0] == "mlx.launch" and shutil.which(words[0], path=environment["PATH"]) is None:
            continue  # an older mlx has none
        words = [*known.get(words[0], words[:1]), *words[1:]]
        if "mlx.launch" in line and shutil.which("phi3-mlx", path=environment["PATH"]) is None:  # not installed here
            words[words.index("phi3-mlx") :] = [*known["phi3-mlx"], *words[words.index("phi3-mlx") + 1 :]]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[line] = done.stdout + done.stderr
        if "bench.feelings" in line and "-m tiny" not in line:
            for split, size in {"train": 48, "valid": 4, "test": 4}.items():
                file = tmp_path / words[3] / f"{split}.jsonl"
                file.write_text("".join(file.read_text().splitlines(keepends=True)[:size]))
    dry = next(text for line, text in said.items() if line.endswith("--dry-run"))
    for label in re.search(r"A part of its output:\n\n```\n(.*?)```", FINE_TUNING, re.S)[1].splitlines():
        if label[0] != " ":
            assert label.split()[0] in dry
    assert all("right" in text for line, text in said.items() if " -m tiny" in line and "bench.feelings" in line)
    assert (tmp_path / "peft-adapter").is_dir()
    assert (tmp_path / "adapter2").is_dir()


def test_no_command_is_followed_by_a_comment():
    """zsh, a Mac's own shell, takes it for arguments where somebody types it or pastes it."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    blocks = [
        (page.name, line)
        for page in pages
        for block in re.findall(r"```(?:shell|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        for line in block.splitlines()
    ]
    assert len(blocks) > 40
    assert [found for found in blocks if re.search(r"(^|\s)#", found[1])] == []


@pytest.mark.parametrize("code", blocks_of("python"))
def test_python_examples_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("page", "block"), [(page, block) for page, text in TEXTS.items() for block in re.findall(r"<!-- (\w+) -->", text)]
)
def test_figures_and_story_come_from_their_sources(page, block):
    assert filled(TEXTS[page], {block: BLOCKS[block]()}) == TEXTS[page], "run python -m bench readme"


def test_no_marker_is_left_alone():
    for text in TEXTS.values():
        assert shown_in(text) == [name for name in BLOCKS if f"<!-- /{name} -->" in text]
    assert {"demo", "right", "fast"} <= set(shown_in(README))
    assert {name for text in TEXTS.values() for name in shown_in(text)} == set(BLOCKS)
    assert filled("a <!-- x -->\nold\n<!-- /x --> b", {"x": "new"}) == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(click.ClickException, match="once each"):
        filled("<!-- x -->\n", {"x": "new"})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_picture_of_a_terminal_is_what_the_commands_print():
    assert "](docs/terminal.svg)" in README
    assert draw() == PICTURE.read_text(encoding="utf-8"), "run python -m bench.terminal"
