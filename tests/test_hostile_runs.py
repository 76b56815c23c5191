"""What a run left in its folder, changed afterwards: it is gone on with as it was, or refused in one line."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi3_mlx.errors import OptionError, TrainingError
from phi3_mlx.tuning.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint
from phi3_mlx.tuning.log import METRICS, plot_losses, read_metrics
from phi3_mlx.tuning.optimizers import make_optimizer, optimizer_arrays, restore_optimizer
from phi3_mlx.tuning.settings import OPTIMIZERS, Settings
from phi3_mlx.tuning.stored import stored_settings
from phi3_mlx.tuning.trainer import TrainingProgress

PROGRESS = TrainingProgress(step=4, tokens=100, trained_tokens=50, best_loss=1.5, best_step=2, last_loss=2.0, worse=1)


@pytest.fixture
def checkpoint(tmp_path):
    arrays = {"a": mx.ones((2, 3)), "b": mx.zeros(4)}
    return save_checkpoint(tmp_path, 4, arrays, {"step": mx.array(4), "v": mx.ones(2)}, vars(PROGRESS))


def with_state(checkpoint, **changes):
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return read_checkpoint(checkpoint)[2]


def test_a_checkpoint_gives_back_what_was_saved(checkpoint):
    weights, optimizer, state = read_checkpoint(checkpoint)
    assert {name: array.shape for name, array in weights.items()} == {"a": (2, 3), "b": (4,)}
    assert optimizer["step"].item() == 4
    assert TrainingProgress.of(state) == PROGRESS


def test_of_two_checkpoints_the_later_one_is_gone_on_with(checkpoint, tmp_path):
    """A run killed between writing a checkpoint and removing the one before it leaves both."""
    shutil.copytree(checkpoint, tmp_path / "step-00000012")
    assert newest_checkpoint(tmp_path).name == "step-00000012"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 5),
        ("step", -1),
        ("step", True),
        ("step", "4"),
        ("step", None),
        ("tokens", 1.5),
        ("tokens", 10**30),
        ("best_loss", "low"),
        ("best_loss", float("inf")),
        ("best_step", -1),
        ("last_loss", []),
        ("worse", None),
        ("worse", 0.5),
    ],
)
def test_a_changed_state_is_refused_by_name(checkpoint, key, value):
    with pytest.raises(TrainingError, match=rf"state.json: {key} is .*; remove .* and start over"):
        TrainingProgress.of(with_state(checkpoint, **{key: value}))


def test_a_loss_that_was_no_number_is_none(checkpoint):
    assert TrainingProgress.of(
        with_state(checkpoint, best_loss=None, best_step=None, last_loss=float("nan"))
    ) == TrainingProgress(step=4, tokens=100, trained_tokens=50, worse=1)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"\xff", b"{", b'{"step": 4, "step": 5}'])
def test_a_state_that_is_no_object_is_refused(checkpoint, content):
    (checkpoint / "state.json").write_bytes(content)
    with pytest.raises(TrainingError, match=r"is damaged \(.*state.json .*\); remove .* and start over"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_arrays_that_are_cut_or_no_numbers_are_refused(checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    for content in (whole[:-4], whole[:20], b"", whole.replace(b"F32", b"X32")):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(TrainingError, match=rf"is damaged \(.*{name}"):
            read_checkpoint(checkpoint)
    mx.save_safetensors(str(checkpoint / name), {"v": mx.array([1.0, mx.nan])})
    with pytest.raises(TrainingError, match="v, whose numbers are not all finite"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_takes_its_own_arrays_alone(optimizer):
    def made():
        layer = nn.Linear(8, 4)
        own = make_optimizer(Settings(data="d", output="o", optimizer=optimizer))
        own.init(layer.trainable_parameters())
        return own

    arrays = optimizer_arrays(made())
    restore_optimizer(made(), arrays)
    name = max(arrays, key=lambda name: arrays[name].ndim)
    without = {key: array for key, array in arrays.items() if key != name}
    for wrong in (without, {**arrays, "more": mx.zeros(1)}, {**arrays, name: mx.zeros((9, 9))}, {}):
        with pytest.raises(ValueError, match="is not of this optimizer"):
            restore_optimizer(made(), wrong)


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    good = {"kind": "train", "step": 1, "loss": 2.0}
    odd = [b"", b"5", b"null", b"[]", b'"x"', b"{}", b'{"step": "a"}', b'{"step": true}', b"[" * 100_000, b"\xff", b"{"]
    odd += [b'{"kind": "train", "step": 2}', b'{"kind": [], "step": 3}', b'{"kind": "valid", "step": 4, "loss": "x"}']
    (tmp_path / METRICS).write_bytes(b"\n".join([*odd, json.dumps(good).encode(), *odd]))
    assert [line for line in read_metrics(tmp_path) if line["step"] == 1] == [good]
    pytest.importorskip("matplotlib")
    assert plot_losses(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"settings": 5}', "settings is 5, expected an object"),
        ('{"settings": {"rank": "many"}}', "rank is 'many'"),
        ('{"settings": {"rang": 8}}', "unknown setting 'rang'"),
        ("[" * 10_000, "nested deeper"),
        ("{}{}", "not valid JSON"),
    ],
)
def test_a_run_json_that_was_changed_is_refused(tmp_path, content, why):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises((TrainingError, OptionError), match=why):
        stored_settings(tmp_path)
