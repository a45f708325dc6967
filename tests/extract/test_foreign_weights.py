"""Folders and files that hold no checkpoint that can be read: each is named, with what to do."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctfm.extract.weight_files import weight_files
from ctfm.extract.weights import digest_tensors, read_tensors
from ctfm.store.errors import BackboneError

TENSORS = {"weight": torch.arange(15.0).reshape(3, 5), "bias": torch.ones(3)}


def folder_of(files: Sequence[str], folder: Path) -> Path:
    """A folder with these files, empty ones."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["__0_0.distcp", "__1_0.distcp", ".metadata"], r"dcp_to_torch FOLDER"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"], r"holds checkpoints in pytorch_m"),
        (["zero_to_fp32.py", "latest", "global_step9/mp_rank_00_model_states.pt"], r"zero_to_fp32"),
        (
            [
                "zero_pp_rank_0_mp_rank_00_model_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            ],
            r"holds 2 checkpoints.*zero_to_fp32\.py",
        ),
        (
            ["checkpoint-100/model.safetensors", "checkpoint-20/model.safetensors", "trainer.json"],
            r"holds checkpoints in checkpoint-20, checkpoint-100: pass one",
        ),
        (["checkpoint-20/optimizer.pt"], "give the .safetensors file or its folder"),
        (["last.ckpt", "best.ckpt"], r"2 checkpoints \(best\.ckpt, last\.ckpt\): name the file"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint"], "of TensorFlow"),
        (["epoch=1.ckpt/__0_0.distcp", "epoch=1.ckpt/.metadata"], r"checkpoints in epoch=1\.ckpt"),
        (["tf_model.h5", "config.json"], "of TensorFlow"),
        (["flax_model.msgpack"], "of Flax"),
        (["model.onnx"], "an ONNX graph"),
        (["weights.npz"], "an archive of NumPy"),
        (["model-Q4_K_M.gguf"], "of llama.cpp"),
        (["adapter_config.json", "adapter_model.safetensors"], r"adapter: pass it with --adapter"),
        (["adapter_model.bin"], r"adapter: pass it with --adapter"),
        (["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"], "no checkpoint"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            r"lacks 1 of the 3 shards.*model-00002-of-00003",
        ),
        (["model-00001-of-00002.safetensors"], r"lacks 1 of the 2 shards"),
    ],
)
def test_a_folder_without_one_checkpoint_says_what_it_holds(
    tmp_path: Path, files: list[str], says: str
) -> None:
    with pytest.raises(BackboneError, match=says):
        weight_files(folder_of(files, tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("__0_0.distcp", "dcp_to_torch"),
        (".metadata", "dcp_to_torch"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32"),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_to_fp32"),
        ("model.ckpt.data-00000-of-00001", "of TensorFlow"),
        ("adapter_model.safetensors", "--adapter"),
    ],
)
def test_a_file_whose_name_tells_is_named(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(BackboneError, match=says):
        weight_files(folder_of([name], tmp_path) / name)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n", "TensorFlow or Keras"),
        (b"GGUF\x03\x00", "llama.cpp"),
    ],
)
def test_a_file_whose_first_bytes_tell_is_named(tmp_path: Path, start: bytes, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(BackboneError, match=says):
        read_tensors([tmp_path / "model.safetensors"])


def test_a_distributed_checkpoint_becomes_one_by_the_command_that_is_named(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save(dict(TENSORS), checkpoint_id=tmp_path / "parts")
        with pytest.raises(BackboneError, match=r"distributed\.checkpoint\.format_utils"):
            weight_files(tmp_path / "parts")
        dcp_to_torch_save(tmp_path / "parts", tmp_path / "model.pt")
    assert digest_tensors(read_tensors([tmp_path / "model.pt"])) == digest_tensors(TENSORS)


def test_what_lies_beside_a_checkpoint_is_not_taken_for_another(tmp_path: Path) -> None:
    """As accelerate and transformers' Trainer leave it."""
    files = ["optimizer.bin", "scheduler.bin", "training_args.bin", "optimizer_1.bin"]
    folder_of([*files, "checkpoint-10/model.safetensors"], tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model_fsdp.bin")
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model_fsdp.bin"]


def test_one_lightning_checkpoint_in_a_folder_is_taken(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "epoch=3-step=40.ckpt")
    assert weight_files(tmp_path) == [tmp_path / "epoch=3-step=40.ckpt"]


def test_shards_that_are_all_there_need_no_index(tmp_path: Path) -> None:
    for i, (name, tensor) in enumerate(TENSORS.items(), start=1):
        save_file({name: tensor}, tmp_path / f"model-{i:05d}-of-00002.safetensors")
    assert digest_tensors(read_tensors(weight_files(tmp_path))) == digest_tensors(TENSORS)


def test_shards_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    folder_of(["a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"], tmp_path)
    with pytest.raises(BackboneError, match="2 checkpoints"):
        weight_files(tmp_path)
