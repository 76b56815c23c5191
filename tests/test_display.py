"""What a notebook shows of chats, results and progress."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from phi3_mlx import ProgressBar, display, load
from phi3_mlx.conversion.pipeline import Conversion
from phi3_mlx.conversion.sinks import Progress
from phi3_mlx.evaluation.quality import Comparison, Quality
from phi3_mlx.generation.conversation import Conversation
from phi3_mlx.tuning.execution import Result


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Handle:
    """What IPython's display gives back, and all that was shown."""

    def __init__(self):
        self.shown = []

    def update(self, data, raw):
        self.shown.append(data)


@pytest.fixture
def notebook(monkeypatch):
    import IPython.display

    handle = Handle()

    def show(data, raw, display_id):
        handle.update(data, raw)
        return handle

    monkeypatch.setattr(IPython.display, "display", show)
    monkeypatch.setattr(display, "_in_notebook", lambda: True)
    return handle


def test_a_chat_is_a_block_a_message_and_its_text_stays_text():
    chat = Conversation(*load("tiny"), system="You tell stories.")
    chat.messages += [{"role": "user", "content": "<b>1 & 2</b>\nwhy?"}]
    shown = chat._repr_html_()
    assert re.findall(r"<b style=[^>]*>(\w+)</b>", shown) == ["system", "user"]
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;<br>why?" in shown
    assert repr(chat) == "<Conversation: 2 messages, 0 tokens read>"


def test_comparison_and_conversion():
    found = Comparison(Quality(100, 400, 200.0), Quality(100, 400, 210.0), 0.0312, 0.91)
    table = found._repr_markdown_()
    assert "| perplexity | 7.389 | 8.166 |" in table
    assert "| mean KL(A ‖ B), nats a token | | 0.03120 |" in table
    assert "91.00%" in table
    assert "perplexity per character | 1.6487 |" in table
    other = Comparison(found.a, found.b, None, None, "other vocabularies")._repr_markdown_()
    assert "KL" not in other
    assert "| perplexity |" not in other
    assert other.endswith("\n\nother vocabularies")
    report = SimpleNamespace(source="the source", text="a text", comparison=found)
    made = Conversion(Path("/x/small"), {}, 3_400_000, 5.007, (), ("said once",), report)
    assert made._repr_markdown_().startswith("**small**: 3.4 MB, 5.007 bits per weight\n\n*said once*\n\nA: the source")
    assert made._repr_markdown_().endswith(table)


def test_how_a_training_run_ended():
    result = Result(Path("/x/adapter"), True, False, 76, 70, 0.01234, 1000, 2.0)
    assert result._repr_markdown_() == (
        "**76 steps**, finished, best validation loss 0.0123 nats a token at step 70; the adapter is in `adapter`"
    )
    made = replace(result, objective="pretrain", product="model")
    assert made._repr_markdown_().endswith("0.0123 nats a token at step 70; the model is in `adapter`")
    assert "loss 0.0123 at step 70" in replace(result, objective="dpo")._repr_markdown_()  # of pairs, not of tokens
    stopped = Result(Path("/x/adapter"), False, True, 7, None, None, 1000, 2.0)
    assert "resume=True" in stopped._repr_markdown_()


def test_a_bar_in_a_notebook_is_one_output_that_changes(notebook, monkeypatch):
    clock = iter([1.0, 1.01, 2.0, 2.01])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    bar = ProgressBar("reading <1>")
    for done in (10, 20, 30, 1000):
        bar(done, 1000)
    texts = [data["text/plain"] for data in notebook.shown]
    # The second came too soon after the first; the last is always shown.
    assert texts == ["reading <1> 10 of 1,000", "reading <1> 30 of 1,000", "reading <1> 1,000 of 1,000"]
    assert '<progress value="1000" max="1000"' in notebook.shown[-1]["text/html"]
    assert "reading &lt;1&gt;" in notebook.shown[-1]["text/html"]


def test_a_bar_says_how_long_the_rest_takes_once_the_speed_is_known(notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    bar = ProgressBar("evaluating")
    for passed, done, left in (
        (0, 50, ""),  # of an earlier run
        (4, 54, ""),  # too soon to tell
        (6, 60, ", about 40 seconds left"),
        (120, 90, ", about 32 seconds left"),
        (1, 100, ""),
        (1, 3, ""),  # other work begins
        (6, 4, ", about 10 minutes left"),
    ):
        now[0] += passed
        bar(done, 100)
        assert notebook.shown[-1]["text/plain"] == f"evaluating {done} of 100{left}"


def test_it_takes_the_reports_of_convert_tune_and_mt_bench(notebook):
    ProgressBar()(Progress("writing", "tensors", 3, 3))
    ProgressBar("training")(SimpleNamespace(step=5, steps=5, loss=0.5))
    ProgressBar()("judging", 2, 2)
    assert [data["text/plain"] for data in notebook.shown] == [
        "writing 3 of 3 tensors",
        "training 5 of 5, loss 0.500",
        "judging 2 of 2",
    ]


def test_on_a_terminal_it_is_one_line_and_in_a_pipe_nothing(monkeypatch):
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar("reading")
    bar(1, 2)
    bar(2, 2)
    assert terminal.getvalue().count("\r") >= 1
    assert terminal.getvalue().endswith("] reading 2 of 2\033[K\n")
    monkeypatch.setattr(sys, "stderr", pipe)
    ProgressBar("reading")(2, 2)
    assert pipe.getvalue() == ""


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "phi3_mlx", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("phi3-mlx ")
