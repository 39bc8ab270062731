"""Writes references.json: a small stage of the authors' DynamicSwin, as computed by PyTorch.

  AUTHORS=PATH python tests/methods/tokens/make_references.py

Needs torch and timm besides numpy; PATH is a checkout of raoyongming/DynamicViT. Weights and tokens
are drawn (tests/models/drawn.py), not stored. The stage's window covers its whole grid, and its
relative position biases are 0, so it is plain attention.
"""
import json
import os
import pathlib
import sys
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [os.environ["AUTHORS"], str(HERE.parents[1] / "models")]

import drawn  # noqa: E402
import torch  # noqa: E402

# Imports of the authors' files that a stage does not need: schemas that torchvision's compiled part
# would declare, and modules that have since been removed.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.modules |= {"torch._six": types.SimpleNamespace(inf=float("inf")),
                "tensorboardX": types.SimpleNamespace(SummaryWriter=None)}

from models import dyswin  # noqa: E402

SIZES = {"dim": 16, "depth": 5, "num_heads": 2, "side": 4}
IMAGES = 3   # in training, their code takes two of them, one per stream
# {what runs: (blocks that decide, shares)}. In their training, a patch that changes paths between
# two decisions continues in the stream it was not on; a single decision does not show this.
RUNS = {"infer": ((1, 2, 3), (0.7, 0.7 - 0.2, 0.7 - 0.4)),
        "infer again": ((1, 2, 3), (0.55, 0.8, 0.3)), "train": ((2,), (0.5,))}


def choose_most_likely(logits, hard, dim):
  """Replaces the Gumbel softmax: deterministic, with some patches of each kind."""
  del hard, dim
  score = logits[..., :1] - logits[..., 1:]
  keep = (score > score.mean(1, keepdim=True)).to(logits.dtype)
  return torch.cat([keep, 1 - keep], dim=-1)


def main():
  side, dim = SIZES["side"], SIZES["dim"]
  x = np.random.default_rng(1).standard_normal((IMAGES, side * side, dim), np.float32)
  dyswin.F.gumbel_softmax, out = choose_most_likely, {"sizes": SIZES, "runs": []}
  for kind, (blocks, shares) in RUNS.items():
    stage = dyswin.BasicLayer(dim, (side, side), SIZES["depth"], SIZES["num_heads"], 7,
                              sparse_ratio=shares, pruning_loc=blocks)
    shapes = {name: tuple(leaf.shape) for name, leaf in stage.state_dict().items()
              if "relative_position" not in name and "mask" not in name}
    weights = drawn.weights(shapes)
    stage.load_state_dict({name: torch.tensor(leaf) for name, leaf in weights.items()},
                          strict=False)
    for name, parameter in stage.named_parameters():
      if "relative_position" in name:
        parameter.data.zero_()
    train = kind == "train"
    with torch.no_grad():
      y, decisions = stage.train(train)(torch.tensor(x))
    masks = [mask[..., 0].tolist() if train else [sorted(row) for row in mask[0].tolist()]
             for mask in decisions]
    out["runs"].append({"train": train, "blocks": blocks, "shapes": shapes, "kept": masks,
                        "wanted": np.round(y.numpy().astype(float), 6).tolist()})
  (HERE / "references.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
  main()
