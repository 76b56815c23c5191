"""Adapter folders: mlx-lm's format, the base they belong to, several at once, PEFT both ways, fusing."""

import errno
import json
import os
import shutil
import warnings

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import long_after
from mlx.utils import tree_flatten
from tuning_models import RAW, copy_of, make_directory, randomize

from phi3_mlx import load
from phi3_mlx.adapters.folder import Adapters, adapter_files, base_of, fingerprint, write_adapter
from phi3_mlx.adapters.lora import attach
from phi3_mlx.adapters.peft import export_peft, import_peft
from phi3_mlx.adapters.targets import find_targets
from phi3_mlx.cli import main
from phi3_mlx.conversion import fuse as fusing
from phi3_mlx.conversion import own_text
from phi3_mlx.conversion.fuse import fuse
from phi3_mlx.conversion.texts import bundled
from phi3_mlx.engine import plan
from phi3_mlx.errors import AdapterError, OptionError
from phi3_mlx.store.checkpoint import read_model
from phi3_mlx.store.safetensors import find_weights

IDS = mx.array([[5, 40, 100, 7, 99, 1000, 3, 17, 2500, 44]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("model") / "packed", bits=4)


def make_adapter(directory, folder, *, targets=(), layers=None, rank=3, strength=1.0, seed=0, **options):
    """A folder whose adapter changes much, and the logits of the model with it."""
    model = read_model(directory)
    adapters = attach(model, find_targets(model.config, targets, layers), rank, 2.0 * rank, **options)
    randomize(adapters, seed)
    for adapter in adapters.values():
        adapter.lora_b = adapter.lora_b * strength
    model.eval()
    facts = {"phi3_mlx": {"rslora": options.get("rslora", False)}}
    files = adapter_files(adapters, model.config.num_hidden_layers, base_of(directory, str(directory)), **facts)
    write_adapter(folder, *files)
    return np.array(model(IDS)[0])


def logits(model):
    return np.array(model(IDS)[0].astype(mx.float32))


def off(one, other):
    return float(np.abs(one - other).max())


KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "parts": {"targets": ("q_proj", "v_proj", "up_proj", "o_proj")},
    "parts-dora": {"targets": ("q_proj", "k_proj", "gate_proj"), "dora": True},
    "range": {"layers": "0-1", "targets": ("qkv_proj", "down_proj")},
    "last": {"layers": "-2", "targets": ("down_proj",)},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_folder_is_read_here_and_by_mlx_lm(kind, packed, tmp_path):
    """The logits of training, after a round trip through the disk, in both packages."""
    expected = make_adapter(packed, tmp_path / "a", **KINDS[kind])
    plain = logits(read_model(packed))
    assert off(expected, plain) > 0.5
    assert off(logits(load(str(packed), adapter=tmp_path / "a")[0]), expected) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports'
        utils = pytest.importorskip("mlx_lm.utils")
        from mlx_lm.tuner.utils import load_adapters

        theirs, _ = utils.load_model(packed)
        theirs.set_dtype(mx.float32)
        load_adapters(theirs, str(tmp_path / "a"))
        theirs.eval()
    assert off(np.array(theirs(IDS)[0]), expected) < 1e-3


def test_mlx_lm_adapters_are_read(base, tmp_path):
    """Written by its own layers, with its own config: keys None, no base named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("mlx_lm.utils")
        from mlx_lm.tuner.utils import linear_to_lora_layers

        theirs, _ = utils.load_model(base)
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0}
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, parameters)
    rng = np.random.default_rng(0)
    weights = {}
    for name, array in tree_flatten(theirs.trainable_parameters()):
        weights[name] = mx.array((0.2 * rng.standard_normal(array.shape)).astype(np.float32))
    theirs.load_weights(list(weights.items()), strict=False)
    theirs.eval()
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "somewhere"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    expected = np.array(theirs(IDS)[0])
    assert off(expected, logits(read_model(base))) > 0.5
    assert off(logits(load(str(base), adapter=str(tmp_path / "a"))[0]), expected) < 1e-3


def test_another_base_is_refused(base, packed, tmp_path):
    make_adapter(base, tmp_path / "a")
    with pytest.raises(AdapterError, match=rf"was trained on {base} .*this is {packed}.*with model=NAME"):
        load(str(packed), adapter=tmp_path / "a")
    other = make_directory(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="was trained on"):
        load(str(other), adapter=tmp_path / "a")
    moved = copy_of(base, tmp_path / "moved")
    assert load(str(moved), adapter=tmp_path / "a")


def test_fingerprint_is_of_weights_not_of_files(base, tmp_path):
    expected = fingerprint(find_weights(base))
    again = copy_of(base, tmp_path / "shards")
    arrays = mx.load(str(again / "model.safetensors"))
    mx.eval(arrays)
    (again / "model.safetensors").unlink()
    names = sorted(arrays)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, own in parts.items():
        mx.save_safetensors(str(again / file), {name: arrays[name] for name in own})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (again / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(find_weights(again)) == expected
    changed = copy_of(base, tmp_path / "changed")
    arrays["model.layers.1.mlp.down_proj.weight"] = arrays["model.layers.1.mlp.down_proj.weight"] * 1.001
    mx.save_safetensors(str(changed / "model.safetensors"), arrays)
    assert fingerprint(find_weights(changed)) != expected


def test_several_are_weighted_and_switched(base, tmp_path):
    """Without reading the base again; weights count the change, so 0 is the base and 1 the adapter."""
    one = make_adapter(base, tmp_path / "one", targets=("o_proj",), strength=0.1)
    two = make_adapter(base, tmp_path / "two", targets=("o_proj", "down_proj"), dora=True, seed=1, strength=0.1)
    model = read_model(base)
    plain = logits(model)
    adapters = Adapters(model, base_of(base, "base"))
    adapters.load("one", tmp_path / "one")
    adapters.load("two", tmp_path / "two")
    assert off(logits(model), plain) < 1e-5
    for name, expected in (("one", one), ("two", two), ("one", one)):
        adapters.use(name)
        assert off(logits(model), expected) < 1e-3
    adapters.use({"one": 0.5, "two": 0.25})
    mixed = logits(model)
    assert min(off(mixed, other) for other in (plain, one, two)) > 0.01
    assert (
        off(logits(load(str(base), adapter={str(tmp_path / "one"): 0.5, str(tmp_path / "two"): 0.25})[0]), mixed) < 1e-4
    )
    layer = model.layers[0].self_attn.o_proj
    x = mx.random.normal((1, 4, 64), key=mx.random.key(0))
    y = layer.linear(x)
    half = (
        layer.adapters["one"].delta(x, y, layer.linear) * 0.5 + layer.adapters["two"].delta(x, y, layer.linear) * 0.25
    )
    assert mx.allclose(layer(x), y + half, atol=1e-5)
    adapters.use(None)
    assert off(logits(model), plain) < 1e-5
    adapters.use("two")
    adapters.remove("two")
    assert off(logits(model), plain) < 1e-5
    adapters.remove("one")
    assert not [name for name, _ in tree_flatten(model.parameters()) if "lora" in name]
    with pytest.raises(OptionError, match="no adapter 'two' is loaded"):
        adapters.use("two")


def test_damaged_folders_are_refused(base, tmp_path):
    for fault, match in (
        ("config", "no adapter_config.json"),
        ("weights", "no adapters.safetensors"),
        ("cut", "cut short|where its header promises"),
        ("json", "not valid JSON"),
        ("scale", r"lora_parameters.scale is missing, expected a number"),
        ("shape", "the layer turns 64 into"),
        ("name", "which this model does not have"),
        ("half", "has no lora_b"),
    ):
        folder = tmp_path / fault
        make_adapter(base, folder, targets=("o_proj",))
        config, weights = folder / "adapter_config.json", folder / "adapters.safetensors"
        arrays = mx.load(str(weights))
        mx.eval(arrays)
        name = "model.layers.1.self_attn.o_proj"
        if fault == "config":
            config.unlink()
        elif fault == "weights":
            weights.unlink()
        elif fault == "cut":
            weights.write_bytes(weights.read_bytes()[:-4])
        elif fault == "json":
            config.write_text("{")
        elif fault == "scale":
            config.write_text(json.dumps({**json.loads(config.read_text()), "lora_parameters": {}}))
        elif fault == "shape":
            arrays[f"{name}.lora_a"] = mx.zeros((65, 3))
        elif fault == "name":
            arrays["model.layers.9.self_attn.o_proj.lora_a"] = arrays[f"{name}.lora_a"]
        elif fault == "half":
            del arrays[f"{name}.lora_b"]
        if fault in ("shape", "name", "half"):
            mx.save_safetensors(str(weights), arrays)
        with pytest.raises(AdapterError, match=match):
            load(str(base), adapter=folder)


# PEFT


def torch_model(directory):
    """transformers' model with the weights of a directory, and the module."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch, oracle.make_torch(RAW, read_model(directory))


def torch_logits(torch, model):
    with torch.no_grad():
        return model(torch.tensor(np.array(IDS).astype(np.int64)), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("kind", list(KINDS))
def test_exported_adapter_gives_the_same_logits_in_peft(kind, base, tmp_path):
    """Fused layers, as transformers' Phi-3 has them."""
    expected = make_adapter(base, tmp_path / "a", **KINDS[kind])
    export_peft(tmp_path / "a", tmp_path / "peft")
    torch, model = torch_model(base)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    assert off(torch_logits(torch, model), expected) < 1e-3


@pytest.mark.parametrize("kind", list(KINDS))
def test_split_export_comes_back_as_it_was(kind, base, tmp_path):
    expected = make_adapter(base, tmp_path / "a", **KINDS[kind])
    export_peft(tmp_path / "a", tmp_path / "peft", split=True)
    tensors = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in tensors)
    if kind == "parts":  # k was not adapted, and q's components do not carry v's
        assert not any("k_proj" in name for name in tensors)
        assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (3, 64)
    import_peft(tmp_path / "peft", tmp_path / "b", str(base))
    assert off(logits(load(str(base), adapter=tmp_path / "b")[0]), expected) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.self_attn.qkv_proj": 3}},
    ],
)
def test_imported_adapter_gives_pefts_logits(options, base, tmp_path):
    """One that peft itself has made and saved."""
    torch, model = torch_model(base)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, **options)
        model = peft.get_peft_model(model, config).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(str(tmp_path / "peft"))
    expected = torch_logits(torch, model)
    assert import_peft(tmp_path / "peft", tmp_path / "a", str(base)) == 12
    assert off(logits(load(str(base), adapter=tmp_path / "a")[0]), expected) < 1e-3
    assert off(expected, logits(read_model(base))) > 0.5


