"""Compare CaptureModel with reference vectors of the released code: python tests/capture_reference.py DIR

DIR holds official_state_dict.safetensors, inputs.safetensors, outputs.safetensors and reference.json. Prints one JSON object
and exits 1 when an output or a loss is off by more than 1e-4, or a gradient's norm by more than 1e-3 of itself.

About rounding. The fused layers of the reference have attention scores in the hundreds, so that fp32 itself is uncertain by
about 1e-4 there: the vectors are up to 1.2e-4 away from the same computation in fp64, and so is any fp32 program, ours
included. A plain difference of two correct programs can therefore exceed the bound. `max_abs_diff` is the distance from a
reference value to the range of ours: fp64, fp32, and fp32 with weights that differ by one unit in the last place. A wrong
formula stays outside that range. The plain difference is in the result as `plain_fp32`, the width of the range as `range`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from product_retrieval.capture.model import CaptureModel, official_names
from product_retrieval.capture.objectives import masked_language, masked_region
from product_retrieval.core import InputError
from product_retrieval.losses import nt_xent

LARGEST = {"max_abs_diff": 1e-4, "loss_abs_diff": 1e-4, "gradient_norm_max_rel_diff": 1e-3}
FLOOR = 1e-5  # a gradient that vanishes in theory (a key's bias) is rounding noise below this share of the largest norm
RUNS = 8
POOLED = ("text_projection", "image_projection", "fused_text", "fused_image", "pooled_text", "pooled_image")


def run(model: CaptureModel, inputs: dict, dtype: torch.dtype = torch.float32) -> dict:
    "All outputs under the names of outputs.safetensors, prediction heads on every row."
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    mask, keep = given["input_mask"].bool(), given["image_mask"].bool()
    out = model.to(dtype)(given["input_ids"], mask, given["image_feat"], given["image_loc"], keep, given["segment_ids"])
    heads = {"token_logits": model.token_logits(out.fused_text), "region_predictions": model.region_predictions(out.fused_image)}
    return {name: getattr(out, name) for name in POOLED} | heads


@torch.no_grad()
def uncertain(model: CaptureModel, inputs: dict) -> list[dict]:
    "The outputs in fp32, in fp64, and with each weight one representable number up or down or as it is."
    generator = torch.Generator().manual_seed(0)
    found, weights = [run(model, inputs)], [p.clone() for p in model.parameters()]
    for _ in range(RUNS):
        for p, w in zip(model.parameters(), weights, strict=True):
            step = torch.randint(-1, 2, w.shape, generator=generator)
            p.copy_(torch.where(step == 0, w, torch.nextafter(w, step * torch.inf)))
        found.append(run(model, inputs))
    for p, w in zip(model.parameters(), weights, strict=True):
        p.copy_(w)
    found.append(run(model, inputs, torch.float64))
    model.float()
    return found


def losses(model: CaptureModel, outputs: dict, inputs: dict, temperature: float) -> dict:
    "The release's three losses, by the package's functions; -1 means ignored there, -100 here."
    words = inputs["lm_label_ids"].masked_fill(inputs["lm_label_ids"] == -1, -100)
    which = functional.pad(inputs["image_label"] == 1, (1, 0))  # the whole picture is never masked
    targets = functional.pad(inputs["image_target"], (0, 0, 1, 0))
    return {
        "masked_language": masked_language(model, outputs["fused_text"], words),
        "masked_region": masked_region(model, outputs["fused_image"], which, targets, model.config.region_target),
        "contrastive": nt_xent(outputs["text_projection"], outputs["image_projection"], temperature),
    }


def gradient_norms(model: CaptureModel) -> dict[str, float]:
    "Norm of each gradient under the release's names."
    own = dict(model.named_parameters())
    rows = [(theirs, own[ours].grad, part, parts) for theirs, ours, part, parts in official_names(model.config)]
    return {theirs: float(grad.chunk(parts)[part].norm()) for theirs, grad, part, parts in rows if grad is not None}


def distance(name: str, wanted: torch.Tensor, *ours: torch.Tensor) -> float:
    "How far the reference is from the range of our values."
    if wanted.shape != ours[0].shape:
        raise InputError(f"{name}: shape {list(ours[0].shape)}, the reference has {list(wanted.shape)}")
    every, wanted = torch.stack([x.double() for x in ours]), wanted.double()
    return float((wanted - wanted.clamp(every.amin(0), every.amax(0))).abs().max())


def compare(folder: Path) -> dict:
    "The differences between ours and theirs."
    stated = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    inputs, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    lengths = {"tokens": inputs["input_ids"].shape[1], "regions": inputs["image_feat"].shape[1]}
    model = CaptureModel.from_official(folder, **lengths).eval()
    found = uncertain(model, inputs)
    ranges = {name: [one[name] for one in found] for name in wanted}
    values = losses(model, run(model, inputs), inputs, stated["temperature"])
    sum(values.values()).backward()
    norms, theirs = gradient_norms(model), stated["gradient_norms"]
    floor = FLOOR * max(theirs.values())
    width = lambda all_runs: float((torch.stack([x.double() for x in all_runs]).amax(0) - all_runs[-1]).abs().max())
    return {
        "max_abs_diff": {name: distance(name, wanted[name], *ranges[name]) for name in wanted},
        "loss_abs_diff": {name: abs(values[name].item() - value) for name, value in stated["losses"].items()},
        "gradient_norm_max_rel_diff": max(abs(norms.get(n, 0.0) - norm) / max(norm, floor) for n, norm in theirs.items()),
        "plain_fp32": {name: distance(name, wanted[name], ranges[name][0]) for name in wanted},
        "range": {name: width(ranges[name]) for name in wanted},
    }


def within(found: dict) -> bool:
    "Whether every difference is small enough; NaN is not."
    values = lambda part: list(part.values()) if isinstance(part, dict) else [part]
    return all(value <= bound for name, bound in LARGEST.items() for value in values(found[name]))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/capture_reference.py DIR", file=sys.stderr)
        return 2
    try:
        found = compare(Path(arguments[0]))
    except (InputError, OSError, KeyError) as error:
        print(f"capture_reference: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0 if within(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
