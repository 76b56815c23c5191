"""Calibration text that a model writes itself: from its template, seeded, alone in memory, and kept."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import oracle
import pytest
from peaks import fair_peak
from quality_models import Letters, RandomSource, small_directory, stories, trained

from phi3_mlx import convert
from phi3_mlx.cli.reading import read_calibration
from phi3_mlx.conversion import fitted_text, own_text, pipeline, planning, report
from phi3_mlx.conversion.fitted_text import FittedText
from phi3_mlx.conversion.opening import open_source
from phi3_mlx.conversion.options import ConvertOptions
from phi3_mlx.conversion.own_text import Beginning
from phi3_mlx.conversion.texts import bundled, shared_runs
from phi3_mlx.engine import machine
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError, OptionError, PromptError
from phi3_mlx.text.chat import render_chat
from phi3_mlx.text.tokenizer import read_tokenizer


@dataclasses.dataclass
class Plain(Letters):
    """A tokenizer without a chat template."""

    eos_token_id: int | None = 2
    stop_ids: frozenset = frozenset({2})
    chat_template: None = None
    named_templates: tuple = ()
    added_tokens: tuple = ()


@pytest.fixture
def short(monkeypatch):
    """Texts of 40 tokens at most, 300 in all."""
    monkeypatch.setattr(own_text, "OWN_TOKENS", 300)
    monkeypatch.setattr(own_text, "OWN_LENGTH", 40)
    monkeypatch.setattr(own_text, "_QUESTION", 24)
    monkeypatch.setattr(own_text, "_TOGETHER", 3)


def test_a_template_begins_the_users_turn():
    tokenizer = trained()[1]
    begun = Beginning.of(tokenizer)
    assert begun.chat
    whole = render_chat(tokenizer, [{"role": "user", "content": "Tell me a story."}])
    assert whole[: len(begun.ids)] == begun.ids
    assert tokenizer.decode(whole[len(begun.ids) :]).startswith("Tell me")


def test_a_chat_begins_with_bos_where_the_tokenizer_puts_it(monkeypatch):
    tokenizer = trained()[1]
    begun = Beginning.of(tokenizer).ids
    monkeypatch.setattr(tokenizer, "add_bos_token", True)
    monkeypatch.setattr(tokenizer, "chat_begins_with_bos", True)
    assert Beginning.of(tokenizer).ids == [tokenizer.bos_token_id, *begun]


@pytest.mark.parametrize(("bos", "eos", "first"), [(1, 2, 1), (None, 2, 2), (None, None, None)])
def test_without_a_template_it_is_the_first_token(bos, eos, first):
    tokenizer = Plain(bos_token_id=bos, eos_token_id=eos)
    if first is None:
        with pytest.raises(PromptError, match="calibration=FILE"):
            Beginning.of(tokenizer)
    else:
        assert Beginning.of(tokenizer) == Beginning([first], chat=False)


def test_a_text_is_what_the_model_says_alone_with_that_seed(short):
    source = RandomSource(num_hidden_layers=1, scale=0.3)
    ids = own_text.write_own_text(source, Plain(), 5, None)
    assert len(ids) == 300
    model = oracle.make_ours(source.raw_config)
    model.load_weights([(name, source.read(name)) for name in source.tensors])
    model.eval()
    alone, n = [], 0
    while len(alone) < 300:
        job = Job((1,), 39, Sampling(temperature=1.0, seed=5 << 32 | n), frozenset({2}))
        alone += [1, *(token.id for token in Generation.of_jobs(Scheduler(model), [job]))]
        n += 1
    assert ids == alone[:300]
    assert own_text.write_own_text(source, Plain(), 5, None) == ids
    assert own_text.write_own_text(source, Plain(), 6, None) != ids


def test_it_is_drawn_at_temperature_1(short, monkeypatch):
    """A model that says one of two tokens, one three times as likely, whatever stood before."""
    monkeypatch.setattr(own_text, "OWN_TOKENS", 2000)

    class Coin(RandomSource):
        def read(self, name):
            weight = super().read(name)
            if name == "model.embed_tokens.weight":
                return mx.ones(weight.shape)
            if name == "lm_head.weight":
                rows = mx.arange(len(weight))[:, None]
                return mx.where(rows == 7, np.log(3) / weight.shape[1], mx.where(rows == 8, 0.0, -1.0)) + 0 * weight
            return weight if weight.ndim == 1 else 0 * weight

    source = Coin(num_hidden_layers=1)
    drawn = [i for i in own_text.write_own_text(source, Plain(), 0, None) if i != 1]
    assert {*drawn} == {7, 8}
    assert drawn.count(7) / len(drawn) == pytest.approx(0.75, abs=0.04)


def test_a_model_that_chats_writes_both_sides(short):
    source, tokenizer = trained()
    ids = own_text.write_own_text(source, tokenizer, 0, None)
    begun = Beginning.of(tokenizer).ids
    starts = [i for i in range(len(ids)) if ids[i : i + len(begun)] == begun]
    first = ids[: starts[1]]
    asked = next(n for n in range(len(first)) if first[n] in tokenizer.stop_ids)
    question = tokenizer.decode(first[len(begun) : asked])
    prompt = render_chat(tokenizer, [{"role": "user", "content": question}])
    assert question.strip()
    assert first[: len(prompt)] == prompt
    assert len(prompt) < len(first) <= 40


def test_a_user_who_says_nothing_is_not_answered():
    tokenizer = trained()[1]
    writer = object.__new__(own_text._Writer)
    writer._tokenizer, writer._begin = tokenizer, Beginning.of(tokenizer)
    silence = [*writer._begin.ids, *tokenizer.encode(" "), min(tokenizer.stop_ids)]
    assert writer._asked(silence) == silence


def test_the_model_is_gone_when_the_text_is_there(short, monkeypatch):
    source, models = RandomSource(num_hidden_layers=2), []
    original = own_text._model_of

    def spy(given):
        model = original(given)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(own_text, "_model_of", spy)
    mx.clear_cache()
    before = mx.get_active_memory()
    own_text.write_own_text(source, Plain(), 0, None)
    assert [model() for model in models] == [None]
    gc.collect()
    assert mx.get_active_memory() - before < 0.1 * source.float_bytes


def test_it_is_refused_before_a_weight_is_read_where_the_model_does_not_fit(tmp_path, monkeypatch):
    small = small_directory(tmp_path / "small")
    monkeypatch.setattr(planning, "check_conversion", lambda *_, **__: None)
    monkeypatch.setattr(machine, "room", lambda: 0)
    needed = sum(planning._writing(open_source(small)).values())  # with the smallest chunks
    monkeypatch.setattr(machine, "room", lambda: needed - 1)
    with pytest.raises(MemoryLimitError, match="give one: calibration=FILE"):
        convert(small, tmp_path / "made", method="gptq", calibration="self")
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(machine, "room", lambda: needed)
    planning.check_own_text(open_source(small))


def test_its_plan_holds(short):
    source = RandomSource("BF16", hidden_size=256, intermediate_size=512, vocab_size=4096)
    planned = planning._writing(source)
    most = 1.1 * sum(planned.values())
    peak = fair_peak(lambda: own_text.write_own_text(source, Plain(), 0, None), lambda peak: peak < most)
    assert planned["weights"] < peak < most


def test_it_is_kept_for_a_run_that_goes_on_and_told_from_that_of_another(short, tmp_path, monkeypatch):
    source = RandomSource(num_hidden_layers=1)
    ids = own_text.write_own_text(source, Plain(), 0, tmp_path)
    monkeypatch.setattr(own_text, "_model_of", None)
    assert own_text.write_own_text(source, Plain(), 0, tmp_path) == ids
    with pytest.raises(OptionError, match="other arguments"):
        own_text.write_own_text(source, Plain(), 1, tmp_path)
    other = RandomSource(num_hidden_layers=1, scale=0.06)
    with pytest.raises(OptionError, match="other arguments"):
        own_text.write_own_text(other, Plain(), 0, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(own_text, "OWN_TOKENS", 100)
    assert own_text.write_own_text(other, Plain(), 0, tmp_path, force=True) != ids
    assert len(own_text.write_own_text(other, Plain(), 0, tmp_path)) == 100


def test_it_tells_how_far_it_is(short):
    seen = []
    own_text.write_own_text(RandomSource(num_hidden_layers=1), Plain(), 0, None, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert all(done % own_text._TICK == 0 or done == total == 300 for done, total in seen)


@pytest.mark.long
def test_a_conversion_says_where_its_text_comes_from(short, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "OWN_TOKENS", 600)
    small = small_directory(tmp_path / "small")
    sample = bundled("sample")[:400]
    stages = []
    made = convert(
        small,
        tmp_path / "made",
        method="gptq",
        calibration="self",
        seed=3,
        text=sample,
        progress=lambda now: stages.append(now.stage),
    )
    about = json.loads((made.path / "calibration.json").read_text())
    assert {name: about[name] for name in ("tokens", "seed", "temperature", "from", "in_evaluation_text")} == {
        "tokens": 600,
        "seed": 3,
        "temperature": 1.0,
        "from": "its chat template",
        "in_evaluation_text": 0.0,
    }
    report = (made.path / "REPORT.md").read_text()
    assert "600 tokens that the source wrote itself, each text from its chat template on" in report
    assert "with seed 3. 0.0% of the runs of eight words in this report's text occur in it." in report
    assert [*dict.fromkeys(stages)] == ["writing a text", "writing", "comparing"]
    again = convert(small, tmp_path / "again", method="gptq", calibration="self", seed=3, report=False)
    assert json.loads((again.path / "calibration.json").read_text())["in_evaluation_text"] is None
    files = [path / "model.safetensors" for path in (made.path, again.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_grid_that_gptq_does_not_have_is_refused_before_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "_model_of", None)
    with pytest.raises(OptionError, match="affine grids, not mxfp4"):
        convert(small_directory(tmp_path / "small"), tmp_path / "made", mode="mxfp4", method="gptq", calibration="self")


def test_what_a_text_shares_with_another_is_counted_once(tmp_path, monkeypatch):
    """As often as it is asked; what was asked before the text was written counts for nothing."""
    calls = []
    monkeypatch.setattr(fitted_text, "shared_runs", lambda *texts: calls.append(texts) or shared_runs(*texts))
    fitted, words = FittedText(open_source(small_directory(tmp_path / "small")), "self", None), "a b c d e f g h"
    assert fitted.shared(words) == 0
    monkeypatch.setattr(own_text, "write_own_text", lambda source, tokenizer, *given, **more: tokenizer.encode(words))
    fitted.make(None, force=False, progress=None)
    assert fitted.shared(words) == fitted.about(words)["in_evaluation_text"] == 1
    assert fitted.holds(words)
    assert fitted.shared("another") == 0
    assert [asked for asked, _ in calls] == [words, words, "another"]


def test_what_is_measured_on_the_text_that_was_read_says_so(tmp_path):
    """Also where it is only a part of it."""
    small, text = small_directory(tmp_path / "small"), stories("calibration")
    for part, fitted in ((text[200:900], True), (stories("sample")[:700], False)):
        made = convert(small, tmp_path / f"{fitted}", method="gptq", bits=4, calibration=text, text=part)
        assert any("fitted to this text" in note for note in made.report.notes) == fitted
        assert any("fitted to this text" in note for note in made.notes) == fitted  # where the figures are shown, too


def test_what_is_lost_on_the_text_that_was_read_stands_beside_what_is_lost_on_the_reports(tmp_path, monkeypatch):
    small, text, read = small_directory(tmp_path / "small"), stories("calibration"), {}

    def made(*_, text, **more):
        read.update(more, text=text)
        return SimpleNamespace(comparison=SimpleNamespace(kl=0.125))

    monkeypatch.setattr(report, "make_report", made)
    other = SimpleNamespace(window=64, comparison=SimpleNamespace(kl=0.25))
    section = pipeline._about_fits(small, open_source(small), [], other, read_tokenizer(small).encode(text))
    assert "0.12500 on the beginning of the text that weights were fitted to, 0.25000 on the report's" in section
    assert len(read["text"]) > 100
    assert text.startswith(read["text"][:-1])  # the last token may be a part of a character
    assert read["window"] == 64


def test_a_text_that_predicts_nothing_is_refused_before_the_work(tmp_path, monkeypatch):
    small = small_directory(tmp_path / "small")
    monkeypatch.setattr(pipeline, "_write", lambda *_: pytest.fail("the model is written"))
    for asked in (None, True):
        with pytest.raises(PromptError, match="the text has 1 tokens, and the first has nothing to predict it"):
            convert(small, tmp_path / "made", text="a", report=asked)


def test_shared_runs_are_those_of_eight_words():
    words = [f"w{n}" for n in range(20)]
    assert shared_runs(" ".join(words), "Before: " + " ".join(words).upper()) == 1
    assert shared_runs(" ".join(words), " ".join(words[:10])) == pytest.approx(3 / 13)
    assert shared_runs(" ".join(words[:8]), " ".join(words[1:])) == 0
    assert shared_runs("", "w1") == 0


def test_the_bundled_text_is_not_the_evaluations():
    source = trained()[0]
    assert not FittedText(source, None, None).holds(bundled("sample"))
    assert FittedText(source, None, None).holds(bundled("reading")[1000:3000])  # pages of these docs, among others
    assert FittedText(source, bundled("sample"), None).holds(bundled("sample"))
    assert FittedText(source, "short", None).holds("short")


def test_self_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("a text")
    assert read_calibration("self") == "self"
    assert read_calibration("./self") == "a text"
    assert ConvertOptions(method="gptq", calibration="self", seed=1).writes_text
    with pytest.raises(OptionError, match="seed has no effect"):
        ConvertOptions(method="gptq", calibration="a text", seed=1)
    with pytest.raises(OptionError, match="calibration has no effect"):
        ConvertOptions(calibration="self")
    with pytest.raises(OptionError, match="seed -1 is outside its range"):
        ConvertOptions(method="gptq", calibration="self", seed=-1)
