"""Models of many kinds, as a user types them: adapters, programs, weights of one's own."""

from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from commands import ctfm
from hf_folders import write_processor
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from ctfm.extract.densenet3d import DenseNet3d, DenseShape
from ctfm.extract.recorded import load_recorded
from ctfm.store.features import FeatureStore

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SCANS = 8


def typed(*arguments: str, cwd: Path, code: int = 0) -> str:
    """What a command printed, with its lines joined."""
    return " ".join(ctfm(*arguments, cwd=cwd, code=code).split())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue of a few small scans."""
    folder = tmp_path_factory.mktemp("project")
    size = ("--matrix", "64", "--slices", "9", "--workers", "0")
    typed("phantom", "--scans", str(SCANS), "--out", "cohort", *size, cwd=folder)
    typed("index", "cohort", "--workers", "1", cwd=folder)
    return folder


def extract(project: Path, *options: str, code: int = 0) -> str:
    return typed("extract", *options, "--workers", "0", cwd=project, code=code)


def rows(store: FeatureStore) -> torch.Tensor:
    return store.load()[0]


def test_several_adapters_fill_a_store_each_and_the_check_of_each_is_printed_and_kept(
    project: Path,
) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = ViTConfig(**sizes, intermediate_size=40, image_size=48, patch_size=16)
    ViTModel(config).save_pretrained(project / "vit")
    write_processor(project / "vit", 48)
    for seed, name in enumerate(("left", "right")):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        base: Any = ViTModel.from_pretrained(project / "vit")
        peft.get_peft_model(base, lora).save_pretrained(project / name)
    printed = extract(project, "--model", "hf:vit", "--adapter", "left", "--adapter", "right")
    stores = [FeatureStore.open(project / f"features/hf-vit+{name}") for name in ("left", "right")]
    assert printed.count("merged and unmerged tokens differ by") == len(stores)
    assert all(0 <= store.adapter["max_relative_error"] < 1e-5 for store in stores if store.adapter)
    left, right = stores
    assert left.adapter is not None
    assert right.adapter is not None
    assert left.settings["backbone"] == right.settings["backbone"] == "hf:vit"
    assert left.settings["backbone_weights"] == right.settings["backbone_weights"]
    assert left.settings["backbone_adapter"] != right.settings["backbone_adapter"]
    assert not torch.allclose(rows(left), rows(right), atol=1e-2)
    assert "LoRA adapter: merged" in typed("store", "info", "features/hf-vit+left", cwd=project)


def test_a_new_scan_goes_through_the_weights_and_adapter_of_each_store_of_a_run(
    project: Path, tmp_path: Path
) -> None:
    """One store has neither, one has weights, one has both."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = ViTConfig(**sizes, intermediate_size=40, image_size=48, patch_size=16)
    base: Any = ViTModel(config)
    base.save_pretrained(tmp_path / "vit")
    write_processor(tmp_path / "vit", 48)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "lora")
    vit, adapter = str(tmp_path / "vit"), str(tmp_path / "lora")
    weights = ("--model", "hf:org/vit", "--weights", vit)
    extract(project, "--model", "intensity", "--out", "joint/none")
    extract(project, *weights, "--out", "joint/weights")
    extract(project, *weights, "--adapter", adapter, "--out", "joint/both")
    table = pq.read_table(project / "scans.parquet", filters=[("usable", "=", True)])
    patients = sorted(set(table["patient_id"].to_pylist()))
    lines = [
        f"{study},{i % 2},{'train' if patients.index(patient) % 2 else 'validation'}"
        for i, (study, patient) in enumerate(
            zip(table["study_id"].to_pylist(), table["patient_id"].to_pylist(), strict=True)
        )
    ]
    (project / "joint.csv").write_text("\n".join(["study_id,bleed,split", *lines]))
    stores = [
        part for name in ("none", "weights", "both") for part in ("--features", f"joint/{name}")
    ]
    short = ("--max-epochs", "1", "--min-epochs", "1", "--set", "min_positives=1")
    typed("fit-head", *stores, "--labels", "joint.csv", "--out", "runs/joint", *short, cwd=project)
    private = pq.read_table(project / "scans.private.parquet").to_pylist()
    files = {line["scan_id"]: line["files"] for line in private}
    scan = str(Path(files[table["scan_id"][0].as_py()][0]).parent)
    predict = ("predict", "runs/joint", scan, "--weights", vit, "--weights", vit)
    assert "bleed" in typed(*predict, "--adapter", adapter, cwd=project)
    assert "backbone_adapter is None, of the store" in typed(*predict, cwd=project, code=1)
    refused = typed(*predict, "--weights", vit, "--adapter", adapter, cwd=project, code=2)
    assert "needed 2 times" in refused


