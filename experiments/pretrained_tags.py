"""Writes vitcompact/models/pretrained.json: where to find pretrained weights, and their
preprocessing.

python -m experiments.pretrained_tags      # with a Python that has timm (1.0.31 made the file)

The file has {model: {tag: row}}, with each model's default tag first. A row has "hub" (a repository
of the Hugging Face hub) or "url" (the authors' file), num_classes, image_size, mean, std, crop,
crop_mode if it is not "center", interpolation, and license if timm gives it. The values come from
timm; those of PVT v1 and LV-ViT come from the authors' READMEs (github.com/whai362/PVT,
zihangJiang/TokenLabeling), which define no tags: ours are named like timm's for PVT v2 and
Next-ViT.
"""
import json
import pathlib
import re

PATH = pathlib.Path(__file__).parents[1] / "vitcompact/models/pretrained.json"
MODELS = re.compile(
    r"deit3?_\w+|pvt_v2_\w+|nextvit_\w+|shvit_\w+|davit_(tiny|small|base)"
    r"|vit_(tiny|small|base|large|huge)_patch\d+_(224|384)"
    r"|vit_[a-z]+_patch14_(reg4_)?dinov2|vit_[a-z0-9]+(_plus)?_patch16_dinov3"
    r"|vit_[a-z0-9]+_patch\d+_clip_(quickgelu_)?\d+|vit_[a-z0-9]+_patch\d+_siglip_(gap_)?\d+"
    r"|eva02_(tiny|small|base|large)_patch14_\d+")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PVT = "https://github.com/whai362/PVT/releases/download/v2/"
LVVIT = "https://github.com/zihangJiang/TokenLabeling/releases/download/"


def main():
  table = {name: tags for name in timm_models() if (tags := timm_tags(name))}
  table |= {f"pvt_{size}": {"in1k": authors(f"{PVT}pvt_{size}.pth", crop=0.875)}
            for size in ("tiny", "small", "medium", "large")}
  table |= {
      "lvvit_t": {"in1k": authors(f"{LVVIT}v0.2.0/lvvit_t.pth")},
      "lvvit_s": {"in1k": authors(f"{LVVIT}1.0/lvvit_s-26M-224-83.3.pth.tar"),
                  "in1k_384": authors(f"{LVVIT}1.0/lvvit_s-26M-384-84.4.pth.tar", 384)},
      "lvvit_m": {"in1k": authors(f"{LVVIT}1.0/lvvit_m-56M-224-84.0.pth.tar", crop=1.0),
                  "in1k_384": authors(f"{LVVIT}1.0/lvvit_m-56M-384-85.4.pth.tar", 384, 1.0),
                  "in1k_448": authors(f"{LVVIT}1.0/lvvit_m-56M-448-85.5.pth.tar", 448, 1.0)}}
  PATH.write_text(text(table), encoding="utf-8")
  print(f"{PATH}: {len(table)} models, {sum(map(len, table.values()))} tags")


def timm_models():
  import torch

  # With a CPU build of torch and another build of torchvision, only these two ops are missing.
  library = torch.library.Library("torchvision", "DEF")
  library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  import timm

  return [name for name in timm.list_models() if MODELS.fullmatch(name)]


def timm_tags(name: str) -> dict[str, dict]:
  """Returns {tag: row} for timm's model: tags with weights on the hub, its default first."""
  from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

  configs = {config.tag: config for config in get_arch_pretrained_cfgs(name).values()
             if config.hf_hub_id}
  default = get_pretrained_cfg(name).tag
  return {tag: row(configs[tag]) for tag in sorted(configs, key=lambda tag: tag != default)}


def row(config) -> dict:
  height, width = config.input_size[1:]
  assert height == width, config
  found = {"hub": config.hf_hub_id, "num_classes": config.num_classes, "image_size": height,
           "mean": config.mean, "std": config.std, "crop": config.crop_pct,
           "interpolation": config.interpolation}
  if config.crop_mode != "center":
    found["crop_mode"] = config.crop_mode
  return {**found, "license": config.license} if config.license else found


def authors(url: str, image_size: int = 224, crop: float = 0.9) -> dict:
  return {"url": url, "num_classes": 1000, "image_size": image_size, **IMAGENET, "crop": crop,
          "interpolation": "bicubic", "license": "apache-2.0"}


def text(table) -> str:
  """Returns JSON with one line per tag, so that diffs are readable."""
  models = []
  for name, tags in sorted(table.items()):
    rows = ",\n".join(f"  {json.dumps(tag)}: {json.dumps(row)}" for tag, row in tags.items())
    models.append(f" {json.dumps(name)}: {{\n{rows}}}")
  return "{\n" + ",\n".join(models) + "\n}\n"


if __name__ == "__main__":
  main()
