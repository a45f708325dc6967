#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: an adapter trained under transformers 4 loads and does
# nothing.
#
# Input: a small SigLIP vision tower and its LoRA adapter (q_proj, v_proj), saved by transformers
#        4.57.6 and peft 0.15.2; both read again there, then by transformers 5.23.0 and peft
#        0.21.2.
# Guess: the new versions rename the adapter's tensors, or raise.
# Seen:  the base loads rightly, the adapter without an exception; a warning speaks of missing
#        adapter keys. The LoRA modules are there, B is zero, and the output is that of the base
#        exactly.
# Why:   after an upgrade, embeddings of "the adapted model" are those of the general one, and a
#        head trained on the old embeddings is fed with other ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.15.0 transformers==4.57.6 peft==0.15.2
venv/bin/python - <<'PY'
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import SiglipVisionConfig, SiglipVisionModel

torch.manual_seed(0)
config = SiglipVisionConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=32,
    patch_size=8,
)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
image = torch.randn(1, 3, 32, 32)


def output(model):
    with torch.no_grad():
        return model.eval()(image).last_hidden_state


base = SiglipVisionModel(config)
base.save_pretrained("base")
plain = output(base)
adapted = get_peft_model(base, lora)
for name, weight in adapted.named_parameters():
    if "lora_B" in name:  # as training leaves it: no longer zero
        torch.nn.init.normal_(weight)
adapted.save_pretrained("adapter")
wanted = output(adapted)
again = output(PeftModel.from_pretrained(SiglipVisionModel.from_pretrained("base"), "adapter"))
effect = float((wanted - plain).norm() / plain.norm())
print(
    f"transformers {transformers.__version__}: effect {effect:.3f}, reloaded off by {(again - wanted).norm():.1e}"
)
assert effect > 0.01 and torch.allclose(again, wanted, atol=1e-5)
torch.save({"image": image, "plain": plain, "wanted": wanted}, "outputs.pt")
PY
venv/bin/pip install --quiet transformers==5.23.0 peft==0.21.2
venv/bin/python - <<'PY'
import torch
import transformers
from peft import PeftModel
from transformers import SiglipVisionModel

saved = torch.load("outputs.pt")
base = SiglipVisionModel.from_pretrained("base").eval()
with torch.no_grad():
    plain = base(saved["image"]).last_hidden_state
    model = PeftModel.from_pretrained(base, "adapter").eval()
    seen = model(saved["image"]).last_hidden_state
pairs = sum("lora_B" in name for name, _ in model.named_parameters())
print(
    f"transformers {transformers.__version__}: base off by {(plain - saved['plain']).norm():.1e}, {pairs} LoRA"
    f" pairs, adapted off by {(seen - saved['wanted']).norm():.2f}, from the base by {(seen - plain).norm():.1e}"
)
assert torch.allclose(plain, saved["plain"], atol=1e-5) and pairs == 4
assert torch.equal(seen, plain) and not torch.allclose(seen, saved["wanted"], atol=1e-2)
PY
