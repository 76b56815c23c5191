"""Constraints that are long, or lead far: refused, or followed, but never the end of the process."""

import json
import subprocess
import sys

import pytest
from tokenizer_samples import TINY

from phi3_mlx.errors import OptionError
from phi3_mlx.text.grammar import Form, matchers
from phi3_mlx.text.tokenizer import read_tokenizer

pytest.importorskip("llguidance")

DEEP = 4000
CHAINS = {
    "grammar": "\n".join(["start: r0", *(f'r{n}: "x" r{n + 1}?' for n in range(DEEP)), f'r{DEEP}: "x"']),
    "schema": json.dumps(
        {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(n): {"type": "array", "items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(DEEP)},
                str(DEEP): {"type": "null"},
            },
        }
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_a_long_chain_of_rules_or_references_does_not_end_the_process(kind):
    """The library calls itself once a link; in a stack of 8 MB it gets through about a thousand."""
    code = "import sys; from phi3_mlx.text.grammar import Form, matchers; from phi3_mlx.text.tokenizer import *\n"
    code += "ours = matchers(Form(sys.argv[1], sys.stdin.read()), read_tokenizer(sys.argv[2]), 2)[1]\n"
    code += "print(ours.allowed([]).sum() > 0)"
    command = [sys.executable, "-c", code, kind, str(TINY)]
    done = subprocess.run(command, input=CHAINS[kind], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.parametrize("kind", ["regex", "grammar", "schema", "choices"])
def test_a_constraint_of_too_many_characters_is_refused_with_both_numbers(kind):
    text = "x" * 1_000_001
    written = {"grammar": f'start: "{text}"', "schema": json.dumps({"const": text}), "choices": json.dumps([text])}
    with pytest.raises(
        OptionError, match=rf"^{kind} has 1,000,0\d\d characters, more than the 1,?0?00,000 that can be"
    ):
        matchers(Form(kind, written.get(kind, text)), read_tokenizer(TINY), 1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("grammar", "start: start"),
        ("schema", '{"$ref": "#"}'),
        ("schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}'),
    ],
)
def test_a_constraint_that_no_text_fits_says_so(kind, text):
    tokenizer = read_tokenizer(TINY)
    with pytest.raises(OptionError, match=r"^the constraint cannot be followed further: no text fits it$"):
        matchers(Form(kind, text), tokenizer, 1)[0].allowed([])
