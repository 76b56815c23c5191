"""Preferences against TRL's trainers: losses, rewards and gradients of a step, and 20 steps, in float32."""

import copy
import warnings

import mlx.core as mx
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten

from phi3_mlx.tuning.events import Listener
from phi3_mlx.tuning.examples import Example
from phi3_mlx.tuning.pairs import Labelled, PreferencePair
from phi3_mlx.tuning.settings import Settings
from phi3_mlx.tuning.trainer import Trainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

RAW = {**oracle.slim(oracle.CONFIGS["mini-4k"]), "sliding_window": None}
EOS, ROWS, BATCH, STEPS = 0, 8, 4, 20
RATE = 1e-4


def lines(seed: int = 0) -> list[dict]:
    """Prompts and two answers of words `w2` to `w95`, of several lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: [int(i) for i in rng.integers(2, 96, rng.integers(low, high))]  # noqa: E731
    return [{"prompt": draw(3, 9), "chosen": draw(2, 9), "rejected": draw(2, 12)} for _ in range(ROWS)]


def text(ids: list[int]) -> str:
    """Each word with a blank behind it, so that a prompt and its answer can be put together."""
    return "".join(f"w{i} " for i in ids)


def example(prompt: list[int], answer: list[int], *, whole: bool = False) -> Example:
    ids = np.array([*prompt, *answer, EOS], np.int32)
    return Example(ids, np.arange(len(ids)) >= (1 if whole else len(prompt)), "memory:1")


def pairs(rows: list[dict], *, whole: bool = False) -> list[PreferencePair]:
    return [
        PreferencePair(
            example(row["prompt"], row["chosen"], whole=whole),
            example(row["prompt"], row["rejected"]),
            len(row["prompt"]),
        )
        for row in rows
    ]


def tokenizer():
    """One token for each word of `text`, and nothing in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def models(tmp_path):
    ours = oracle.make_ours(RAW)
    ours.unfreeze()
    return ours, oracle.make_torch(RAW, ours)


def our_losses(model, examples, tmp_path, **settings):
    """(losses, reports) of `STEPS` steps over the examples in order, and the gradients of the first."""
    chosen = Settings(
        model="tiny",
        data="d",
        output="o",
        method="full",
        batch_size=BATCH,
        steps=STEPS,
        learning_rate=RATE,
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        clip=0.0,
        dtype="float32",
        **settings,
    )
    reports = []
    trainer = Trainer(model, examples, [], chosen, tmp_path / "checkpoints", {}, Listener(step=reports.append))
    trainer.schedule.batch = lambda step: [(step * BATCH + n) % ROWS for n in range(BATCH)]
    assert trainer.read_reference()
    _, gradients, _ = trainer.gradients(0)
    gradients = {name: np.array(array) / BATCH for name, array in tree_flatten(gradients)}
    assert trainer.run()
    return [report.loss for report in reports], reports, gradients


def arguments(kind, tmp_path, **more):
    return kind(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch",
        disable_tqdm=True,
        **more,
    )


