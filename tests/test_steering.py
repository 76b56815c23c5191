"""Steering vectors and probes: what was planted is found again, and other models' files are refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from oracle import ids_of
from test_cli import one_line, run  # noqa: F401
from test_inside import MODELS, dense, off

from phi3_mlx import (
    Keep,
    activations,
    encode_prompt,
    generate,
    inspect,
    linear_probe,
    load,
    load_steering,
    save_steering,
    steer,
    steering_vectors,
    trace,
)
from phi3_mlx.errors import OptionError, PromptError
from phi3_mlx.interpret.vectors import direction

NAMES = ["Mia", "Lily", "Tom", "Ben", "Sam", "Anna"]
PAIRS = [
    tuple(f"There was a child named {name}. {name} was very {mood}" for mood in ("happy", "sad")) for name in NAMES
]
ASKED = "Tell me a story about a duck and a frog."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def feelings(tiny):
    return steering_vectors(*tiny, PAIRS, length="stream", layers=range(1, 6), raw=True)


def cosine(a, b) -> float:
    a, b = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# Reading prompts together


@pytest.mark.parametrize("name", MODELS)
def test_lists_of_several_lengths_give_each_what_it_gives_alone(name):
    model, keep = MODELS[name](), ["resid_post", "pattern", "logits"]
    rows = [ids_of(length, seed=length)[0].tolist() for length in (3, 40, 1, 17)]
    inside = inspect(model, rows, keep)
    for row, ids in enumerate(rows):
        alone = inspect(model, ids, keep)
        assert inside.positions("resid_post", 1, row) == [*range(len(ids))]
        for place, layer in (("resid_post", 1), ("pattern", 1), ("logits", None)):
            assert off(inside[place, layer, row], alone[place, layer]) < 1e-4


def test_activations_are_means_over_the_positions_prompt_by_prompt(tiny):
    model, tokenizer = tiny
    prompts = ["A duck", [{"role": "user", "content": ASKED}], encode_prompt(tokenizer, "A frog and an owl"), "An owl"]
    for positions in (-1, None, [1, -2], slice(-3, None)):
        read = activations(model, tokenizer, prompts, layers=[3, -1], positions=positions, batch_size=3)
        assert {layer: x.shape for layer, x in read.items()} == {3: (4, 256), 5: (4, 256)}
        for row, prompt in enumerate(prompts):
            ids = encode_prompt(tokenizer, prompt)
            alone = inspect(model, ids, Keep("resid_post", layers=[3, 5], positions=positions))
            for layer, x in read.items():
                assert off(x[row], alone["resid_post", layer][0].mean(axis=0)) < 1e-3
    raw = activations(model, tokenizer, ["A duck"], layers=0, place="act", raw=True)[0]
    ids = encode_prompt(tokenizer, "A duck", raw=True)
    assert off(raw[0], inspect(model, ids, "act")["act", 0][0, -1]) < 1e-4


def test_what_cannot_be_activations_is_refused(tiny):
    model, tokenizer = tiny
    for options, said in [
        ({"place": "pattern"}, r"place pattern is \(B, H, L, S\)"),
        ({"place": "embed"}, "place embed is"),
        ({"place": "z"}, "place z is"),
        ({"place": "nowhere"}, "none of this model"),
        ({"layers": 6}, "layer 6 is not there"),
        ({"positions": 99}, "position 99 of what is kept of resid_post is outside a sequence of"),
        ({"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(OptionError, match=said):
            activations(model, tokenizer, ["A duck"], **options)
    for prompts in ("A duck", [], 3):
        with pytest.raises(OptionError, match="prompts is"):
            activations(model, tokenizer, prompts)
    with pytest.raises(PromptError):
        activations(model, tokenizer, ["A duck", ""])


# Vectors


def planted(width=48, pairs=40, noise=0.3):
    """Pairs that differ by a direction, each by as much of it as it draws, and by noise; (towards, away, direction)."""
    rng = np.random.default_rng(3)
    axis = rng.standard_normal(width)
    axis /= np.linalg.norm(axis)
    middle = 5 * rng.standard_normal((pairs, width))
    half = (1 + rng.random((pairs, 1))) * axis
    towards, away = (middle + sign * half + noise * rng.standard_normal((pairs, width)) for sign in (1, -1))
    return mx.array(towards), mx.array(away), axis


@pytest.mark.parametrize("method", ["difference", "pca"])
def test_a_planted_direction_is_recovered(method):
    towards, away, axis = planted()
    vector = direction(towards, away, method)
    assert vector.dtype == np.float32
    assert cosine(vector, axis) > 0.98
    apart = np.array(towards).mean(axis=0) - np.array(away).mean(axis=0)
    assert np.linalg.norm(vector) == pytest.approx(apart @ vector / np.linalg.norm(vector), rel=1e-4)
    assert np.linalg.norm(direction(towards, away, method, "unit")) == pytest.approx(1)
    both = np.linalg.norm(np.concatenate([towards, away]), axis=1).mean()
    assert np.linalg.norm(direction(towards, away, method, "stream")) == pytest.approx(both, rel=1e-5)
    assert cosine(direction(away, towards, method), axis) < -0.98


def test_pca_is_the_first_component_of_pairs_centred_on_their_middles():
    decomposition = pytest.importorskip("sklearn.decomposition")
    towards, away, _ = planted(noise=2)
    middle = (np.array(towards) + np.array(away)) / 2
    centred = np.concatenate([towards - middle, away - middle])
    theirs = decomposition.PCA(1).fit(centred).components_[0]
    assert abs(cosine(direction(towards, away, "pca"), theirs)) > 1 - 1e-6
    assert cosine(direction(towards, away), theirs) ** 2 < 0.99


def test_a_direction_planted_in_the_embedding_is_found_in_the_stream():
    model, ids = dense("mini-4k"), ids_of(9)[0].tolist()
    shift = mx.random.normal((model.config.hidden_size,), key=mx.random.key(4))
    table = model.model.embed_tokens.weight
    table[7] = table[5] + shift
    pairs = [([*ids, first, 7], [*ids, first, 5]) for first in (11, 12, 13)]
    _, tokenizer = load("tiny")
    there = steering_vectors(model, tokenizer, pairs, place="resid_pre", layers=0)
    assert off(there[0], shift) < 1e-4
    spread = steering_vectors(model, tokenizer, pairs, place="resid_pre", layers=0, positions=None)
    assert off(spread[0], shift / 11) < 1e-4


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "list of pairs"),
        ("text", "list of pairs"),
        (["ab"], "two prompts"),
        ([("a",)], "two prompts"),
        ([("A duck", "A duck")], "do not differ in layer 0"),
    ],
)
@pytest.mark.parametrize("length", ["means", "unit", "stream"])
def test_what_makes_no_vector_is_refused(tiny, pairs, said, length):
    for method in ("difference", "pca"):
        with pytest.raises(OptionError, match=said):
            steering_vectors(*tiny, pairs, method=method, length=length)


def test_unknown_ways_to_make_a_vector_are_named(tiny):
    with pytest.raises(OptionError, match="method 'svd' is unknown"):
        steering_vectors(*tiny, PAIRS, method="svd")
    with pytest.raises(OptionError, match="length 'long' is unknown"):
        steering_vectors(*tiny, PAIRS, length="long")


# Steering


def gladness(tiny, edits) -> float:
    """By how many nats "happy" is likelier than "sad" in some new sentences."""
    model, tokenizer = tiny
    happy, sad = (encode_prompt(tokenizer, f"very {mood}", raw=True)[-1] for mood in ("happy", "sad"))
    lines = [f"One day, {name} went to the park with a dog. In the end {name} felt very" for name in ("Max", "Sue")]
    inside = inspect(model, [encode_prompt(tokenizer, line, raw=True) for line in lines], "final_norm", edits)
    logits = mx.concatenate([model.logits(inside["final_norm", None, row][:, -1]) for row in range(2)])
    return float((logits[:, happy] - logits[:, sad]).mean())


@pytest.mark.parametrize("method", ["difference", "pca"])
def test_strength_raises_the_feeling_step_by_step(tiny, method):
    vector = steering_vectors(*tiny, PAIRS, method=method, length="stream", layers=2, raw=True)
    measured = [gladness(tiny, steer(vector, strength=strength)) for strength in (-0.5, -0.25, 0, 0.25, 0.5)]
    assert np.diff(measured).min() > 0.5
    assert measured[0] < 0 < measured[-1]


def test_strength_0_changes_no_bit(tiny, feelings):
    model, tokenizer = tiny
    ids = encode_prompt(tokenizer, ASKED)
    plain = inspect(model, ids, "resid_post")
    same = inspect(model, ids, "resid_post", steer(feelings, strength=0))
    assert mx.array_equal(plain.stack("resid_post"), same.stack("resid_post"))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(OptionError, match="strength is"):
        steer(mx.ones(8), strength=strength)


def test_a_vector_that_does_not_fit_is_refused(tiny):
    model, tokenizer = tiny
    for vector in (mx.ones(192), mx.ones(1), {2: mx.ones(255)}):
        with trace(model, edits=steer(vector)), pytest.raises(OptionError, match="cannot be added at resid_post"):
            generate(model, tokenizer, "A duck", max_tokens=2)
    for wrong in ({-1: mx.ones(256)}, {1: [1.0]}, {"1": mx.ones(256)}, "file.gguf"):
        with pytest.raises(OptionError):
            steer(wrong)
    with pytest.raises(OptionError, match="layer 6 is not there"), trace(model, edits=steer({6: mx.ones(256)})):
        pass


# Files of other models


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_a_file_of_another_model_is_refused_in_one_line(tiny, tmp_path, ending):
    if ending == "gguf":
        pytest.importorskip("gguf")
    model, path = tiny[0], tmp_path / f"a vector.{ending}"
    save_steering({1: mx.ones(256), 5: mx.ones(256)}, path)
    assert load_steering(path, model).keys() == {1, 5}
    for vectors, model_type, said in [
        ({1: mx.ones(3072)}, "phi3", "they have 3,072 numbers, and this one has 256"),
        ({6: mx.ones(256)}, "phi3", "one is of layer 6, and this one has layers 0 to 5"),
        ({1: mx.ones(256)}, "phimoe", "it names 'phimoe' as their type, and this one is phi3"),
    ]:
        save_steering(vectors, path, model_type=model_type, force=True)
        with pytest.raises(OptionError, match=said) as caught:
            load_steering(path, model)
        assert str(caught.value).startswith(f"{path} has steering vectors of another model")
        assert load_steering(path).keys() == vectors.keys()
    with pytest.raises(OptionError, match="model is 'tiny'"):
        load_steering(path, "tiny")


# The command line


@pytest.fixture
def file(feelings, tmp_path):
    return str(save_steering({2: feelings[2]}, tmp_path / "very=happy or sad.safetensors"))


def test_generate_and_chat_answer_under_saved_vectors(run, tiny, feelings, file):  # noqa: F811
    sadder, happier = (steer({2: feelings[2]}, strength=strength) for strength in (-0.5, 1))
    plain = generate(*tiny, ASKED, max_tokens=24)
    with trace(tiny[0], edits=sadder):
        sad = generate(*tiny, ASKED, max_tokens=24)
    with trace(tiny[0], edits=[sadder, happier]):
        both = generate(*tiny, ASKED, max_tokens=24)
    assert len({sad, both, plain}) == 3
    options = ["--max-tokens", 24, "--steer", f"{file}=-0.5"]
    assert run("generate", *options, stdin=ASKED.encode()) == (0, f"{sad}\n", "")
    for more in (["--lookup", 4], ["--draft-model", "tiny"]):
        assert run("generate", "-p", ASKED, *options, *more) == (0, f"{sad}\n", "")
    code, out, _ = run("generate", "-p", ASKED, *options, "--steer", file, "--json")
    assert (code, json.loads(out)["text"]) == (0, both)
    assert run("generate", "-p", ASKED, "--max-tokens", 24, "--steer", f"{file}=0") == (0, f"{plain}\n", "")
    turns = f"{ASKED}\n/reset\n{ASKED}\n".encode()
    assert run("chat", *options, stdin=turns)[:2] == (0, f"{sad}\n{sad}\n")
    assert run("generate", "-p", ASKED, "--max-tokens", 24) == (0, f"{plain}\n", "")


def test_steer_layers_choose_among_the_vectors(run, tiny, feelings, tmp_path):  # noqa: F811
    path = save_steering(feelings, tmp_path / "all.safetensors")
    for layers, chosen in (("2", [2]), ("2-3", [2, 3]), ("4-99", [4, 5]), ("1-5", range(1, 6))):
        with trace(tiny[0], edits=steer({layer: feelings[layer] for layer in chosen}, strength=-0.3)):
            expected = generate(*tiny, ASKED, max_tokens=16)
        options = ["--max-tokens", 16, "--steer", f"{path}=-0.3", "--steer-layers", layers]
        assert run("generate", "-p", ASKED, *options) == (0, f"{expected}\n", "")
    turns = f"{ASKED}\n".encode()
    assert run("chat", *options, stdin=turns)[:2] == (0, f"{expected}\n")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_cannot_steer_is_refused_in_one_line(run, command, file, tmp_path):  # noqa: F811
    other = save_steering({1: mx.ones(8)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    for options, expected, message in [
        ([f"{file}=much"], 2, f"--steer {file}=much: 'much' is not a strength; write --steer {file}=0.5"),
        ([f"{file}=nan"], 2, "'nan' is not a strength"),
        ([f"{file}=1e999"], 2, "'1e999' is not a strength"),
        (["=1"], 2, "write --steer FILE=0.5"),
        ([other], 2, f"{other} has steering vectors of another model: they have 8 numbers, and this one has 256"),
        ([tmp_path / "nothing.gguf"], 1, "No such file"),
        ([tmp_path / "damaged.gguf"], 1, "damaged.gguf"),
        ([tmp_path], 1, "cannot be read"),
        ([file, "-m", "mlx-lm:owner/model"], 2, "--steer is for the Phi family alone"),
        ([file, "--prefixes", tmp_path], 2, "--prefixes was read without --steer"),
        ([file, "--cache", "x.cache"], 2, "--cache was read without --steer"),
        ([file, "--steer-layers", "3-5"], 2, f"{file} has vectors of layers 2, and none of --steer-layers 3-5"),
        ([file, "--steer-layers", "5-3"], 2, "--steer-layers '5-3' are no layers; write 8-12, or 8"),
        ([file, "--steer-layers", "-1"], 2, "--steer-layers '-1' are no layers"),
        ([file, "--steer-layers", "all"], 2, "--steer-layers 'all' are no layers"),
    ]:
        if command == "chat" and "--cache" in options:
            continue
        code, out, err = run(command, "--steer", *options, stdin=ASKED.encode())
        assert (code, out) == (expected, ""), err
        assert message in one_line(err)
    code, out, err = run(command, "--steer-layers", "2", stdin=ASKED.encode())
    assert (code, out) == (2, "")
    assert "--steer-layers has no effect without --steer" in one_line(err)


# A probe


def blobs(examples=120, width=30, apart=1.0):
    rng = np.random.default_rng(5)
    labels = rng.random(examples) < 0.4
    x = rng.standard_normal((examples, width)) * rng.uniform(0.1, 9, width) + 100
    x[:, 3] += apart * labels
    return mx.array(x.astype(np.float32)), labels.astype(int).tolist()


@pytest.mark.parametrize(("width", "penalty"), [(30, 1.0), (400, 0.01), (3, 30.0)])
def test_a_probe_is_scikit_learns_logistic_regression(width, penalty):
    sklearn = pytest.importorskip("sklearn.linear_model")
    pytest.importorskip("sklearn.preprocessing")
    from sklearn.preprocessing import StandardScaler

    if width == 3:
        x, labels = blobs()
        x = x[:, 2:5]
    else:
        x, labels = blobs(width=width)
    probe = linear_probe(x, labels, penalty=penalty)
    scaler = StandardScaler().fit(np.array(x, dtype=np.float64))
    theirs = sklearn.LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
    theirs.fit(scaler.transform(np.array(x, dtype=np.float64)), labels)
    assert off(np.array(probe.weights) * scaler.scale_, theirs.coef_[0]) < 1e-3 * np.abs(theirs.coef_).max()
    likely = theirs.predict_proba(scaler.transform(np.array(x, dtype=np.float64)))[:, 1]
    assert off(probe(x), likely) < 1e-3


def test_held_out_accuracy_is_that_of_fits_without_the_example():
    x, labels = blobs(apart=200.0)
    assert linear_probe(x, labels).accuracy > 0.95
    rng = np.random.default_rng(0)
    noise = mx.array(rng.standard_normal((120, 300)).astype(np.float32))
    drawn = rng.permutation([0, 1] * 60).tolist()
    probe = linear_probe(noise, drawn)
    assert ((np.array(probe(noise)) > 0.5) == np.array(drawn)).all()  # it knows all that it has seen
    assert 0.3 < probe.accuracy < 0.7
    assert probe.chance == 0.5


def test_groups_are_held_out_together():
    """What two examples of a group share must not tell."""
    rng = np.random.default_rng(1)
    kinds = rng.permutation([0, 1] * 30)
    one_a_group = rng.standard_normal((60, 100))
    x = mx.array(np.concatenate([one_a_group, one_a_group + 0.01]).astype(np.float32))
    labels, groups = [*kinds.tolist()] * 2, [*range(60)] * 2
    assert linear_probe(x, labels).accuracy > 0.85
    assert linear_probe(x, labels, groups=groups).accuracy < 0.7
    assert linear_probe(x, labels, seed=1).accuracy == linear_probe(x, labels, seed=1).accuracy


def test_the_feeling_is_told_by_a_probe_that_never_saw_the_name(tiny):
    read = activations(*tiny, [prompt for pair in PAIRS for prompt in pair], layers=[2], raw=True)
    probe = linear_probe(read[2], [1, 0] * len(PAIRS), groups=[i // 2 for i in range(2 * len(PAIRS))], folds=3)
    assert probe.accuracy == 1
    vector = steering_vectors(*tiny, PAIRS, layers=2, raw=True)[2]
    assert cosine(probe.weights, vector) > 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((mx.ones(3), [0, 1, 1]), "activations is"),
        (([[1.0]], [0]), "activations is a list"),
        ((mx.array([[mx.nan], [1.0]]), [0, 1]), "not finite"),
        ((mx.ones((3, 2)), [0, 1]), "expected 3 of 0 and 1"),
        ((mx.ones((2, 2)), [1, 1]), "both among them"),
        ((mx.ones((2, 2)), [0, 2]), "of 0 and 1"),
        ((mx.ones((2, 2)), "01"), "labels is"),
        ((mx.ones((2, 2)), [0, 1]), "folds is 5; there are 2"),
    ],
)
def test_what_cannot_be_probed_is_refused(arguments, said):
    with pytest.raises(OptionError, match=said):
        linear_probe(*arguments)


def test_options_of_a_probe_are_checked():
    x, labels = blobs()
    for options, said in [
        ({"folds": 1}, "folds is 1"),
        ({"folds": 2.5}, "folds is 2.5"),
        ({"penalty": 0}, "penalty is 0"),
        ({"penalty": float("nan")}, "penalty is nan"),
        ({"groups": [1]}, "120 names"),
        ({"groups": [0] * 60 + [1] * 60, "folds": 3}, "there are 2 groups"),
    ]:
        with pytest.raises(OptionError, match=said):
            linear_probe(x, labels, **options)
    with pytest.raises(OptionError, match="leave one kind alone"):
        linear_probe(mx.ones((4, 2)), [0, 0, 1, 1], groups=[0, 0, 1, 1], folds=2)