def test_a_program_fills_a_store_once_it_is_trusted(project: Path, tmp_path: Path) -> None:
    program = tmp_path / "network.pt2"
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    samples = ({0: Dim("samples", min=1, max=4096)},)
    example = torch.zeros(2, 2, 24, 24)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=samples), program)
    program.with_suffix(".toml").write_text(
        "size_px = [24, 24]\ntokens = { cls = 8 }\nwindows_hu = [[0, 100], [-500, 500]]"
    )
    refused = extract(project, "--model", str(program), code=1)
    assert "pass --trust-remote-code if you trust its author" in refused
    extract(project, "--model", str(program), "--trust-remote-code")
    settings = FeatureStore.open(project / "features/network.pt2").settings
    assert settings["backbone"] == "network.pt2"
    assert settings["backbone_remote_code"] == settings["backbone_weights"]
    assert settings["windows_hu"] == [[0, 100], [-500, 500]]
    assert str(tmp_path) not in str(settings)


def test_a_network_of_ones_own_sees_what_its_description_says(project: Path) -> None:
    folder = project / "mine"
    folder.mkdir()
    shape = DenseShape(channels=2, blocks=(1, 1), growth=4, stem=8)
    save_file(DenseNet3d(shape).state_dict(), folder / "mine.safetensors")
    (folder / "deepcntd.toml").write_text(
        "windows_hu = [[0, 100], [-500, 500]]\nsize_px = [24, 48, 56]\nslice_mm = 6"
    )
    extract(project, "--model", "deepcntd", "--weights", "mine")
    store = FeatureStore.open(project / "features/deepcntd")
    assert store.settings["windows_hu"] == [[0, 100], [-500, 500]]
    assert (store.settings["slice_mm"], store.settings["size_px"]) == (6, 56)
    assert rows(store).shape == (SCANS, shape.dim)


def test_of_two_networks_in_a_file_a_key_chooses_and_prediction_finds_the_same(
    project: Path,
) -> None:
    folder = project / "both"
    folder.mkdir()
    shape = DenseShape(channels=3, blocks=(1, 1), growth=4, stem=8)
    networks = {name: DenseNet3d(shape).state_dict() for name in ("model", "model_ema")}
    torch.save({**networks, "epoch": 3}, folder / "mine.pt")
    (folder / "deepcntd.toml").write_text("size_px = [24, 48, 56]\nslice_mm = 6")
    options = ("--model", "deepcntd", "--weights", "both", "--out", "features/ema")
    printed = extract(project, *options, code=1)
    assert "2 times, under model, model_ema: choose one with --weights-key" in printed
    printed = extract(project, *options, "--weights-key", "model_ema")
    assert "features/ema: weights: taken: model_ema" in printed
    assert "weights: taken: model_ema" in typed("store", "info", "features/ema", cwd=project)
    store = FeatureStore.open(project / "features/ema")
    found = load_recorded(store.settings, weights=folder)
    assert found.backbone.remarks == ("taken: model_ema",)
    printed = extract(project, "--model", "intensity", "--weights-key", "ema", code=2)
    assert "--weights-key says which part" in printed


def test_one_that_is_not_there_says_which_kinds_there_are(project: Path) -> None:
    printed = extract(project, "--model", "dino", code=1)
    assert "`timm:NAME`, `hf:NAME`, `openclip:NAME` and the path of a .pt2" in printed
    assert "openclip:<name>" in typed("models", cwd=project)