def their_losses(trainer):
    """Losses and logs of each step, and the gradients of the first, by the names of parameters."""
    gradients = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if not gradients:
                gradients.update({n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    sequential = torch.utils.data.SequentialSampler
    trainer._get_train_sampler = lambda dataset=None: sequential(trainer.train_dataset)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == STEPS
    return [line["loss"] for line in logs], logs, gradients


def assert_same(ours, theirs):
    losses, reports, gradients = ours
    expected, logs, slopes = theirs
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert losses[-1] < losses[0] - 1e-3  # something was learnt, so that the rest of the comparison means something
    largest = max(float(np.abs(slope).max()) for slope in slopes.values())
    assert slopes.keys() <= gradients.keys()
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, atol=1e-5 * largest, rtol=1e-4, err_msg=name)
    return reports, logs


def quiet():
    warnings.simplefilter("ignore")


def as_texts(rows):
    from datasets import Dataset

    return Dataset.from_list([{name: text(ids) for name, ids in row.items()} for row in rows])


@pytest.mark.parametrize(
    ("loss", "settings"),
    [("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.2, "beta": 0.5}), ("ipo", {"beta": 0.3})],
)
def test_dpo_is_trls(tmp_path, loss, settings):
    rows = lines()
    model, reference = models(tmp_path)
    ours = our_losses(model, pairs(rows), tmp_path, objective="dpo", dpo_loss=loss, **settings)
    with warnings.catch_warnings():
        quiet()
        beta, smoothing = settings.get("beta", 0.1), settings.get("label_smoothing")
        kinds = {"loss_type": [loss]}
        if smoothing:
            # Its "sigmoid" takes no smoothing, and "robust" is -log sigmoid (1 - e) minus that of the exchanged answers
            # times e, by 1 - 2e: two and one of them have the sum of both.
            weights = [2 * (1 - smoothing), 2 * smoothing - 1]
            kinds = {"loss_type": [loss, "robust"], "loss_weights": weights, "label_smoothing": smoothing}
        args = arguments(trl.DPOConfig, tmp_path, beta=beta, max_length=None, **kinds)
        trainer = trl.DPOTrainer(
            copy.deepcopy(reference), reference, args, train_dataset=as_texts(rows), processing_class=tokenizer()
        )
        reports, logs = assert_same(ours, their_losses(trainer))
    for report, line in zip(reports, logs, strict=True):
        figures = report.figures
        for name, theirs in (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")):
            assert figures[f"reward_{name}"] == pytest.approx(line[theirs], abs=2e-4)
        assert figures["margin"] == pytest.approx(line["rewards/margins"], abs=2e-4)
    assert reports[0].loss == pytest.approx(np.log(2) if loss == "sigmoid" else 1 / (4 * 0.3**2), rel=1e-4)


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_objectives_without_a_reference_are_trls(tmp_path, objective):
    rows = lines()
    model, theirs = models(tmp_path)
    ours = our_losses(model, pairs(rows, whole=objective == "orpo"), tmp_path, objective=objective, beta=0.7)
    with warnings.catch_warnings():
        quiet()
        if objective == "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Theirs

            more = {}
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Theirs

            more = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}
        args = arguments(Config, tmp_path, beta=0.7, max_length=200, **more)
        trainer = Theirs(theirs, args, train_dataset=as_texts(rows), processing_class=tokenizer())
        reports, logs = assert_same(ours, their_losses(trainer))
    for report, line in zip(reports, logs, strict=True):
        assert report.figures["reward_chosen"] == pytest.approx(line["rewards/chosen"], abs=2e-4)
        assert report.figures["accuracy"] == pytest.approx(line["rewards/accuracies"], abs=1e-6)


def test_kto_is_trls(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 != 0} for n, row in enumerate(lines())
    ]
    model, reference = models(tmp_path)
    answers = [example(row["prompt"], row["completion"]) for row in rows]
    examples = []
    for n, row in enumerate(rows):
        first = n - n % BATCH
        other = rows[first + (n - first - 1) % BATCH]
        examples.append(Labelled(answers[n], row["label"], example(row["prompt"], other["completion"])))
    ours = our_losses(model, examples, tmp_path, objective="kto", desirable_weight=1.3, undesirable_weight=0.8)
    from datasets import Dataset

    said = [{**{name: text(row[name]) for name in ("prompt", "completion")}, "label": row["label"]} for row in rows]
    with warnings.catch_warnings():
        quiet()
        args = arguments(
            trl.KTOConfig,
            tmp_path,
            beta=0.1,
            desirable_weight=1.3,
            undesirable_weight=0.8,
            max_length=None,
            train_sampling_strategy="sequential",
        )
        trainer = trl.KTOTrainer(
            copy.deepcopy(reference),
            reference,
            args,
            train_dataset=Dataset.from_list(said),
            processing_class=tokenizer(),
        )
        reports, logs = assert_same(ours, their_losses(trainer))
    for report, line in zip(reports, logs, strict=True):
        for ours, theirs in (
            ("kl", "kl"),
            ("reward_chosen", "rewards/chosen"),
            ("reward_rejected", "rewards/rejected"),
        ):
            assert report.figures[ours] == pytest.approx(line[theirs], abs=2e-4), ours


def test_the_arrays_end_in_float32():
    assert oracle.make_ours(RAW).dtype == mx.float32
