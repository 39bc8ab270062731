"""Writes tests/models/references/FAMILY.json: logits of small models, computed by PyTorch.

  python tests/models/make_references.py deit ...      # all families when none is named

Needs torch, timm and torchvision beside numpy; families that are not in timm also need the
authors' file, see their function. Weights and images are drawn (drawn.py), not stored: a file holds
names and shapes, and the logits for plain weights and for probed ones.

A new family: one function that yields Cases, one line in FAMILIES.
"""
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import drawn
import torch

# Schemas that torchvision's compiled part would declare: enough to import it beside a CPU torch.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

REFERENCES = pathlib.Path(__file__).parent / "references"
CLASSES = 7


class Case(NamedTuple):
  """A small model. Its weights are drawn for the names and shapes that it has at its native size.

  model, fields: what our side passes to `create_model`, image_size aside.
  sizes: the native image size, then others at which the same weights run.
  build: image size -> torch module.
  adapt: (state dict of the native size, module of another size) -> its state dict.
  probe: {pattern of names: factor}, see `drawn.weights`.
  """
  model: str
  fields: dict[str, Any]
  sizes: tuple[tuple[int, int], ...]
  build: Callable[[tuple[int, int]], torch.nn.Module]
  probe: dict[str, float]
  adapt: Callable = lambda state, module: state


def resized_positions(prefix: int) -> Callable:
  """The authors' rule for `pos_embed`: prefix rows kept, the grid bicubic without antialiasing."""
  def adapt(state, module):
    old, wanted = state["pos_embed"], module.pos_embed
    side = int((old.shape[1] - prefix) ** 0.5)
    grid = old[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=module.patch_embed.grid_size, mode="bicubic",
                                           align_corners=False)
    new = torch.cat([old[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
    assert new.shape == wanted.shape
    return {**state, "pos_embed": new}
  return adapt


def deit():
  """timm's DeiT, plain and distilled."""
  import timm
  probe = {r"(cls_token|dist_token|pos_embed|patch_embed\.proj\..*)": 3e-3,
           r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*": 3e-3}
  for distilled in (False, True):
    name = f"deit_tiny{'_distilled' * distilled}_patch16_224"

    def build(image_size, name=name):
      return timm.create_model(name, img_size=image_size, patch_size=8, embed_dim=24, depth=2,
                               num_heads=3, num_classes=CLASSES)

    fields = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    yield Case(name, fields, ((32, 32), (48, 32)), build, probe, resized_positions(1 + distilled))


FAMILIES = {"deit": deit}


@torch.no_grad()
def logits(case: Case, shapes, image_size, probe):
  module = case.build(image_size).eval()
  state = {name: torch.from_numpy(array) for name, array in drawn.weights(shapes, probe).items()}
  if image_size != case.sizes[0]:
    state = case.adapt(state, module)
  module.load_state_dict(state)
  images = torch.from_numpy(drawn.images(image_size)).permute(0, 3, 1, 2)
  return module(images).numpy().astype("float64").round(7).tolist()


def reference(case: Case):
  """What a file keeps of one case."""
  native = case.build(case.sizes[0]).state_dict()
  shapes = {name: list(tensor.shape) for name, tensor in native.items()}
  runs = [{"image_size": size, "logits": logits(case, shapes, size, None),
           "probed": logits(case, shapes, size, case.probe)} for size in case.sizes]
  return {"model": case.model, "fields": {**case.fields, "num_classes": CLASSES},
          "shapes": shapes, "probe": case.probe, "runs": runs}


def main(names):
  REFERENCES.mkdir(exist_ok=True)
  for name in names or FAMILIES:
    rows = [json.dumps(reference(case)) for case in FAMILIES[name]()]
    path = REFERENCES / f"{name}.json"
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(f"{path.name}: {len(rows)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
  main(sys.argv[1:])
