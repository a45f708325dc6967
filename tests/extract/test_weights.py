"""Checkpoints: found, read, complete or an error, digested by content. No network."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ctfm.extract.network_part import Signature
from ctfm.extract.weight_files import files_beside, weight_files
from ctfm.extract.weights import (
    check_complete,
    digest_tensors,
    load_completely,
    read_kept,
    read_network,
    read_tensors,
)
from ctfm.store.errors import BackboneError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"weight": torch.randn(3, 5), "bias": torch.randn(3)}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    shard_of = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        shard_of[name] = f"model-{index}.safetensors"
        save_file({name: tensor}, folder / shard_of[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


def test_a_file_is_itself_and_a_folder_is_its_only_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    file = tmp_path / "any name.safetensors"
    save_file(tensors, file)
    assert weight_files(file) == [file]
    assert weight_files(tmp_path) == [file]


@pytest.mark.parametrize(
    "other",
    [
        *("model_1.safetensors", "ema_model.safetensors", "model_ema.pt", "best.safetensors"),
        *("last.ckpt", "model_best.pth", "model.pt", "model-00001-of-00002.safetensors"),
    ],
)
def test_another_checkpoint_beside_model_safetensors_is_not_passed_over(
    tmp_path: Path, tensors: dict[str, Tensor], other: str
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(
        BackboneError, match=rf"2 checkpoints \(.*{re.escape(other)}.*name the file"
    ):
        read_network(tmp_path, Signature(mark=re.compile("weight")))
    usual = tmp_path / "model.safetensors"
    assert weight_files(tmp_path, published=True) == [usual]
    assert other in " ".join(files_beside(tmp_path, [usual]))


@pytest.mark.parametrize(
    "other",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors"],
)
def test_the_same_network_in_another_format_is_passed_over_and_said(
    tmp_path: Path, tensors: dict[str, Tensor], other: str
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / other).write_bytes(b"")
    (tmp_path / "optimizer.bin").write_bytes(b"")
    found = read_network(tmp_path, Signature(mark=re.compile("weight")))
    assert found.remarks == (f"read: model.safetensors; not read, beside it: {other}",)


def test_an_adapter_beside_whole_weights_is_said(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (remark,) = read_network(tmp_path, Signature(mark=re.compile("weight"))).remarks
    assert "not merged: the adapter beside model.safetensors" in remark


def test_a_file_beside_shards_is_not_passed_over(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write_shards(tmp_path, tensors)
    save_file(tensors, tmp_path / "ema.safetensors")
    with pytest.raises(BackboneError, match="ema"):
        read_network(tmp_path, Signature(mark=re.compile("weight")))


def test_a_snapshot_of_the_hub_has_its_usual_file(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """As microsoft/rad-dino has it."""
    folder = tmp_path / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    for name in ("model", "dino_head", "backbone_compatible"):
        save_file(tensors, folder / f"{name}.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex64]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_rounded_numbers_are_no_weights(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, suffix: str
) -> None:
    held = {**tensors, "weight": tensors["weight"].to(dtype)}
    file = tmp_path / f"model{suffix}"
    save_file(held, file) if suffix == ".safetensors" else torch.save(held, file)
    with pytest.raises(BackboneError, match=rf"\(weight\) are of {dtype}: quantised"):
        read_network(file, Signature(mark=re.compile("bias")))


def test_whole_numbers_that_count_or_index_are_read(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    more = {
        "bn.num_batches_tracked": torch.tensor(3),
        "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "attn.attention_bias_idxs": torch.zeros(4, 4, dtype=torch.int64),
        "embeddings.position_ids": torch.zeros(1, 4, dtype=torch.int64),
    }
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    assert read_network(tmp_path, Signature(mark=re.compile("bias"))).tensors.keys() > more.keys()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["mlp.fc1.weight_orig", "mlp.fc1.weight_mask"], "pruned"),
        (["mlp.fc1.weight_g", "mlp.fc1.weight_v"], "reparametrised by a norm"),
        (["mlp.fc1.parametrizations.weight.original0"], "reparametrised"),
        (["mlp.fc1.weight.quant_state.bitsandbytes__nf4"], "quantised"),
        (["mlp.fc1.weight_packed", "mlp.fc1.weight_scale"], "quantised"),
        (["mlp.fc1.scale", "mlp.fc1.zero_point"], "quantised"),
        (["_flat_param"], "flat ones of FSDP"),
    ],
)
def test_what_is_left_of_weights_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], names: list[str], says: str
) -> None:
    more = {name: torch.ones(3) for name in names}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=says):
        read_network(tmp_path, Signature(mark=re.compile("bias")))


def test_empty_placeholders_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({**tensors, "weight": torch.empty(0)}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"1 empty tensors \(weight\), as ZeRO-3"):
        read_network(tmp_path, Signature(mark=re.compile("bias")))


def test_shards_give_the_tensors_of_the_whole(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(tmp_path, tensors)
    read = read_tensors(weight_files(tmp_path))
    assert read.keys() == tensors.keys() == read_kept(weight_files(tmp_path)).keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_missing_shard_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(tmp_path, tensors)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"lacks 1 of the 2 shards.*model-1.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}', "{}"])
def test_an_index_that_is_none_is_said_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BackboneError, match="is no index of shards"):
        weight_files(tmp_path)


def test_two_checkpoints_in_a_folder_are_not_guessed_between(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(BackboneError, match=r"2 checkpoints \(a.safetensors, b.safetensors\)"):
        weight_files(tmp_path)


def test_nothing_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no checkpoint in .*safetensors"):
        weight_files(tmp_path)
    with pytest.raises(BackboneError, match="no weights at"):
        weight_files(tmp_path / "absent")


def test_what_torch_saved_gives_its_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files = weight_files(tmp_path)
    assert digest_tensors(read_tensors(files)) == digest_tensors(tensors)
    assert read_kept(files).keys() == tensors.keys()


def test_safetensors_come_before_what_torch_saved(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_shards_that_torch_saved_give_the_tensors_of_the_whole(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    for name, tensor in tensors.items():
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{name}.bin")
    index = {"weight_map": {name: f"pytorch_model-{name}.bin" for name in tensors}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert digest_tensors(read_tensors(weight_files(tmp_path))) == digest_tensors(tensors)
    part = Signature(mark=re.compile("ight"), belongs=re.compile("we"))
    assert read_network(tmp_path, part).tensors.keys() == {"ight"}


def test_safetensors_are_read_whatever_they_are_called(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    file = tmp_path / "medimageinsight.pt"
    save_file(tensors, file)
    assert read_tensors([file]).keys() == tensors.keys()


def test_a_truncated_file_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(BackboneError, match="not a whole safetensors file"):
        read_tensors([file])
    file.write_bytes(b"")
    with pytest.raises(BackboneError, match="not a whole safetensors file"):
        read_tensors([file])


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"bias": tensors["bias"]}, tmp_path / "b.safetensors")
    with pytest.raises(BackboneError, match="repeats bias"):
        read_tensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_every_fault_is_named_with_counts(tensors: dict[str, Tensor]) -> None:
    expected = {"weight": torch.empty(3, 4), "bias": tensors["bias"], "scale": torch.empty(1)}
    found = {**tensors, "head.weight": torch.empty(2)}
    with pytest.raises(BackboneError) as caught:
        check_complete(found, expected, source="file as toy")
    message = str(caught.value)
    assert "file as toy" in message
    assert "3 tensors expected" in message
    assert "1 missing (scale)" in message
    assert "1 unexpected (head.weight)" in message
    assert "1 of another shape (weight)" in message


def test_many_names_are_cut_short() -> None:
    expected = {f"t{index}": torch.empty(1) for index in range(9)}
    with pytest.raises(BackboneError, match=r"9 missing \(t0, t1, t2 and 6 more\)"):
        check_complete({}, expected, source="file")


def test_a_module_is_loaded_in_float32_off_the_meta_device(tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        module = nn.Linear(5, 3)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    load_completely(module, halves, source="file")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, halves["weight"].float())


def test_a_module_is_left_alone_when_a_tensor_is_missing(tensors: dict[str, Tensor]) -> None:
    module = nn.Linear(5, 3)
    before = module.weight.detach().clone()
    with pytest.raises(BackboneError, match="1 missing"):
        load_completely(module, {"weight": tensors["weight"]}, source="file")
    assert torch.equal(module.weight, before)


def test_the_digest_is_of_content_not_of_layout(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_shards(tmp_path, tensors)
    whole = tmp_path / "whole" / "model.safetensors"
    whole.parent.mkdir()
    save_file(dict(reversed(tensors.items())), whole, metadata={"format": "pt"})
    digest = digest_tensors(tensors)
    assert digest_tensors(read_tensors(weight_files(tmp_path))) == digest
    assert digest_tensors(read_tensors([whole])) == digest


def test_the_digest_tells_names_types_shapes_and_values(tensors: dict[str, Tensor]) -> None:
    weight, bias = tensors["weight"], tensors["bias"]
    variants = [
        tensors,
        {"other": weight, "bias": bias},
        {"weight": weight.view(5, 3), "bias": bias},
        {"weight": weight.view(torch.int32), "bias": bias},
        {"weight": weight + 1e-3, "bias": bias},
        {"weight": weight.bfloat16(), "bias": bias},
        {"weight": weight},
    ]
    assert len({digest_tensors(variant) for variant in variants}) == len(variants)
