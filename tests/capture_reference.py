"""Compare CaptureModel with reference vectors of the released code: python tests/capture_reference.py DIR

DIR holds official_state_dict.safetensors, inputs.safetensors, outputs.safetensors and reference.json. Prints one JSON object
and exits 1 when an output or a loss is off by more than 1e-4, or a gradient's norm by more than 1e-3 of itself.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from product_retrieval.capture.model import CaptureModel, official_names
from product_retrieval.core import InputError

LARGEST = {"max_abs_diff": 1e-4, "loss_abs_diff": 1e-4, "gradient_norm_max_rel_diff": 1e-3}
FLOOR = 1e-5  # a gradient that vanishes in theory (a key's bias) is rounding noise below this share of the largest norm


def run(model: CaptureModel, inputs: dict) -> dict:
    "All outputs under the names of outputs.safetensors, prediction heads on every row."
    out = model(
        inputs["input_ids"], inputs["input_mask"].bool(), inputs["image_feat"], inputs["image_loc"],
        inputs["image_mask"].bool(), inputs["segment_ids"],
    )  # fmt: skip
    names = ("text_projection", "image_projection", "fused_text", "fused_image", "pooled_text", "pooled_image")
    heads = {"token_logits": model.token_logits(out.fused_text), "region_predictions": model.region_predictions(out.fused_image)}
    return {name: getattr(out, name) for name in names} | heads


def plain_losses(outputs: dict, inputs: dict, temperature: float, classes: bool) -> dict:
    "The release's three losses, written out; what the package's losses are compared with."
    words = functional.cross_entropy(outputs["token_logits"].flatten(0, 1), inputs["lm_label_ids"].flatten(), ignore_index=-1)
    masked = inputs["image_label"] == 1
    found, wanted = outputs["region_predictions"][:, 1:][masked], inputs["image_target"][masked]
    if classes:
        regions = functional.kl_div(found.log_softmax(-1), wanted, reduction="none").sum() / max(int(masked.sum()), 1)
    else:
        regions = functional.mse_loss(found, wanted)
    both = functional.normalize(torch.cat([outputs["text_projection"], outputs["image_projection"]]), dim=-1)
    scores = (both @ both.T / temperature).fill_diagonal_(float("-inf"))
    partner = torch.arange(len(both)).roll(len(both) // 2)
    return {"masked_language": words, "masked_region": regions, "contrastive": functional.cross_entropy(scores, partner)}


def gradient_norms(model: CaptureModel) -> dict:
    "Norm of each gradient under the release's names."
    own = dict(model.named_parameters())
    rows = [(theirs, own[ours].grad, part, parts) for theirs, ours, part, parts in official_names(model.config)]
    return {theirs: float(g.chunk(parts)[part].norm()) for theirs, g, part, parts in rows if g is not None}


def compare(folder: Path) -> dict:
    "The differences between ours and theirs."
    stated = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    inputs, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    lengths = {"tokens": inputs["input_ids"].shape[1], "regions": inputs["image_feat"].shape[1]}
    model = CaptureModel.from_official(folder, **lengths).eval()
    outputs = run(model, inputs)
    losses = plain_losses(outputs, inputs, stated["temperature"], model.config.region_target == "classes")
    sum(losses.values()).backward()
    norms, stated_norms = gradient_norms(model), stated["gradient_norms"]
    floor = FLOOR * max(stated_norms.values())
    off = lambda name: abs(norms.get(name, 0.0) - stated_norms[name]) / max(stated_norms[name], floor)
    compared = [name for name in stated_norms if name != _DECODER or _WORDS not in stated_norms]
    return {
        "max_abs_diff": {name: float((outputs[name] - wanted[name]).abs().max()) for name in wanted},
        "loss_abs_diff": {name: abs(float(losses[name]) - value) for name, value in stated["losses"].items()},
        "gradient_norm_max_rel_diff": max(off(name) for name in compared),
    }


def within(found: dict) -> bool:
    "Whether every difference is small enough; NaN is not."
    largest = lambda value: max(value.values()) if isinstance(value, dict) else value
    return all(largest(found[name]) <= bound for name, bound in LARGEST.items())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/capture_reference.py DIR")
    try:
        found = compare(Path(sys.argv[1]))
    except (InputError, OSError) as error:
        sys.exit(f"capture_reference: {error}")
    print(json.dumps(found))
    sys.exit(0 if within(found) else 1)
