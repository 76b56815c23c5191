"""Modelfiles for ollama: the template, rendered by Go's own text/template, against the model's Jinja one; the rest."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import oracle
import pytest
from test_chat import APRIL, JUNE, MEDIUM, NO_STRIP, VISION
from test_tool_use import MARKS, PHI4_MINI_TEMPLATE
from tokenizer_samples import PHI4_MINI_TOKENS, PHI4_TOKENS, TINY, byte_level, copy_of

from phi3_mlx import export_gguf
from phi3_mlx.conversion.modelfile import context_of, has_template, modelfile_text, write_modelfile
from phi3_mlx.conversion.turns import FAMILY_TURNS, turns_of
from phi3_mlx.errors import OptionError
from phi3_mlx.models import parse_config
from phi3_mlx.text.chat import chat_text
from phi3_mlx.text.tokenizer import read_tokenizer
from phi3_mlx.text.tool_use import use_tools

HERE = Path(__file__).parent
NEEDS_GO = pytest.mark.skipif(shutil.which("go") is None, reason="no Go here, whose text/template is ollama's")
PHI_3_5 = JUNE.replace("message['role'] == 'system' %", "message['role'] == 'system' and message['content'] %")
FAMILY = {
    "phi-3": "phi-3",
    "bundled": "phi-3",
    "phi-3.5": "phi-3.5",
    "april": "phi-3, April 2024",
    "medium": "phi-3, April 2024",
    "phi-4": "phi-4",
    "phi-4-mini": "phi-4-mini",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "phi-3": copy_of(TINY, root / "june", chat_template=JUNE),
        "bundled": TINY,
        "phi-3.5": copy_of(TINY, root / "3.5", chat_template=PHI_3_5),
        "april": copy_of(TINY, root / "april", flags=NO_STRIP, chat_template=APRIL, add_bos_token=True),
        "medium": copy_of(TINY, root / "medium", chat_template=MEDIUM),
        "phi-4": byte_level(root / "phi-4", PHI4_TOKENS, strip=True, eos_token="<|im_end|>"),
        "phi-4-mini": byte_level(
            root / "phi-4-mini", [*PHI4_MINI_TOKENS, *MARKS], strip=False, chat_template=PHI4_MINI_TEMPLATE
        ),
    }
    return {name: read_tokenizer(folder) for name, folder in folders.items()}


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = [
    talk("Hello"),
    talk(""),
    talk(" "),
    talk("Hello", system="Be kind."),
    talk("Hello", system=""),
    talk("Hello", system="\n\n  Be kind.  \n"),
    talk("Hello", "Hi.", "How are you?"),
    talk("Hello", "Hi.", "How are you?", system="Be kind."),
    talk("Hello", "", "Still there?"),
    talk("  two\nlines\n\n", "\tone tab", "\r\nwindows\r\n"),
    talk("Grüße, 世界 🙂 👩‍👩‍👧‍👦", "שלום", "e\u0301 \u200b \ufeff"),
    talk("{{ .System }} {{ end }} {% if x %} {{- .Role }}", "{{`raw`}}", '"""quotes""" and \\n'),
    talk("<b>&amp; 'x' \"y\"</b>"),
    talk("x" * 5000),
    talk(*(f"turn {n}" for n in range(21))),
    [*talk("Hello", "Hi."), *talk("Go on.", system="Be brief.")],
    [*talk("a", "b", system="One."), *talk("c", "d", system="Two."), *talk("e")],
    [*talk("a", system="One."), *talk("b", system="Two.")],
    talk("Hello", "Once upon"),  # to be continued
    talk("Hello", "Hi.", "More", " there", system="Be kind."),
    talk("Hello", ""),
]


def rendered_by_go(template, conversations):
    done = subprocess.run(
        ["go", "run", str(HERE / "go_template.go")],
        input=json.dumps({"template": template, "conversations": conversations}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def by_jinja(tokenizer, messages):
    text = chat_text(tokenizer, messages, continued=messages[-1]["role"] == "assistant")
    return text.removeprefix("<s>")  # llama.cpp's


def template_in(text):
    return re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]


def config_of(name="phi-4"):
    return parse_config(oracle.CONFIGS[name])


@NEEDS_GO
@pytest.mark.parametrize("name", FAMILY)
def test_go_renders_what_the_models_own_template_does(name, tokenizers):
    tokenizer = tokenizers[name]
    template = template_in(modelfile_text(Path("m.gguf"), tokenizer, config_of()))
    found = rendered_by_go(template, [{"messages": messages} for messages in CONVERSATIONS])
    assert len(CONVERSATIONS) > 20
    for messages, text in zip(CONVERSATIONS, found, strict=True):
        assert text == by_jinja(tokenizer, messages), messages


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look <there> & tell",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}
NOW = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
LOOKED = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "a duck"}]
WITH_TOOLS = [
    (talk("Look!"), [LOOK]),
    (talk("Look!", system="Be kind."), [LOOK, NOW]),
    ([*talk("Look!"), *LOOKED], [LOOK]),
    (
        [*talk("Look!", system="Be kind."), *LOOKED, *[{"role": "assistant", "content": "A duck."}, *talk("And?")]],
        [LOOK],
    ),
]


@NEEDS_GO
def test_go_renders_tools_calls_and_results_as_phi_4_mini_was_trained(tokenizers):
    tokenizer = tokenizers["phi-4-mini"]
    template = template_in(modelfile_text(Path("m.gguf"), tokenizer, config_of()))
    found = rendered_by_go(template, [{"messages": messages, "tools": tools} for messages, tools in WITH_TOOLS])
    for (messages, tools), text in zip(WITH_TOOLS, found, strict=True):
        prompt = tokenizer.decode(use_tools(tokenizer, tools).render(tokenizer, messages), skip_special=False)
        assert spaced(text) == spaced(prompt)


def spaced(text):
    """The text with its JSON, between the marks of tools and calls, as values, since Go writes no blanks in it."""
    parts = re.split(r"(<\|/?tool(?:_call)?\|>)", text)
    return [json.loads(part) if part.startswith("[{") else part for part in parts]


@pytest.mark.parametrize(("name", "form"), FAMILY.items())
def test_the_form_of_each_template_of_the_family_is_found(name, form, tokenizers):
    found = turns_of(tokenizers[name])
    assert found == (form, FAMILY_TURNS[form])
    for messages in CONVERSATIONS:
        if messages[-1]["role"] != "assistant":
            assert found[1].render(messages) == by_jinja(tokenizers[name], messages)


def test_another_template_is_none_of_the_familys(tmp_path, tokenizers):
    strange = read_tokenizer(copy_of(TINY, tmp_path / "strange", chat_template=JUNE.replace("<|end|>", "<|stop|>")))
    text = modelfile_text(Path("m.gguf"), strange, config_of())
    assert not has_template(strange)
    assert "TEMPLATE" not in text
    assert "guesses" in text
    vision = read_tokenizer(copy_of(TINY, tmp_path / "vision", chat_template=VISION))
    assert has_template(vision)  # differs after an assistant's turn alone, which ollama continues


def test_bos_is_written_where_llama_cpp_would_not(tmp_path, tokenizers):
    without = read_tokenizer(copy_of(TINY, tmp_path / "a", flags=NO_STRIP, chat_template=APRIL, add_bos_token=False))
    assert template_in(modelfile_text(Path("m.gguf"), without, config_of())).startswith("<s>")
    assert "<s>" not in modelfile_text(Path("m.gguf"), tokenizers["april"], config_of())


def test_the_rest_of_a_modelfile(tokenizers, tmp_path):
    path = write_modelfile(tmp_path / "my model.gguf", tokenizers["bundled"], config_of("3.5-mini"))
    lines = path.read_text().splitlines()
    assert path.name == "my model.Modelfile"
    assert lines[0] == "# ollama create my-model -f 'my model.Modelfile'"
    assert lines[1] == 'FROM "./my model.gguf"'
    assert {line for line in lines if line.startswith("PARAMETER stop")} == {
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|assistant|>"',
        'PARAMETER stop "<|end|>"',
    }
    assert lines[-1] == f"PARAMETER num_ctx {oracle.ORIGINAL}"


def test_an_adapter_stands_on_its_base(tokenizers):
    text = modelfile_text(Path("out/adapter.gguf"), tokenizers["bundled"], config_of(), base=Path("base.gguf"))
    assert 'FROM "./base.gguf"\nADAPTER "./adapter.gguf"\n' in text


@pytest.mark.parametrize(
    ("name", "longrope", "context"),
    [
        ("3.5-mini", "short", oracle.ORIGINAL),
        ("3.5-mini", "long", 4 * oracle.ORIGINAL),
        ("phi-4", "short", 4096),
        ("mini-4k", "short", 4096),
    ],
)
def test_the_context_keeps_within_a_regime_of_longrope(name, longrope, context):
    found, why = context_of(config_of(name), longrope)
    assert found == context
    assert bool(why) == (name != "phi-4")
    if name == "mini-4k":
        assert f"window of {oracle.WINDOW} tokens" in why[0]


def test_what_makes_no_modelfile_is_refused(tokenizers):
    with pytest.raises(OptionError, match="neither"):
        context_of(config_of(), "auto")
    with pytest.raises(OptionError, match="none"):
        context_of(config_of("phi-4"), "long")
    with pytest.raises(OptionError, match="without quotes"):
        modelfile_text(Path('a"b.gguf'), tokenizers["bundled"], config_of())


def test_a_modelfile_lies_beside_an_exported_model(tmp_path, capsys):
    pytest.importorskip("gguf")
    done = export_gguf("tiny", tmp_path / "tiny.gguf", modelfile=True)
    assert done.modelfile == tmp_path / "tiny.Modelfile"
    text = done.modelfile.read_text()
    assert 'FROM "./tiny.gguf"' in text
    assert text.endswith("PARAMETER num_ctx 512\n")
    long = export_gguf("tiny", tmp_path / "tiny.gguf", modelfile=True, longrope="long", force=True)
    assert long.modelfile.read_text().endswith("PARAMETER num_ctx 2048\n")
    assert export_gguf("tiny", tmp_path / "other.gguf").modelfile is None
