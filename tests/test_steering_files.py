"""Steering vectors in files: safetensors and llama.cpp's control vectors, both ways; and everything refused."""

import mlx.core as mx
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf_samples import write_gguf  # noqa: E402

from phi3_mlx import export_gguf, load_steering, save_steering  # noqa: E402
from phi3_mlx.errors import CheckpointError, OptionError  # noqa: E402
from phi3_mlx.store.safetensors import Tensor, header_of  # noqa: E402

VECTORS = {layer: mx.array(np.random.default_rng(layer).standard_normal(64).astype(np.float32)) for layer in (1, 3, 12)}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.array(a[layer]), np.array(b[layer])) for layer in a)


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_vectors_come_back_as_they_were(ending, tmp_path):
    path = save_steering(VECTORS, tmp_path / f"my feelings.{ending}")
    assert same(load_steering(path), VECTORS)
    halves = {layer: vector.astype(mx.bfloat16) for layer, vector in VECTORS.items()}
    save_steering(halves, path, force=True)
    assert same(load_steering(path), {layer: vector.astype(mx.float32) for layer, vector in halves.items()})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_librarys_reader_finds_what_llama_cpp_asks_for(tmp_path):
    reader = gguf.GGUFReader(save_steering(VECTORS, tmp_path / "x.gguf", model_type="phimoe"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "phimoe"
    assert reader.fields["controlvector.layer_count"].contents() == 3
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3", "direction.12"]
    for tensor, vector in zip(reader.tensors, VECTORS.values(), strict=True):
        assert tensor.tensor_type.name == "F32"
        assert np.array_equal(tensor.data, np.array(vector))


def test_a_file_that_llama_cpps_generator_wrote_is_read(tmp_path):
    metadata = {"controlvector.model_hint": "phi3", "controlvector.layer_count": 3}
    tensors = {f"direction.{layer}": np.array(vector) for layer, vector in VECTORS.items()}
    assert same(load_steering(write_gguf(tmp_path / "theirs.gguf", "controlvector", metadata, tensors)), VECTORS)


def test_layer_0_has_a_place_in_safetensors_alone(tmp_path):
    vectors = {0: mx.ones(8), 1: mx.zeros(8)}
    assert same(load_steering(save_steering(vectors, tmp_path / "x.safetensors")), vectors)
    with pytest.raises(OptionError, match="layer 0, for which"):
        save_steering(vectors, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ({}, "no dictionary of vectors"),
        ([mx.ones(8)], "no dictionary of vectors"),
        ({-1: mx.ones(8)}, "layer -1, expected a whole number"),
        ({True: mx.ones(8)}, "layer True"),
        ({"3": mx.ones(8)}, "layer '3'"),
        ({1: "text"}, "no array for layer 1"),
        ({1: mx.ones((2, 8))}, r"\(2, 8\) for layer 1"),
        ({1: mx.ones(0)}, r"\(0,\) for layer 1"),
        ({1: mx.array([1.0, mx.nan])}, "expected finite numbers"),
        ({1: mx.ones(8), 2: mx.ones(9)}, "different lengths"),
    ],
)
def test_what_is_no_vector_of_a_layer_is_refused(vectors, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        save_steering(vectors, tmp_path / "x.gguf")
    assert not [*tmp_path.iterdir()]


def test_places_are_checked_and_a_file_is_replaced_only_with_force(tmp_path):
    with pytest.raises(OptionError, match=r"neither \.safetensors nor \.gguf"):
        save_steering(VECTORS, tmp_path / "x.npz")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        save_steering(VECTORS, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_other_files_are_refused_by_name(tmp_path):
    model = export_gguf("tiny", tmp_path / "model.gguf").files[0]
    with pytest.raises(CheckpointError, match=r"model\.gguf holds no steering vectors.*architecture is 'phi3'"):
        load_steering(model)
    write_gguf(tmp_path / "odd.gguf", "controlvector", {}, {"direction.one": np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"it has direction\.one"):
        load_steering(tmp_path / "odd.gguf")
    mx.save_safetensors(str(tmp_path / "odd.safetensors"), {"direction.1": mx.ones((2, 2))})
    with pytest.raises(CheckpointError, match="no vectors of one length"):
        load_steering(tmp_path / "odd.safetensors")
    mx.save_safetensors(str(tmp_path / "odd.safetensors"), {"direction.1": mx.array([mx.inf])})
    with pytest.raises(CheckpointError, match="not finite"):
        load_steering(tmp_path / "odd.safetensors")
    header = header_of({"direction.1": Tensor("F8_E4M3FN", (8,), 8)}, {})
    (tmp_path / "odd.safetensors").write_bytes(header + bytes(8))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors cannot be read"):
        load_steering(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_damaged_files_are_refused(ending, tmp_path):
    whole = save_steering(VECTORS, tmp_path / f"x.{ending}").read_bytes()
    for size in (0, 3, 7, 20, len(whole) // 2, len(whole) - 33):
        (tmp_path / f"x.{ending}").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"x\.{ending}"):
            load_steering(tmp_path / f"x.{ending}")
    with pytest.raises(CheckpointError, match="nothing"):
        load_steering(tmp_path / f"nothing.{ending}")
