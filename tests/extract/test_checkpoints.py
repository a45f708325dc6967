"""What a file is, by its content; and that nothing in one runs as it is read."""

import argparse
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ctfm.extract.checkpoints import Kind, kind_of, read_saved_tensors
from ctfm.extract.weights import read_kept, read_tensors
from ctfm.store.errors import BackboneError

TENSORS = {"weight": torch.arange(15.0).reshape(3, 5), "bias": torch.ones(3)}


class Program(nn.Module):
    """Anything that can be compiled."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))


def save_script(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Program()).save(file)  # type: ignore[no-untyped-call]


def save_exported(file: Path) -> None:
    torch.export.save(torch.export.export(Program(), (torch.zeros(2, 3, 4, 5),)), file)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.proof),)


SAVED: dict[Kind, Callable[[Path], object]] = {
    "safetensors": lambda file: save_file(TENSORS, file),
    "torch.save": lambda file: torch.save(TENSORS, file),
    "old pickle": lambda file: torch.save(TENSORS, file, _use_new_zipfile_serialization=False),
    "TorchScript": save_script,
    "exported program": save_exported,
    "none": lambda file: file.write_bytes(b"PK\x03\x04 and nothing that follows"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_file_is_what_is_in_it_whatever_it_is_called(tmp_path: Path, kind: Kind) -> None:
    SAVED[kind](tmp_path / "weights.pt2")
    assert kind_of(tmp_path / "weights.pt2") == kind


@pytest.mark.parametrize("wrapper", ["", "state_dict.", "any.name."])
def test_tensors_are_found_beside_what_training_code_puts_there(
    tmp_path: Path, wrapper: str
) -> None:
    held: dict[str, object] = {**TENSORS}
    for name in reversed(wrapper.split(".")[:-1]):
        held = {name: held, "epoch": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save(held, tmp_path / "a.pth")
    read = read_saved_tensors(tmp_path / "a.pth")
    assert read.keys() == {wrapper + name for name in TENSORS}
    assert all(torch.equal(read[wrapper + name], TENSORS[name]) for name in TENSORS)


def test_two_tensors_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    torch.save({"a": TENSORS, "a.bias": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match=r"two tensors as a\.bias"):
        read_saved_tensors(tmp_path / "a.pth")


def test_a_mapping_that_holds_itself_is_followed_to_an_end(tmp_path: Path) -> None:
    held: dict[str, object] = {**TENSORS}
    held["again"] = held
    torch.save(held, tmp_path / "a.pth")
    assert read_saved_tensors(tmp_path / "a.pth").keys() >= TENSORS.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    file, proof = tmp_path / "model.bin", tmp_path / "ran"
    held = {**TENSORS, "more": Runs(proof)}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BackboneError, match="safetensors"):
        read_tensors([file])
    with pytest.raises(BackboneError):
        read_kept([file])
    assert not proof.exists()
    torch.load(file, weights_only=False)  # it would have
    assert proof.exists()


def test_what_is_more_than_tensors_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match=r"more than tensors \(argparse.Namespace\)"):
        read_saved_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("held", [{"a": 3}, [1], {"model": {"a": "b"}}, {}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match="is not a state dict"):
        read_saved_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cpu"])
def test_a_torch_that_cannot_do_it_safely_is_not_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch.save(TENSORS, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(BackboneError, match=r"CVE-2026-24747.*install torch 2\.10 or newer"):
        read_saved_tensors(tmp_path / "a.pth")


def test_a_damaged_file_is_said_so(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save(TENSORS, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(damaged, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            target.writestr(
                record.filename, content[:9] if "data.pkl" in record.filename else content
            )
    with pytest.raises(BackboneError, match="is damaged and is refused"):
        read_saved_tensors(damaged)


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", bytes(10_000_000))
    assert kind_of(tmp_path / "a.pth") == "none"
    with pytest.raises(BackboneError, match="not a whole safetensors file"):
        read_tensors([tmp_path / "a.pth"])


@pytest.mark.parametrize("kind", ["TorchScript", "exported program"])
def test_a_program_is_not_taken_for_weights(tmp_path: Path, kind: Kind) -> None:
    SAVED[kind](tmp_path / "model.pt")
    with pytest.raises(BackboneError, match=rf"a program \({kind}\).*pass it as `--model`"):
        read_tensors([tmp_path / "model.pt"])
