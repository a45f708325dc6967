#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2: a LoRA-tuned DINOv3 that was merged is adapted twice on
# loading.
#
# Input: a small DINOv3 with a LoRA adapter, merged by merge_and_unload and saved into the folder
#        that holds the adapter, so that the folder has model.safetensors and adapter_config.json.
# Guess: from_pretrained reads the merged weights.
# Seen:  it reads them and puts the adapter on top again: LoRA modules appear and the output is
#        that of twice the update (relative change above 1 %). No warning.
# Why:   merging next to the adapter is the usual last cell of a notebook. Embeddings of a cohort
#        are then those of a model that nobody trained or validated.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.15.0 transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PY'
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging

logging.disable_progress_bar()
torch.manual_seed(0)
config = DINOv3ViTConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=32,
    patch_size=8,
)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
image = torch.randn(1, 3, 32, 32)


def difference(model, wanted):
    with torch.no_grad():
        seen = model.eval()(image).last_hidden_state
    return float((seen - wanted).norm() / wanted.norm())


adapted = get_peft_model(DINOv3ViTModel(config), lora).eval()
with torch.no_grad():
    wanted = adapted(image).last_hidden_state
adapted.save_pretrained("model")
adapted.merge_and_unload().save_pretrained("model")
again = AutoModel.from_pretrained("model")
layers = sum(name.endswith("lora_A.default.weight") for name, _ in again.named_parameters())
twice = difference(again, wanted)
for name in ("adapter_config.json", "adapter_model.safetensors"):
    Path("model", name).unlink()
once = difference(AutoModel.from_pretrained("model"), wanted)
print(
    f"merged folder: {layers} LoRA pairs, output differs by {twice:.3f}; adapter's files deleted: {once:.1e}"
)
assert layers == 4 and twice > 0.01 and once < 1e-5
PY
