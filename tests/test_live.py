"""Which tests `make test-live` runs: all that are skipped without what it installs, and few others."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import pytest_runtest_call, pytest_runtest_makereport
from live import is_live, live_names

SOURCE = """
import oracle
from moe_models import make_torch, random_weights

NEEDS = pytest.mark.skipif(shutil.which("go") is None, reason="no Go here")


def off(ours, theirs):
    return abs(ours - theirs)


@pytest.fixture
def theirs():
    return pytest.importorskip("torch")


def helper():
    return oracle.reference_steps()


def test_fixture(theirs): ...
def test_helper(): helper()
def test_imported(): make_torch()
@NEEDS
def test_marked(): ...
def test_none(): off(oracle.naive, random_weights())
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / f"test_{abs(hash(text))}.py"
        path.write_text(text)
        return path

    return write


def test_tests_are_live_that_name_a_reference_or_use_what_does(file):
    tests = ("test_fixture", "test_helper", "test_imported", "test_marked", "test_none")
    path = file(SOURCE)
    assert [name for name in tests if is_live(path, [name])] == [*tests[:-1]]
    assert {"theirs", "helper", "NEEDS", "make_torch"} <= live_names(path)
    assert is_live(path, ["test_none", "theirs"])  # a fixture that pytest found for it


def test_all_of_a_file_is_live_that_is_skipped_as_a_whole(file):
    assert is_live(file('torch = pytest.importorskip("torch")\n'), ["test_any"])
    assert is_live(file("import llama_cpp\npytestmark = pytest.mark.skipif(llama_cpp.MISSING)\n"), ["test_any"])
    assert not is_live(file('gguf = pytest.importorskip("gguf")\n'), ["test_any"])


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("reason", ["could not import 'torch': No module named 'torch'", "no Go here", "no iconv here"])
def test_one_that_nothing_runs_fails(reason, marked):
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, f"Skipped: {reason}"))
    judging = pytest_runtest_makereport(SimpleNamespace(get_closest_marker=lambda name: marked))
    next(judging)
    with pytest.raises(StopIteration):
        judging.send(report)
    assert report.outcome == ("skipped" if marked or "iconv" in reason else "failed")


def test_what_is_drawn_without_a_key_is_the_same_in_each_run_and_another_in_each_test(request):
    drawn = mx.random.uniform(shape=(4,))
    for name, same in ((request.node.nodeid, True), ("another", False)):
        pytest_runtest_call(SimpleNamespace(nodeid=name))
        assert mx.array_equal(mx.random.uniform(shape=(4,)), drawn) == same