def test_an_adapter_folder_appears_with_all_its_files(base, tmp_path, monkeypatch):
    """An export or import that breaks off leaves nothing, neither half a folder nor a hidden one."""
    make_adapter(base, tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    kept = sorted(os.listdir(tmp_path))
    works = (
        (lambda place: export_peft(tmp_path / "adapter", place), tmp_path / "out"),
        (lambda place: import_peft(tmp_path / "peft", place, str(base)), tmp_path / "out"),
    )

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync, seen = os.fsync, []

    def synced(descriptor):
        seen.append(os.path.lexists(tmp_path / "out"))
        return fsync(descriptor)

    for work, place in works:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "save_safetensors", full)
            with pytest.raises(AdapterError, match=r"No space left on device.*free some space"):
                work(place)
        assert sorted(os.listdir(tmp_path)) == kept
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", synced)
            seen.clear()
            work(place)
            assert seen[:2] == [False, False]  # both files are on the disk before the folder is there
        assert len(os.listdir(place)) == 2
        shutil.rmtree(place)
        place.mkdir()
        work(place)  # an empty folder may be filled
        with pytest.raises(AdapterError, match="exists already; name another directory"):
            work(place)
        shutil.rmtree(place)


def test_split_projections_are_joined_exactly(base, tmp_path):
    """Different ranks for q, v and gate; what is not adapted (k, up) stays; against the weights written out."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    rows = {"q_proj": (0, 64, 2), "v_proj": (96, 128, 4), "gate_proj": (0, 96, 3)}
    tensors, expected = {}, read_model(base)
    for part, (first, end, rank) in rows.items():
        home, fused = ("mlp", "gate_up_proj") if "gate" in part else ("self_attn", "qkv_proj")
        a, b = draw(rank, 64), draw(end - first, rank)
        stem = f"base_model.model.model.layers.1.{home}.{part}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = mx.array(a), mx.array(b)
        layer = expected.layers[1][home][fused]
        weight = np.array(layer.weight)
        weight[first:end] += 12 / rank * (b @ a)
        layer.weight = mx.array(weight)
    (tmp_path / "peft").mkdir()
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 12, "rank_pattern": {"v_proj": 4, "gate_proj": 3}}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    import_peft(tmp_path / "peft", tmp_path / "a", str(base))
    assert off(logits(load(str(base), adapter=tmp_path / "a")[0]), logits(expected)) < 1e-3


def test_what_peft_has_and_we_do_not_is_refused(base, tmp_path):
    make_adapter(base, tmp_path / "a", targets=("o_proj",))
    export_peft(tmp_path / "a", tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    original = json.loads(config.read_text())
    changes = {"peft_type": "IA3", "bias": "all", "modules_to_save": ["lm_head"], "lora_bias": True}
    for n, (key, value) in enumerate(changes.items()):
        config.write_text(json.dumps({**original, key: value}))
        with pytest.raises(AdapterError, match=f"{key} is "):
            import_peft(tmp_path / "peft", tmp_path / f"b{n}", str(base))
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        import_peft(tmp_path, tmp_path / "c", str(base))
    with pytest.raises(AdapterError, match="adapter import"):
        load(str(base), adapter=tmp_path / "peft")


# Fusing


@pytest.mark.parametrize("kind", ["lora", "dora", "parts"])
def test_fused_floats_are_the_adapted_model(kind, base, packed, tmp_path):
    for n, directory in enumerate((base, packed)):
        expected = make_adapter(directory, tmp_path / f"a{n}", **KINDS[kind])
        done = fuse(tmp_path / f"a{n}", tmp_path / f"m{n}", dequantize=bool(n), dtype="float32")
        assert done.survived is None
        model = read_model(tmp_path / f"m{n}")
        assert model.config.quantization is None
        assert off(logits(model), expected) < 1e-3
    done = fuse(tmp_path / "a0", tmp_path / "half", dtype="bfloat16")
    stored = mx.load(str(done.path / "model.safetensors"))
    exact = mx.load(str(tmp_path / "m0" / "model.safetensors"))
    assert all(mx.array_equal(stored[name], exact[name].astype(mx.bfloat16)) for name in exact)
    assert load(str(done.path))


def test_fused_into_4_bits_says_what_is_left(packed, tmp_path):
    """A small change is rounded away, and the figure says so; 8 bits for the changed layers keep it."""
    adapted = make_adapter(packed, tmp_path / "a", strength=0.05)
    plain = logits(read_model(packed))
    rounded = fuse(tmp_path / "a", tmp_path / "four")
    kept = fuse(tmp_path / "a", tmp_path / "eight", bits=8)
    assert rounded.survived < 0.5 < 0.9 < kept.survived <= 1
    four, eight = logits(read_model(tmp_path / "four")), logits(read_model(tmp_path / "eight"))
    effect = np.square(adapted - plain).sum()
    assert np.square(eight - adapted).sum() < 0.1 * effect
    assert np.square(four - adapted).sum() > 0.3 * effect
    # What the adapter does not touch is copied to the bit.
    before, after = mx.load(str(packed / "model.safetensors")), mx.load(str(tmp_path / "four" / "model.safetensors"))
    assert mx.array_equal(before["lm_head.weight"], after["lm_head.weight"])
    assert json.loads((tmp_path / "eight" / "config.json").read_text())["quantization"]["bits"] == 4


@pytest.mark.parametrize("strength", long_after(1, [0.01, 0.05]))
def test_gptq_keeps_what_rounding_loses_of_an_adapter(packed, tmp_path, strength):
    """At the same bits, on a text that it did not read; and what the adapter leaves alone stays to the bit."""
    make_adapter(packed, tmp_path / "a", strength=strength)
    rounded = fuse(tmp_path / "a", tmp_path / "rounded")
    fitted = fuse(tmp_path / "a", tmp_path / "fitted", method="gptq", calibration=bundled("calibration")[:4000])
    assert rounded.survived < -0.5
    # A start from the codes of the base loses no more than the adapter itself, but for what the text does not show.
    assert fitted.survived > max(-0.15, rounded.survived + 0.4)
    adapted, tokenizer = load(str(packed), adapter=tmp_path / "a")
    ids = mx.array([tokenizer.encode(bundled("sample"))[:256]])  # ten random tokens say little of either
    lost = [
        np.square(np.array(read_model(tmp_path / name)(ids) - adapted(ids))).sum() for name in ("rounded", "fitted")
    ]
    assert lost[1] < 0.7 * lost[0]  # 0.02 to 0.5 with adapters and models of five seeds
    assert (tmp_path / "fitted" / "config.json").read_bytes() == (tmp_path / "rounded" / "config.json").read_bytes()
    before, after = (mx.load(str(path / "model.safetensors")) for path in (packed, tmp_path / "fitted"))
    assert before.keys() == after.keys()
    changed = {name.rsplit(".", 1)[0] for name in before if not mx.array_equal(before[name], after[name])}
    assert changed
    assert changed <= {name.rsplit(".", 1)[0] for name in mx.load(str(tmp_path / "a" / "adapters.safetensors"))}


@pytest.mark.long
def test_distilling_a_fusion_goes_on_where_it_was_cut(packed, tmp_path, monkeypatch):
    """With a text that the model with the adapter writes; every layer is trained, and the best state is kept."""
    monkeypatch.setattr(own_text, "OWN_TOKENS", 1024)
    make_adapter(packed, tmp_path / "a", strength=0.05)

    def cut(now):
        if (now.stage, now.done) == ("distilling", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(tmp_path / "a", tmp_path / "m", method="distill", calibration="self", progress=cut)
    assert (tmp_path / "m.unfinished" / "packed").is_dir()
    stages = []
    made = fuse(
        tmp_path / "a",
        tmp_path / "m",
        method="distill",
        calibration="self",
        progress=lambda now: stages.append(now.stage),
    )
    assert {*stages} == {"distilling", "writing"}
    assert not (tmp_path / "m.unfinished").exists()
    assert made.gain.held_after <= made.gain.held_before
    assert not made.seen
    assert made.survived > fuse(tmp_path / "a", tmp_path / "n").survived


def test_a_fusion_that_takes_a_text_is_planned(packed, tmp_path, monkeypatch):
    make_adapter(packed, tmp_path / "a")
    rooms = []
    monkeypatch.setattr(plan, "check_room", lambda what, parts, way: rooms.append(what.split()[0]))
    monkeypatch.setattr(fusing, "Effect", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        fuse(tmp_path / "a", tmp_path / "m", method="distill", calibration="self")
    assert rooms == ["measuring", "letting", "training"]
    assert not (tmp_path / "m").exists()


def test_a_fusion_says_where_its_measure_is_its_text(packed, tmp_path):
    make_adapter(packed, tmp_path / "a", targets=("o_proj",))
    text = bundled("calibration")[:3000]
    assert fuse(tmp_path / "a", tmp_path / "m", method="gptq", calibration=text, text=text[500:900]).seen
    assert not fuse(tmp_path / "a", tmp_path / "n", text=text).seen


@pytest.mark.parametrize(("place", "what"), [("base", "model"), ("a", "adapter"), (".", "adapter")])
def test_a_fusion_does_not_replace_what_it_reads(base, tmp_path, place, what):
    shutil.copytree(base, tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "a", targets=("o_proj",))
    for other in (tmp_path, tmp_path / "a"):
        (other / "config.json").write_text("{}")  # as of a model, which force replaces
    with pytest.raises(OptionError, match=f"is, or holds, the {what} that is read; name another directory"):
        fuse(tmp_path / "a", tmp_path / place, force=True)
    assert (tmp_path / "base" / "model.safetensors").exists()
    assert (tmp_path / "a" / "adapters.safetensors").exists()


def test_an_empty_name_of_a_text_is_not_ignored(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fuse", "--adapter", str(tmp_path), "-o", str(tmp_path / "m"), "--text", ""])
    assert done.value.code == 1
    assert "'' cannot be read" in capsys.readouterr().err


def test_fuse_refuses_what_makes_no_sense(base, packed, tmp_path):
    make_adapter(base, tmp_path / "a", targets=("o_proj",))
    with pytest.raises(AdapterError, match="was trained on"):
        fuse(tmp_path / "a", tmp_path / "m", model=str(packed))
    with pytest.raises(OptionError, match="bits is for packed models"):
        fuse(tmp_path / "a", tmp_path / "m", bits=8)
    with pytest.raises(OptionError, match="text has no effect where nothing is packed"):
        fuse(tmp_path / "a", tmp_path / "m", text="a text")
    with pytest.raises(OptionError, match="method='gptq' has no effect where nothing is packed"):
        fuse(tmp_path / "a", tmp_path / "m", method="gptq")
    with pytest.raises(OptionError, match="calibration has no effect without method=gptq"):
        fuse(tmp_path / "a", tmp_path / "m", calibration="text")
    with pytest.raises(OptionError, match="'awq' is unknown"):
        fuse(tmp_path / "a", tmp_path / "m", method="awq")
    with pytest.raises(OptionError, match="text is empty; give some"):
        fuse(tmp_path / "a", tmp_path / "m", text=" \n")
    make_adapter(packed, tmp_path / "b", targets=("o_proj",))
    with pytest.raises(OptionError, match="dequantize=True"):
        fuse(tmp_path / "b", tmp_path / "m", dtype="bfloat16")
    assert not (tmp_path / "m").exists()
