"""`phi3-mlx eval` with MT-bench and with tasks like RULER's: what is asked, printed, kept and refused."""

import json

import pytest
from conftest import ROOT
from judges import fault, judging, write_bench

from phi3_mlx.cli import benches, main


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_bench(tmp_path / "mt_bench", each=1)


def run(capsys, *words):
    """(exit code, stdout, stderr)"""
    code = 0
    try:
        main(["eval", *words])
    except SystemExit as ended:
        code = ended.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


def bench(*words):
    return ["--tasks", "mt_bench", "--data", "mt_bench", "-o", "out", "--turn-tokens", "5", *words]


def test_answers_are_kept_and_rated_by_a_later_call(capsys, data):
    pytest.importorskip("openai")
    code, out, err = run(capsys, *bench())
    assert (code, out) == (0, "6 turns answered, 6 cut; --judge URL --judge-model NAME rates them\n")
    with judging(lambda number, body: "[[7]]" if number else "no rating") as server:
        code, out, err = run(capsys, *bench("--judge", server.url, "--judge-model", "judge", "--judge-parallel", "1"))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["tiny", "95", "%", "judgments"]
    assert lines[1] == ["all", "7.00", "5"]
    assert [line[0] for line in lines[1:]] == ["all", "turn", "turn", "writing", "math", "stem"]
    assert "1 judgments have no rating" in err
    assert "in our own words" in err


def test_two_models_are_compared_in_pairs(capsys, data):
    pytest.importorskip("openai")
    lines = [{"question_id": n, "choices": [{"index": 0, "turns": ["OLD", "OLD"]}]} for n in (81, 82, 83)]
    (data.parent / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def script(number, body):
        text = body["messages"][-1]["content"]
        if "== Assistant B" not in text:
            return "[[3]]" if "OLD" in text else "[[6]]"
        return "[[B]]" if text.index("OLD") < text.index("== Assistant B") else "[[A]]"

    with judging(script) as server:
        judge = ["--judge", server.url, "--judge-model", "judge", "--against", "old.jsonl"]
        code, out, _ = run(capsys, *bench(*judge))
        assert code == 0
        assert "rated higher than old by 3.00\n" in out
        assert "pairs: 6 won, 0 tied, 0 lost; adjusted win rate 100.0 %\n" in out
        asked = len(server.bodies)
        code, out, _ = run(capsys, *bench(*judge, "--json"))
        assert json.loads(out)["against"]["pairs"]["win"] == 6
        assert len(server.bodies) == asked  # all of it was there
    code, _, err = run(capsys, *bench("--judge", "http://127.0.0.1:9/v1", "--judge-model", "x", "--against", "tiny"))
    assert (code, "--against tiny is the model itself" in err) == (2, True)


def test_a_judges_faults_are_a_line_with_the_option_to_type(capsys, data, monkeypatch):
    pytest.importorskip("openai")
    with judging(lambda number, body: fault(401, "bad key")) as server:
        code, out, err = run(capsys, *bench("--judge", server.url, "--judge-model", "judge"))
    assert (code, out) == (1, "")
    assert "refuses the key (bad key)" in err
    assert "--judge-key VARIABLE" in err
    code, _, err = run(capsys, *bench("--judge", "http://x", "--judge-model", "y", "--judge-key", "NO_SUCH_KEY"))
    assert code == 2
    assert "--judge-key NO_SUCH_KEY is no environment variable that is set" in err


def test_a_judge_that_cannot_be_asked_is_refused_before_the_other_model_answers(capsys, data):
    pytest.importorskip("openai")
    other = str(ROOT / "weights" / "tiny")
    code, out, err = run(capsys, *bench("--judge", "localhost:80", "--judge-model", "x", "--against", other))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "'localhost:80' is no URL" in err
    assert not (data.parent / "out").exists()


def test_the_plan_is_of_the_largest_cache(monkeypatch, capsys):
    planned = []

    def loaded(source, prompt, answer, force, kv_bits):
        planned.append((prompt, kv_bits))
        raise KeyboardInterrupt

    monkeypatch.setattr(benches, "_loaded", loaded)
    for caches in ("4,8,8/4", "0,8"):
        run(capsys, "--tasks", "ruler", "--lengths", "1k,2k", "--caches", caches)
    assert planned == [(2048 - 128, (8, 8)), (2048 - 128, None)]


def test_a_curve_is_printed_and_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--tasks", "niah_word", "--lengths", "400,600", "--caches", "0,8", "--limit", "2", "-o", "curve"]
    code, out, err = run(capsys, *words)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == "rule cache tokens retrieved 95 % cost 95 %".split()
    assert [line[:1] + line[-9:] for line in lines[1:3]]
    assert len(lines) == 5
    assert lines[1][:4] == ["auto", "not", "quantized", "400"]
    assert lines[3][:4] == ["auto", "8", "bits", "400"]
    assert "compare these figures with each other alone" in err
    assert (tmp_path / "curve" / "ruler.json").exists()
    code, again, _ = run(capsys, *words)
    assert again == out
    code, out, _ = run(capsys, *words, "--json", "--longrope", "long")
    assert code == 1  # the folder has samples of the model under another rule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "mt_bench,mmlu"], "are asked apart"),
        (["--tasks", "ruler,arc_easy"], "are asked apart"),
        (["--tasks", "mt_bench"], "give -o DIR"),
        (["--tasks", "mt_bench", "-o", "x", "--chat"], "--chat means nothing to --tasks mt_bench"),
        (["--tasks", "mt_bench", "-o", "x", "--lengths", "4k"], "--lengths is for --tasks ruler alone"),
        (["--tasks", "mt_bench", "-o", "x", "--against", "y"], "--against has no effect without --judge"),
        (["--tasks", "mt_bench", "-o", "x", "--judge", "y"], "--judge says nothing without --judge-model"),
        (["--tasks", "ruler", "--judge", "y", "--judge-model", "z"], "--judge is for --tasks mt_bench alone"),
        (["--tasks", "ruler", "--against", "y"], "--against means nothing to --tasks ruler"),
        (["--tasks", "ruler", "--data", "y"], "--data means nothing to --tasks ruler"),
        (["--tasks", "arc_easy", "--caches", "4"], "--caches is for --tasks ruler alone"),
        (["--tasks", "arc_easy", "--turn-tokens", "4"], "--turn-tokens is for --tasks mt_bench alone"),
        (["--tasks", "ruler", "--lengths", "many"], "--lengths is 'many'; expected a whole number"),
    ],
)
def test_options_of_other_tasks_are_refused_by_name(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_a_length_beyond_the_context_is_refused(capsys):
    code, _, err = run(capsys, "--tasks", "ruler", "--lengths", "8k", "--limit", "1")
    assert code
    assert "4,096" in err
