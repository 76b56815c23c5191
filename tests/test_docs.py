"""The documentation is true to the code: commands parse, quoted messages exist, public names are all there."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT

import phi3_mlx
from phi3_mlx.cli import cli
from phi3_mlx.engine.capacity import family_rows
from phi3_mlx.store.family import MEMBERS, june_text

sys.path.insert(0, str(ROOT / "docs"))
from _commands import help_pages, with_help
from _site import linked, on_page_content

DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
# Of pip, mlx.launch, Docker, systemd and lm-evaluation-harness.
OTHERS_OPTIONS = {"--force-reinstall", "--backend", "--add-host", "--functions", "--user", "--now", "--tasks"}
OTHERS_OPTIONS |= {"--control-vector", "--control-vector-layer-range"}


def lines(language):
    """(page, line) of every block in a language."""
    return [
        (page, line)
        for page, text in PAGES.items()
        for kind, block in BLOCKS.findall(text)
        if kind == language
        for line in block.splitlines()
        if line.strip()
    ]


def parse(words):
    """Let Click read a command line, down to the command that would run."""
    context = cli.make_context("phi3-mlx", list(words))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def commands_in(text):
    """The words after `phi3-mlx` wherever a line of shell has it."""
    words = shlex.split(text.split("  #")[0])
    return [words[i + 1 :] for i, word in enumerate(words) if word == "phi3-mlx"]


def test_every_command_in_a_block_is_a_valid_invocation():
    found = [(page, words) for page, line in lines("shell") for words in commands_in(line)]
    assert len(found) >= 5
    for page, words in found:
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{page}: phi3-mlx {' '.join(words)}: {error.format_message()}")


def test_every_command_in_a_sentence_exists_with_its_options():
    found = [(page, code) for page, text in PAGES.items() for code in re.findall(r"`(phi3-mlx [^`\n]+)`", text)]
    assert len(found) >= 10
    for page, code in found:
        for words in commands_in(code):
            try:
                parse(words)
            except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
                pass  # a sentence may leave out what the command needs
            except click.ClickException as error:
                if words[0] != "COMMAND":
                    pytest.fail(f"{page}: {code}: {error.format_message()}")


def test_a_wrong_command_would_be_found():
    for words in (["generate", "--colour"], ["tune", "--rank", "many"], ["adapter", "send"], ["nothing"]):
        with pytest.raises(click.ClickException):
            parse(words)


def test_every_option_named_anywhere_is_one():
    known = set(re.findall(r"--[a-z][a-z-]*", "\n".join(help_pages().values()))) | OTHERS_OPTIONS
    for page, text in PAGES.items():
        text = re.sub(r"python -m bench [^`\n]*", "", text)  # the benches have options of their own
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)):
            assert option in known, f"{page}: {option}"


def templates():
    """Every text in the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "phi3_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return [re.sub("…+", "…", text) for text in found]


def test_every_quoted_message_is_one_that_the_code_makes():
    known = templates()
    quoted = [(page, line) for page, line in lines("text") if page == "troubleshooting.md"]
    assert len(quoted) >= 15
    for page, line in quoted:
        assert any(line in template for template in known), f"{page}: {line}"


def test_links_lead_to_pages_and_headings_that_exist():
    def anchors(text):
        titles = re.findall(r"^#+ (.+)$", text, re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}

    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            if name.startswith("../"):  # a file of the repository
                assert (DOCS / name).resolve().exists(), f"{page}: {target}"
                continue
            assert not name or name in PAGES, f"{page}: {target}"
            assert not anchor or anchor in anchors(PAGES[name or page]), f"{page}: {target}"
    for target in re.findall(r"\]\(docs/([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        assert not anchor or anchor in anchors(PAGES[name]), f"README.md: {target}"


def test_files_named_in_the_pages_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:notebooks|weights|bench|docs)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_reference_lists_the_public_names_and_where_they_live():
    listed = re.findall(r"^::: ([\w.]+)$", PAGES["reference.md"], re.M)
    for name in phi3_mlx.__all__[1:]:
        if name == "Phi3Error":  # on the page of all errors
            assert "phi3_mlx.errors" in listed
            continue
        home = getattr(phi3_mlx, name).__module__
        assert f"{home}.{name}" in listed, name


