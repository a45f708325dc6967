"""Parameter counts against Table 2 of the paper and against PEFT's own count."""

from dataclasses import replace

import peft
import pytest

from ctfm.extract.backbones import BACKBONES
from ctfm.extract.parameters import count_parameters
from ctfm.store.errors import BackboneError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.mark.parametrize(
    ("name", "attention", "with_patches"),
    [
        ("dinov3-base", 589_824, 602_112),
        ("dinov3-large", 1_572_864, 1_587_200),
        ("medimageinsight", 1_155_072, 1_158_296),
        ("medsiglip", 1_990_656, 2_004_576),
    ],
)
def test_lora_has_the_size_that_was_counted_with_peft(
    name: str, attention: int, with_patches: int
) -> None:
    counted = count_parameters(BACKBONES[name])
    assert counted.lora_attention == attention
    assert counted.lora_attention + counted.lora_patches == with_patches


def test_peft_counts_the_same() -> None:
    entry = BACKBONES["dinov3-small"]
    assert entry.skeleton is not None
    config = peft.LoraConfig(r=5, target_modules=entry.lora_targets["hf"])
    wrapped = peft.get_peft_model(entry.skeleton(), config)
    trained = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    assert count_parameters(entry, rank=5).lora_attention == trained


def test_every_skeleton_has_the_parameters_of_its_entry() -> None:
    for entry in BACKBONES.values():
        if entry.skeleton is not None:
            assert count_parameters(entry).backbone == entry.parameters, entry.name


def test_a_backbone_without_a_skeleton_is_not_counted() -> None:
    with pytest.raises(BackboneError, match="checkpoint"):
        count_parameters(replace(BACKBONES["deepcntd"], skeleton=None))


def test_every_backbone_of_the_paper_has_a_skeleton_of_full_size() -> None:
    without = [name for name, entry in BACKBONES.items() if entry.skeleton is None]
    assert without == ["intensity"]
