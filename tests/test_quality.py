"""Two models on a text: against KL from whole logit arrays, in all shapes of windows, and what cannot be compared."""

import json
import math
import re

import mlx.core as mx
import numpy as np
import oracle
import pytest
from quality_models import TRAINED, Letters, RandomSource, stories, write_model
from test_cli import one_line, run  # noqa: F401
from tuning_models import make_directory

from phi3_mlx.conversion.recipes import uniform
from phi3_mlx.conversion.rounding import rounded
from phi3_mlx.errors import OptionError, PromptError
from phi3_mlx.evaluation.quality import compare, log_softmax
from phi3_mlx.store.checkpoint import read_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not even wake up."


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model and its 4-bit rounding, both loaded."""
    source, folder = RandomSource(num_hidden_layers=2, scale=0.2), tmp_path_factory.mktemp("pair")
    recipe = uniform(4, 64)
    a = write_model(folder / "a", source, None, rounded(source))
    b = write_model(folder / "b", source, recipe, rounded(source))
    return read_model(a), read_model(b)


def naive(model_a, model_b, pieces):
    """(nats of A, nats of B, mean KL, top-1 agreement) from whole logit arrays, in float64."""
    sums, count = np.zeros(4), 0
    for piece in pieces:
        logs = []
        for model in (model_a, model_b):
            logits = np.array(model(mx.array([piece[:-1]]))[0].astype(mx.float32)).astype(np.float64)
            logs.append(np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)))
        for t, target in enumerate(piece[1:]):
            p, q = logs[0][t], logs[1][t]
            sums += [-p[target], -q[target], sum(np.exp(p) * (p - q)), p.argmax() == q.argmax()]
            count += 1
    return *sums[:2], *(sums[2:] / count)


@pytest.mark.parametrize("window", [7, 39, 79, 512])
@pytest.mark.parametrize("bos", [None, 1])
def test_figures_are_those_of_whole_logits(pair, window, bos):
    tokenizer = Letters(add_bos_token=bos is not None)
    ids = tokenizer.encode(TEXT)
    if bos is None:
        pieces = [ids[i : i + window + 1] for i in range(0, len(ids) - 1, window)]
    else:
        pieces = [[bos, *ids[i : i + window]] for i in range(0, len(ids), window)]
    nats_a, nats_b, kl, top1 = naive(*pair, pieces)
    found = compare(pair[0], tokenizer, pair[1], tokenizer, TEXT, window=window)
    predicted = len(ids) - (bos is None)
    assert found.a.tokens == found.b.tokens == sum(len(piece) - 1 for piece in pieces) == predicted
    assert found.a.characters == predicted  # one letter a token
    assert found.a.nats == pytest.approx(nats_a, rel=1e-5)
    assert found.b.nats == pytest.approx(nats_b, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1 == top1
    assert found.a.perplexity == pytest.approx(math.exp(nats_a / predicted), rel=1e-5)
    assert found.kl > 1e-4, "the two models are too alike to test anything"


def test_a_model_is_no_distance_from_itself(pair):
    found = compare(pair[0], Letters(), pair[0], Letters(), TEXT)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert found.a == found.b


def test_logits_come_in_pieces(pair, monkeypatch):
    whole = compare(pair[0], Letters(), pair[1], Letters(), TEXT)
    sizes = []

    def spy(logits):
        sizes.append(len(logits))
        return log_softmax(logits)

    monkeypatch.setattr("phi3_mlx.evaluation.quality.LOGITS_AT_ONCE", 5 * oracle.BASE["vocab_size"])
    monkeypatch.setattr("phi3_mlx.evaluation.quality.log_softmax", spy)
    parts = compare(pair[0], Letters(), pair[1], Letters(), TEXT)
    assert max(sizes) == 5
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)


def test_other_tokens_leave_perplexity_per_character(pair):
    found = compare(pair[0], Letters(), pair[1], Letters(shift=1), TEXT)
    assert found.kl is None
    assert found.top1 is None
    assert "different ids" in found.note
    alone = compare(pair[1], Letters(shift=1), pair[1], Letters(shift=1), TEXT)
    assert found.b == alone.b
    with_bos = compare(pair[0], Letters(), pair[1], Letters(add_bos_token=True), TEXT)
    assert with_bos.kl is None


def test_another_vocabulary_leaves_perplexities(pair, tmp_path):
    source = RandomSource(num_hidden_layers=1, vocab_size=192)
    other = read_model(write_model(tmp_path / "other", source, None, rounded(source)))
    found = compare(pair[0], Letters(), other, Letters(), TEXT)
    assert found.kl is None
    assert "160 and 192" in found.note


def test_what_cannot_be_read_is_refused(pair):
    with pytest.raises(PromptError, match="1 tokens"):
        compare(pair[0], Letters(), pair[1], Letters(), "T")
    with pytest.raises(PromptError, match="0 tokens"):
        compare(pair[0], Letters(), pair[1], Letters(), "")
    for window in (0, 4097):
        with pytest.raises(OptionError, match=f"window {window:,} .* 1 to 4,096"):
            compare(pair[0], Letters(), pair[1], Letters(), TEXT, window=window)


# ------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_report_of_any_two_models_of_a_shape(run, tmp_path):  # noqa: F811
    text = tmp_path / "story.txt"
    text.write_text(stories("sample")[:400])
    ask = ["compare", TRAINED, "tiny", "--text", text, "--window", 64, "-o", tmp_path / "report"]
    code, out, err = run(*ask)
    assert code == 0, err
    assert re.search(r"^bits per weight +8\.505 +5\.007$", out, re.M)
    assert re.search(r"^bytes +5,803,520 +3,416,576$", out, re.M)
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    found = float(re.search(r"KL.* ([\d.]+)$", out, re.M)[1])
    assert figures["kl"] == pytest.approx(found, rel=0.05)  # from the source's numbers as bfloat16
    assert {tensor["path"] for tensor in figures["tensors"]} > {"model.embed_tokens", "model.layers.5.mlp.down_proj"}
    assert (tmp_path / "report" / "REPORT.md").read_text().startswith(f"# tiny beside {TRAINED.name}\n")
    code, _, err = run(*ask)
    assert (code, "exists already" in err) == (1, True)
    other = make_directory(tmp_path / "other", hidden_size=128, intermediate_size=128)
    code, _, err = run("compare", "tiny", other, "--text", text, "--window", 64, "-o", tmp_path / "other report")
    assert code == 2
    assert "of one shape" in err


def test_models_that_do_not_fit_together_are_refused(run):  # noqa: F811
    ask = ["compare", "tiny", TRAINED, "--window", 64, "--memory"]
    held = mx.get_active_memory()  # by other tests
    code, out, err = run(*ask, f"{held + 2_000_000}B")
    assert (code, out) == (1, "")
    assert "weights 4.1 MB" in err
    needed = int(re.search(r"needs (\d+) MB", err)[1]) * 1_000_000
    either = f"{held + needed + 3_000_000}B"  # room for one alone, and not for both
    code, _, err = run(*ask, either)
    assert code == 1, err
    assert "weights 6.2 MB" in err
    assert run(*ask, either, "--force")[0] == 0


def test_the_command_says_what_the_function_finds(run, tmp_path):  # noqa: F811
    text = tmp_path / "story.txt"
    text.write_text(stories("sample")[:400])
    code, out, err = run("compare", TRAINED, "tiny", "--text", text, "--window", 64)
    assert code == 0
    assert err == ""
    for word in (f"A: {TRAINED}", "B: tiny", str(text), "perplexity per character", "KL(A || B)", "likeliest"):
        assert word in out
    code, out, _ = run("compare", TRAINED, "tiny", "--text", "-", "--window", 64, "--json", stdin=text.read_bytes())
    found = json.loads(out)
    from phi3_mlx import load

    (a, tokenizer), (b, _) = load(str(TRAINED)), load("tiny")
    expected = compare(a, tokenizer, b, tokenizer, text.read_text(), window=64)
    assert found["kl"] == pytest.approx(expected.kl)
    assert found["quality_a"]["perplexity"] == pytest.approx(expected.a.perplexity)
    assert found["text"] == "stdin"
    assert 0 < found["kl"] < 5
    assert 0.3 < found["top1"] < 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["tiny"], 2, "B"),
        (["tiny", "tiny", "--window", "0"], 2, "--window 0"),
        (["tiny", "tiny", "--window", "9999"], 2, "9,999"),
        (["tiny", "nowhere/at/all"], 1, "nowhere/at/all"),
        (["tiny", "tiny", "--text", "missing.txt"], 1, "missing.txt"),
    ],
)
def test_bad_arguments_get_one_line(run, args, code, words):  # noqa: F811
    got, out, err = run("compare", *args)
    assert got == code
    assert words in one_line(err)
    assert out == ""