def test_pages_import_public_names_alone():
    blocks = [
        block
        for text in [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]
        for kind, block in BLOCKS.findall(text)
        if kind == "python"
    ]
    assert len(blocks) >= 3
    for code in blocks:
        assert not_public(code) == [], code
    lines = ("from phi3_mlx.store import hub", "import phi3_mlx.engine", "from phi3_mlx import hidden_thing")
    assert all(not_public(line) for line in lines)


def test_notebooks_import_public_names_alone():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert len(cells) >= 5
        for code in ("".join(cell["source"]) for cell in cells):
            assert code.startswith("!") or not_public(code) == [], f"{path.name}: {code}"


def not_public(code):
    """What code imports of the package beside its public names."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wrong += [alias.name for alias in node.names if alias.name.startswith("phi3_mlx.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phi3_mlx":
            names = [alias.name for alias in node.names]
            wrong += names if node.module != "phi3_mlx" else [name for name in names if name not in phi3_mlx.__all__]
    return wrong


def test_public_names_are_typed_as_they_are_imported():
    tree = ast.parse((ROOT / "phi3_mlx" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert {line.names[0].asname: line.module for line in block.body} == phi3_mlx._PUBLIC


def test_the_command_page_is_what_help_prints():
    text = PAGES["commands.md"]
    assert text.split() == with_help(text).split(), "out of date; run python docs/_commands.py"
    for name in cli.list_commands(click.Context(cli)):
        assert f"\n## phi3-mlx {name}\n" in text
    assert "### phi3-mlx adapter export" in text
    done = subprocess.run(
        [sys.executable, "-m", "phi3_mlx", "plan", "-h"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip().replace("python -m phi3_mlx", "phi3-mlx") in text


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    assert citation["version"] == phi3_mlx.__version__
    newest = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert newest == (phi3_mlx.__version__, str(citation["date-released"]))


def test_the_site_breaks_the_lines_of_messages_and_answers_and_no_others():
    def block(kind, text):
        return f'<div class="language-{kind} highlight"><pre><span></span><code>{text}\n</code></pre></div>'

    columns = block("text", "a b\n&lt;" + "x" * 79)  # 80 of them
    message = block("text", "one line")
    sentence = block("text", "short\n" + "word " * 20)
    code = block("python", "x" * 100)
    broken = (sentence + message).replace("light", "light wrapped")
    assert on_page_content(columns + sentence + message + code) == columns + broken + code
    for page in ("commands.md", "how-it-works.md", "memory.md"):  # set in columns
        for kind, text in BLOCKS.findall(PAGES[page]):
            assert kind != "text" or max(map(len, text.splitlines())) <= 80, f"{page}: {text}"


def test_the_site_leads_links_to_its_own_pages():
    for link, place in {
        "../notebooks/longrope.ipynb": "notebooks/longrope.md",
        "../weights/tiny/README.md": "tiny.md",
        "../bench/results/longcontext.png": "files/longcontext.png",
        "memory.md": "memory.md",
        "https://arxiv.org/abs/2404.14219": "https://arxiv.org/abs/2404.14219",
    }.items():
        assert linked(f"[x]({link})", "docs/index.md", "index.md") == f"[x]({place})"
    link = "[x](../docs/how-it-works.md)"
    assert linked(link, "notebooks/longrope.ipynb", "notebooks/longrope.md") == link.replace("docs/", "")


# Not plain English, or not the field's word: NaN, recompute, clip the gradient norm, estimate, this many, again.
FORBIDDEN = re.compile(
    r"\b(numbers that are none|(?:read|reads|reading) again|longest gradient|reckon\w*|amid|nonetheless|so many"
    r"|as far as|otherwise than|for as many as|for ever)\b",
    re.I,
)


def forbidden(text):
    """The forbidden phrases of a text, over the ends of lines, quotes and comments too."""
    return FORBIDDEN.findall(re.sub(r"[\s#\"']+", " ", text))


def test_no_page_help_message_docstring_or_comment_has_a_forbidden_phrase():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## [")[1]
    texts = {f"docs/{page}": text for page, text in PAGES.items()} | {"CHANGELOG.md": changes}
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "phi3_mlx").rglob("*.py")]:
        texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    texts |= {f"{name} -h": text for name, text in help_pages().items()}
    assert changes.startswith("Unreleased]")
    assert len(texts) > 100
    assert {name: phrases for name, text in texts.items() if (phrases := forbidden(text))} == {}


def test_a_forbidden_phrase_would_be_found():
    assert forbidden("# as\n    # far as it goes") == ["as far as"]
    assert forbidden('f"it was read "\n    "again; Reckoned"') == ["read again", "Reckoned"]
    assert forbidden("a pyramid of many numbers, recomputed") == []


def test_figures_of_two_releases_of_one_name_never_stand_together_unsaid():
    replaced = {name: member for name, member in MEMBERS.items() if member.mmlu_june is not None}
    assert replaced
    note = june_text()
    for name, member in replaced.items():
        assert member.mmlu != member.mmlu_june
        assert f"{member.mmlu_june} ({name})" in note
    assert note in " ".join(CliRunner().invoke(cli, ["models"]).output.split())
    assert note in PAGES["memory.md"]
    for row in family_rows():
        if row.name in replaced:  # the card of April beside the report of April
            assert f"{row.mmlu_june}" not in row.cells()
    newer = re.compile("|".join(rf"(?<![\d.]){member.mmlu_june}(?![\d.])" for member in replaced.values()))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if newer.search(line) and "MMLU" in line:
                assert "June" in line, f"{path.name}: {line}"


def mixed_pairs(text):
    """The lines that have an MMLU beside an MT-bench which is not of the same release of the same model."""
    releases = {(member.mmlu, member.mt_bench) for member in MEMBERS.values()}
    known = {member.mmlu_june for member in MEMBERS.values()} | {mmlu for mmlu, _ in releases}
    mixed = []
    for line in text.splitlines():
        numbers = {float(number) for number in re.findall(r"(?<![\d.,])\d+\.\d+(?![\d.,]*\d)", line)}
        pairs = {(mmlu, bench) for mmlu in numbers & known for bench in numbers & {bench for _, bench in releases}}
        if pairs - releases:
            mixed.append(line)
    return mixed


def test_scores_that_stand_side_by_side_are_of_one_release():
    """In `phi3-mlx models`, its JSON, the README and the pages: MMLU and MT-bench as `MEMBERS` pairs them."""
    rows = {row.name: row for row in family_rows()}
    assert rows.keys() == MEMBERS.keys()
    for name, member in MEMBERS.items():
        assert (rows[name].mmlu, rows[name].mt_bench) == (member.mmlu, member.mt_bench)
        shown = ["" if score is None else score for score in (member.mmlu, member.mt_bench)]
        assert [float(cell) if cell else "" for cell in rows[name].cells()[5:7]] == shown
        assert member.mt_bench is None or member.mmlu is not None
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    }
    texts["models"] = CliRunner().invoke(cli, ["models"]).output
    assert "| 68.8 | 8.38 |" in texts["memory.md"]
    assert {name: lines for name, text in texts.items() if (lines := mixed_pairs(text))} == {}


def test_scores_of_two_releases_would_be_found():
    april, june, other = (
        "| phi-3-mini-4k | 68.8 | 8.38 |",
        "| phi-3-mini-4k | 70.9 | 8.38 |",
        "medium: 78.0, MT-bench 8.7.",
    )
    assert mixed_pairs("\n".join([april, june, other])) == [june, other]
