"""DINOv3 from Meta's own `.pth` layout: the output of Meta's own module, or an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctfm.extract.backbone import Backbone, BackboneEntry, load_backbone
from ctfm.extract.dinov3 import BASE, ENTRIES, SEVEN_B, SMALL_PLUS, Sizes, tower
from ctfm.store.errors import BackboneError, ChoiceError

FIXTURE = Path(__file__).parent / "fixtures" / "dinov3_meta_parity.npz"
Recipe = Callable[[dict[str, tuple[int, ...]], int], dict[str, Tensor]]


def small(sizes: Sizes, width: int, layers: int, *, heads: int, mlp: int) -> Sizes:
    """A released size, smaller, with the same kind of MLP and biases."""
    return {
        **sizes,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


CASES: dict[str, Sizes] = {
    "mlp": small(BASE, 48, 3, heads=4, mlp=192),
    "swiglu": small(SMALL_PLUS, 48, 2, heads=3, mlp=192),
    "swiglu64": small(SEVEN_B, 64, 2, heads=4, mlp=128),
}


def entry(case: str) -> BackboneEntry:
    d = int(CASES[case]["hidden_size"])
    return replace(
        ENTRIES[0], name="dinov3-tiny", tokens={"cls": d, "mean": d}, load=tower(CASES[case]).load
    )


def meta_tensors(case: str, recipe_tensors: Recipe) -> dict[str, Tensor]:
    """The state dict that the fixture was made with, as `fixtures/README.md` says."""
    with np.load(FIXTURE) as fixture:
        names, shapes = fixture[f"{case}_names"], fixture[f"{case}_shapes"]
        made = recipe_tensors(
            {
                str(name): tuple(map(int, str(shape).split(",")))
                for name, shape in zip(names, shapes, strict=True)
            },
            9,
        )
    for name, tensor in made.items():
        if name.endswith("bias_mask"):
            q, k, v = tensor.chunk(3)
            made[name] = torch.cat([q * 0 + 1, k * 0, v * 0 + 1])
        elif name.endswith("periods"):
            made[name] = 100.0 ** (torch.arange(len(tensor)) / len(tensor))
    return made


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tensors(case: str, recipe_tensors: Recipe) -> dict[str, Tensor]:
    return meta_tensors(case, recipe_tensors)


def load(case: str, tensors: dict[str, Tensor], folder: Path) -> Backbone:
    file = folder / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(tensors, file)
    return load_backbone(entry(case), file)


def check_parity(case: str, backbone: Backbone) -> None:
    pixels = np.random.RandomState(10).random_sample((2, 3, 48, 80)).astype(np.float32)
    with np.load(FIXTURE) as fixture, torch.inference_mode():
        tokens = backbone.module(torch.from_numpy(pixels))
        for name in ("cls", "mean"):
            np.testing.assert_allclose(tokens[name], fixture[f"{case}_{name}"], rtol=0, atol=1e-5)


def test_gives_what_metas_module_gives(
    case: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    check_parity(case, load(case, tensors, tmp_path))


def test_a_checkpoint_of_metas_training_gives_the_network_that_is_chosen(
    case: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """Backbone and heads of a student and of its teacher, which is what Meta releases."""
    head = {
        "dino_head.mlp.0.weight": torch.ones(3, 3),
        "ibot_head.last_layer.weight": torch.ones(3),
    }
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()} | head
    student = {name: tensor + 1 for name, tensor in teacher.items()}
    torch.save({"teacher": teacher}, tmp_path / "eval.pth")
    torch.save({"model": {"teacher": teacher, "student": student}}, tmp_path / "train.pth")
    alone = load_backbone(entry(case), tmp_path / "eval.pth")
    check_parity(case, alone)
    assert any("dino_head" in remark for remark in alone.remarks)
    with pytest.raises(ChoiceError, match=r"model\.student, model\.teacher"):
        load_backbone(entry(case), tmp_path / "train.pth")
    chosen = load_backbone(entry(case), tmp_path / "train.pth", weights_key="model.teacher")
    assert chosen.digest == alone.digest


def test_rotary_periods_that_were_rounded_to_bfloat16_are_those_of_the_config(
    case: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()
    check_parity(case, load(case, tensors, tmp_path))


def test_the_digest_is_that_of_the_same_weights_in_the_hubs_layout(
    case: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    of_meta = load(case, tensors, tmp_path)
    model: Any = of_meta.module.model
    model.save_pretrained(tmp_path / "hub")
    assert load_backbone(entry(case), tmp_path / "hub").digest == of_meta.digest


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: Callable[[dict[str, Tensor]], Tensor]) -> Callable[..., object]:
    return lambda tensors: tensors.update({name: value(tensors)})


QKV = "blocks.1.attn.qkv.weight"
MASK = "blocks.1.attn.qkv.bias_mask"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("blocks.2.mlp.fc1.bias"), r"1 missing \(layer.2.mlp.up_proj.bias\)"),
        (drop("blocks.0.attn.qkv.weight"), r"3 missing \(layer.0.attention.k_proj.weight"),
        (put("blocks.3.norm1.bias", lambda _: torch.ones(48)), r"unexpected \(layer.3.norm1.bias"),
        (put("cls_norm.weight", lambda _: torch.ones(48)), r"1 unexpected \(cls_norm.weight\)"),
        (drop(MASK), r"1 unexpected \(layer.1.attention.k_proj.bias\)"),
        (put(MASK, lambda t: torch.ones_like(t[MASK])), "does not leave out the bias of k alone"),
        (put(MASK, lambda t: t[MASK] * torch.nan), "does not leave out the bias of k alone"),
        (drop("blocks.1.attn.qkv.bias"), "does not leave out the bias of k alone"),
        (put("rope_embed.periods", lambda _: torch.tensor([1.0, 10.0])), "of another network"),
        (
            put("rope_embed.periods", lambda t: 2 * t["rope_embed.periods"]),
            r"rotary periods 2, 9\.283, 43\.09, this DINOv3 has 1, 4\.642, 21\.54",
        ),
        (put("rope_embed.periods", lambda _: torch.tensor(1.0)), "of another network"),
        (put("rope_embed.periods", lambda _: torch.tensor([])), r"1 empty tensors \(rope_embed"),
        (put(MASK, lambda _: torch.tensor(1.0)), "does not leave out the bias of k alone"),
        (
            put(QKV, lambda _: torch.ones(143, 48)),
            rf"unexpected \({QKV.replace('blocks', 'layer')}",
        ),
        (put(QKV, lambda _: torch.tensor(1.0)), rf"unexpected \({QKV.replace('blocks', 'layer')}"),
    ],
)
def test_loads_completely_or_not_at_all(
    recipe_tensors: Recipe,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    tensors = meta_tensors("mlp", recipe_tensors)
    damage(tensors)
    with pytest.raises(BackboneError, match=message):
        load("mlp", tensors, tmp_path)


def test_weights_of_another_size_are_refused(recipe_tensors: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"missing \(layer.0.mlp.gate_proj"):
        load(
            "swiglu",
            meta_tensors("mlp", recipe_tensors)
            | {"rope_embed.periods": 100.0 ** (torch.arange(4) / 4)},
            tmp_path,
        )
