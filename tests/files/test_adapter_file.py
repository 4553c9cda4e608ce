"""AdapterFile: tensors read on demand, bad files, and the meaning of the keys in PEFT's files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter

from lora_ext.files.adapter_file import AdapterFile

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    peft_adapter(EveryLayer(), tmp_path / "adapter", **EVERY_LAYER)
    return tmp_path / "adapter"


def change_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_open_describes_the_file_and_reads_tensors_on_demand(directory: Path):
    expected = load_file(directory / "adapter_model.safetensors")
    file = AdapterFile.open(directory)
    assert file.config["r"] == 2
    assert file.metadata == {"format": "pt"}
    assert sorted(file.keys()) == sorted(expected)
    for key, tensor in expected.items():
        assert key in file
        assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)
    kept = file.tensor(key)
    file.release()
    assert torch.equal(kept, expected[key])
    assert torch.equal(file.tensor(key), expected[key])
    with pytest.raises(KeyError, match="has no tensor 'nothing'"):
        file.tensor("nothing")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_only_when_allowed(directory: Path, zipped: bool):
    expected = load_file(directory / "adapter_model.safetensors")
    torch.save(expected, directory / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is there: save it again as safetensors"):
        AdapterFile.open(directory)
    file = AdapterFile.open(directory, allow_pickle=True)
    assert sorted(file.keys()) == sorted(expected)
    for key, tensor in expected.items():
        assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)


def test_a_pickle_that_runs_code_is_refused(directory: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (directory / "ran",))

    (directory / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps(Evil(), protocol=2), b"", b"PK\x03\x04 not a zip"):
        (directory / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.bin is corrupted, or holds more than tensors"):
            AdapterFile.open(directory, allow_pickle=True)
    torch.save([torch.ones(1)], directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds a list, want a dict of tensors"):
        AdapterFile.open(directory, allow_pickle=True)
    assert not (directory / "ran").exists()


def test_a_pickle_of_unsuitable_content_is_refused(directory: Path):
    (directory / "adapter_model.safetensors").unlink()
    contents = {
        "a dict with an entry int: Tensor": {1: torch.ones(1)},
        "a dict with an entry str: int": {"a": 1},
        "'a' is torch.sparse_coo on cpu, want a dense tensor": {"a": torch.eye(2).to_sparse()},
        "'a' is torch.strided on meta, want a dense tensor": {"a": torch.ones(1, device="meta")},
        "'a' is quantized, want a dense tensor": {"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
        "has a name with characters that cannot be printed": {"a\nb": torch.ones(1)},
        "has a name of 501 characters": {"x" * 501: torch.ones(1)},
    }
    for message, content in contents.items():
        torch.save(content, directory / "adapter_model.bin")
        with pytest.raises(ValueError, match=message):
            AdapterFile.open(directory, allow_pickle=True)


def test_a_replaced_file_does_not_change_the_tensors(directory: Path):
    """After release() the new file is refused, not read."""
    expected = load_file(directory / "adapter_model.safetensors")
    file = AdapterFile.open(directory, mapped=True)
    change_tensors(directory, lambda tensors: {key: tensor + 1 for key, tensor in tensors.items()})
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in expected.items())
    file.tensors._read = 1 << 30
    file.release()
    with pytest.raises(ValueError, match="was changed while it was read"):
        file.tensor(next(iter(expected)))


@pytest.mark.parametrize("how", ["shorter", "overwritten", "replaced"])
def test_a_file_that_is_not_mapped_and_changes(directory: Path, how: str):
    """Read as a mapping, a file that became shorter would kill the process."""
    path = directory / "adapter_model.safetensors"
    expected, descriptors = load_file(path), len(os.listdir("/proc/self/fd"))
    expected = {key: tensor.clone() for key, tensor in expected.items()}
    file = AdapterFile.open(directory)
    first, *others = file.keys()
    assert torch.equal(file.tensor(first), expected[first])
    if how == "replaced":
        change_tensors(directory, lambda tensors: {key: tensor + 1 for key, tensor in tensors.items()})
        assert all(torch.equal(file.tensor(key), expected[key]) for key in others)
    else:
        content = path.read_bytes()
        with open(path, "r+b") as written:
            if how == "shorter":
                written.truncate(8)
            else:
                written.write(content)
        os.utime(path, ns=(0, 0))  # clocks of file systems tick slowly
        for key in others:
            with pytest.raises(ValueError, match="adapter_model.safetensors was changed while it was read"):
                file.tensor(key)
    del file
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_missing_files(directory: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"merge: .*none/adapter_config\.json is missing"):
        AdapterFile.open(tmp_path / "none", caller="merge")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing$"):
        AdapterFile.open(directory, allow_pickle=True)
