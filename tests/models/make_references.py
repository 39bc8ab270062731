"""Writes tests/models/references/FAMILY.json: logits of small models, computed by PyTorch.

  python tests/models/make_references.py deit ...      # no name: all families

Needs torch, timm and torchvision besides numpy; families that are not in timm also need the
authors' file, see their function. Weights and images are drawn (drawn.py), not stored: a file has
names and shapes, and the logits for plain weights and for probe weights.

A new family takes one function that yields Cases and one line in FAMILIES.
"""
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import drawn
import torch

# Schemas that torchvision's compiled part would declare: enough to import it with a CPU torch.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

REFERENCES = pathlib.Path(__file__).parent / "references"
CLASSES = 7
DEIT_PROBE = {r"(cls_token|dist_token|pos_embed|patch_embed\.proj\..*)": 3e-3,
              r"blocks\.\d+\.(attn\.proj|mlp\.fc2(\.b)?)\..*": 3e-3}


class Case(NamedTuple):
  """A small model. Weights are drawn for the names and shapes it has at its native size.

  model, fields: arguments of our `create_model`, except image_size.
  sizes: the native image size, then others to run the same weights at.
  build: image size -> torch module.
  adapt: (state dict of the native size, module of another size) -> its state dict.
  probe: {pattern of names: factor}, see `drawn.weights`.
  plain: the same for the plain run, if drawn weights let a deep network's activations grow.
  """
  model: str
  fields: dict[str, Any]
  sizes: tuple[tuple[int, int], ...]
  build: Callable[[tuple[int, int]], torch.nn.Module]
  probe: dict[str, float]
  adapt: Callable = lambda state, module: state
  plain: dict[str, float] | None = None


def resized_positions(prefix: int) -> Callable:
  """The authors' rule for `pos_embed`: prefix rows kept, the grid bicubic without antialiasing."""
  def adapt(state, module):
    old, expected = state["pos_embed"], module.pos_embed
    side = int((old.shape[1] - prefix) ** 0.5)
    grid = old[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=module.patch_embed.grid_size, mode="bicubic",
                                           align_corners=False)
    new = torch.cat([old[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
    assert new.shape == expected.shape
    return {**state, "pos_embed": new}
  return adapt


def deit():
  """timm's DeiT, plain and distilled."""
  import timm
  for distilled in (False, True):
    name = f"deit_tiny{'_distilled' * distilled}_patch16_224"

    def build(image_size, name=name):
      return timm.create_model(name, img_size=image_size, patch_size=8, embed_dim=24, depth=2,
                               num_heads=3, num_classes=CLASSES)

    fields = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    yield Case(name, fields, ((32, 32), (48, 32)), build, DEIT_PROBE,
               resized_positions(1 + distilled))


def vit():
  """timm's other isotropic models: together they have every part that DeiT lacks."""
  import timm
  from timm.models import eva, vision_transformer

  def adapt(state, module):
    file = eva if isinstance(module, eva.Eva) else vision_transformer
    return file.checkpoint_filter_fn(state, module)

  probe = {r"(cls_token|reg_token|pos_embed|patch_embed\.proj\..*)": 3e-3,
           r"norm_pre\.(weight|bias)": 3e-3,
           r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*": 3e-3,
           r"attn_pool\.(proj|latent).*": 3e-3}
  small = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
  rows = [("deit3_small_patch16_224", {}),
          ("vit_base_patch16_224", {"global_pool": "avg"}),
          ("vit_small_patch16_224", {"qk_norm": True}),
          ("vit_small_patch14_dinov2", {"patch_size": 7}),
          ("vit_giant_patch14_reg4_dinov2", {"patch_size": 7}),
          ("vit_small_patch16_dinov3", {"global_pool": "token"}),
          ("vit_small_plus_patch16_dinov3", {}),
          ("vit_base_patch16_clip_224", {}),
          ("vit_base_patch16_clip_quickgelu_224", {}),
          ("vit_base_patch16_siglip_224", {}),
          ("vit_so400m_patch16_siglip_256", {}),
          ("vit_base_patch16_siglip_gap_224", {}),
          ("eva02_tiny_patch14_224", {}),
          ("eva02_base_patch14_448", {}),
          ("vit_so400m_patch14_siglip_384", {})]
  for name, fields in rows:
    fields = {**small, **fields}
    # One of the sizes is not a multiple of the patch size.
    side = 4 * fields["patch_size"] + (5 if name.endswith("siglip_384") else 0)

    def build(image_size, name=name, fields=fields):
      names = {"width": "embed_dim", "heads": "num_heads"}
      return timm.create_model(name, img_size=image_size, num_classes=CLASSES,
                               **{names.get(key, key): value for key, value in fields.items()})

    yield Case(name, fields, ((side, side), (side * 3 // 2, side)), build, probe, adapt)


def nextvit():
  """timm's Next-ViT. Its widths are fixed, so narrow stages are assembled from its blocks.

  A transformer block has 128 channels, the fewest that timm splits into 3/4 and 1/4.
  """
  from timm.models import nextvit as theirs
  conv, transformer = theirs.NextConvBlock, theirs.NextTransformerBlock
  kinds = [[conv], [conv, transformer], [conv, transformer, conv], [transformer]]

  def build(image_size):
    del image_size
    model = theirs.NextViT(in_chans=3, stem_chs=(8, 4, 8), num_classes=CLASSES)
    stages, width = [], 8
    for i, stage in enumerate(kinds):
      widths = [128 if kind is transformer else (96 if i else 16) for kind in stage]
      stages.append(theirs.NextStage(width, widths, stage, stride=1 + (i > 0), head_dim=16,
                                     sr_ratio=8 >> i, mix_block_ratio=0.75))
      width = widths[-1]
    model.stages = torch.nn.Sequential(*stages)
    model.norm = torch.nn.BatchNorm2d(width)
    model.head = theirs.ClassifierHead(width, CLASSES)
    return model

  fields = {"stem_widths": [8, 4, 8, 8], "widths": [16, 96, 96, 96], "depths": [1, 2, 3, 1],
            "periods": [0, 2, 2, 1], "head_dim": 16}
  plain = {r".*\.(mhca\.projection|mlp\.fc2|e_mhsa\.proj)\.(weight|bias)": 0.3}
  # All variances are 1e-5, as large as epsilon, with means and activations to match.
  probe = {r".*running_var": 1e-5, r".*running_mean": 3e-3,
           r"(stem\.\d|stages\.0\.blocks\.0\.patch_embed)\.conv\.weight": 3e-3,
           r".*\.(patch_embed|projection)\.norm\.(weight|bias)": 3e-3,
           r".*\.(mhca\.projection|mlp\.fc2|e_mhsa\.proj)\.(weight|bias)": 1e-3,
           r"stages\.[12]\.blocks\.\d\.norm1\.(weight|bias)": 3e-3}
  # At 40 x 56 the sides are odd, and 16 tokens per pool leave a remainder.
  yield Case("nextvit_small", fields, ((64, 64), (40, 56)), build, probe, plain=plain)


def shvit():
  """timm's SHViT. In the middle stage the width and the attending part are odd, and the squeezed
  widths of its two downsamplings round up and down."""
  from timm.models import shvit as theirs
  fields = {"widths": [16, 28, 36], "depths": [1, 2, 1], "partial_widths": [9, 12], "qk_width": 8}

  def build(image_size):
    del image_size
    return theirs.SHViT(num_classes=CLASSES, embed_dim=fields["widths"], depth=fields["depths"],
                        partial_dim=(1, *fields["partial_widths"]), qk_dim=(8, 8, 8),
                        types=("i", "s", "s"))

  residual = r".*\.(pw2|proj\.1|conv3|[03]\.m|conv\.m)\.bn\.(weight|bias)"
  # All variances are 1e-5, as large as epsilon, with means and activations to match.
  probe = {r".*running_var": 1e-5, r".*running_mean": 3e-3,
           r".*\.proj\.1\.bn\.(weight|bias)": 1e-5, residual: 3e-3,
           r"patch_embed\.\d\.bn\.(weight|bias)": 3e-3,
           r".*\.(pw1|qkv|conv[12])\.bn\.(weight|bias)": 3e-3}
  # At 75 x 110 every side is odd in some layer.
  yield Case("shvit_s1", fields, ((96, 96), (75, 110)), build, probe, plain={residual: 0.5})


def lvvit():
  """The authors' LV-ViT. Set TOKEN_LABELING to a checkout of zihangJiang/TokenLabeling (GitHub)."""
  sys.path.insert(0, os.environ["TOKEN_LABELING"])
  from tlt.models.lvvit import LV_ViT

  def build(image_size):
    return LV_ViT(img_size=image_size, patch_size=8, embed_dim=24, depth=2, num_heads=3,
                  mlp_ratio=3.0, p_emb="4_2", skip_lam=2.0, return_dense=True, mix_token=True,
                  num_classes=CLASSES)

  def adapt(state, module):
    patches = module.patch_embed
    patches.grid_size = [side // 8 for side in patches.img_size]
    return resized_positions(1)(state, module)

  probe = {r"(cls_token|pos_embed|patch_embed\.proj\..*)": 3e-3,
           r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*": 3e-3,
           r"patch_embed\.conv1\.weight|.*\.running_mean": 3e-3, r".*\.running_var": 1e-5,
           r"patch_embed\.bn[12]\.(weight|bias)": 3e-3}
  fields = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
  yield Case("lvvit_s", fields, ((32, 32), (48, 32)), build, probe, adapt)


# Narrow stages; the third has an odd number of heads.
PYRAMID = {"widths": [8, 16, 20, 16], "depths": [1, 1, 2, 1], "heads": [1, 2, 5, 4],
           "mlp_ratios": [2, 2, 2, 2]}
THEIRS = {"embed_dims": PYRAMID["widths"], "depths": PYRAMID["depths"],
          "num_heads": PYRAMID["heads"], "mlp_ratios": PYRAMID["mlp_ratios"]}
PYRAMID_PROBE = {r".*\.(attn\.(proj|sr)|mlp\.fc2)\..*": 3e-3}


def pvt():
  """The authors' PVT v1, which resizes its positions. Set PVT to a checkout of whai362/PVT."""
  sys.path.insert(0, f"{os.environ['PVT']}/classification")
  import pvt as theirs

  def build(image_size):
    del image_size
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)   # as in their named models
    return theirs.PyramidVisionTransformer(img_size=64, patch_size=4, qkv_bias=True,
                                           norm_layer=norm, sr_ratios=[8, 4, 2, 1],
                                           num_classes=CLASSES, **THEIRS)

  probe = {r"cls_token|pos_embed\d|patch_embed1\.proj\.weight": 3e-3,
           r"patch_embed\d\.(proj\.bias|norm\..*)": 3e-3, **PYRAMID_PROBE}
  # 96 x 32 stretches the positions one way and shrinks them the other.
  yield Case("pvt_small", PYRAMID, ((64, 64), (96, 32)), build, probe)


def pvt_v2():
  """timm's PVT v2, with strided and with pooled (linear) keys."""
  import timm
  probe = {r"(patch_embed|.*\.downsample)\.(proj|norm)\..*": 3e-3, **PYRAMID_PROBE}
  for name, native in (("pvt_v2_b2", 64), ("pvt_v2_b2_li", 112)):

    def build(image_size, name=name):
      del image_size
      return timm.create_model(name, num_classes=CLASSES, **THEIRS)

    # At 45 x 70 there are partial patches and windows at the edges.
    yield Case(name, PYRAMID, ((native, native), (45, 70)), build, probe)


def inline():
  """The authors' InLine-DeiT and InLine-PVT. Set INLINE to a checkout of LeapLabTHU/InLine."""
  sys.path.insert(0, f"{os.environ['INLINE']}/models")
  import inline_deit
  import inline_pvt
  norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)

  def deit(image_size):
    return inline_deit.VisionTransformer(img_size=image_size[0], patch_size=8, embed_dim=24,
                                         depth=2, num_heads=3, num_classes=CLASSES)

  def pvt(image_size):
    del image_size
    return inline_pvt.PyramidVisionTransformer(
        img_size=64, patch_size=4, qkv_bias=True, norm_layer=norm, la_sr_ratios="1111",
        num_classes=CLASSES, **THEIRS)

  fields = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
  # Their attention accepts only square grids.
  yield Case("inline_deit_tiny", fields, ((32, 32), (48, 48)), deit, DEIT_PROBE,
             resized_positions(1))
  probe = {r"pos_embed\d|patch_embed1\.proj\.weight": 3e-3,
           r"patch_embed\d\.(proj\.bias|norm\..*)": 3e-3, **PYRAMID_PROBE}
  yield Case("inline_pvt_tiny", PYRAMID, ((64, 64), (96, 32)), pvt, probe)


def davit():
  """timm's DaViT: maps that windows fill exactly, maps that need padding, maps with odd sides."""
  import timm
  fields = {"widths": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "heads": [1, 2, 3, 4]}
  probe = {r"stem\..*|.*\.downsample\.conv\..*|.*\.cpe\d\.proj\.bias": 3e-3,
           r".*\.(attn\.proj|mlp\.fc2)\..*": 3e-3}
  for window in (7, 3):

    def build(image_size, window=window):
      del image_size
      return timm.create_model("davit_tiny", num_classes=CLASSES, window_size=window,
                               embed_dims=fields["widths"], depths=fields["depths"],
                               num_heads=fields["heads"])

    yield Case("davit_tiny", {**fields, "window_size": window}, ((56, 56), (45, 70)), build, probe)


def biformer():
  """The authors' BiFormer, and its Swin layout. Set BIFORMER to a checkout of rayleizhu/BiFormer,
  which also needs einops. It imports fairscale, but uses it only to recompute activations.
  """
  import types
  sys.modules["fairscale"] = sys.modules["fairscale.nn"] = types.ModuleType("fairscale.nn")
  sys.modules["fairscale.nn.checkpoint"] = types.SimpleNamespace(checkpoint_wrapper=None)
  sys.path.insert(0, os.environ["BIFORMER"])
  from models.biformer import BiFormer
  from models.biformer_stl import BiFormerSTL
  norm = torch.nn.BatchNorm2d
  sizes = {"depth": [1, 1, 2, 1], "embed_dim": [16, 32, 32, 16], "num_classes": CLASSES,
           "topks": [1, 2, 3, -2], "head_dim": 8}

  def tiny(image_size):
    del image_size
    return BiFormer(n_win=2, kv_downsample_mode="identity", kv_per_wins=[-1] * 4,
                    qk_dims=sizes["embed_dim"], mlp_ratios=[3] * 4, **sizes)

  def stl(image_size):
    del image_size
    return BiFormerSTL(n_wins=(2,) * 4, mlp_ratios=[4] * 4, norm_layer=norm, **sizes)

  fields = {"depths": [1, 1, 2, 1], "widths": [16, 32, 32, 16], "head_dim": 8, "regions": 2,
            "top_ks": [1, 2, 3]}
  # All variances are 1e-5, as large as epsilon, with means and activations to match.
  probe = {r".*running_var": 1e-5, r".*running_mean": 3e-3,
           r"downsample_layers\.\d\.\d\..*": 3e-3,
           r"stages\..*\.(attn\.(wo|proj)|mlp\.[23]|pos_embed)\..*": 1e-3}
  # At 64 x 96 regions are not square.
  for name, build in (("biformer_tiny", tiny), ("biformer_stl", stl)):
    yield Case(name, fields, ((64, 64), (64, 96)), build, probe)


def transnext():
  """The authors' TransNeXt without its CUDA kernels. Set TRANSNEXT to a checkout of
  DaiShiResearch/TransNeXt."""
  import types
  # The file imports this to check whether the kernels are installed: they are not.
  absent = types.ModuleType("pkg_resources")
  absent.DistributionNotFound = LookupError
  absent.get_distribution = {}.__getitem__
  sys.modules["pkg_resources"] = absent
  sys.path.insert(0, f"{os.environ['TRANSNEXT']}/classification")
  import transnext as theirs

  def build(image_size):
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)   # as in their named models
    return theirs.TransNeXt(img_size=image_size[0], pretrain_size=64, patch_size=4, qkv_bias=True,
                            norm_layer=norm, sr_ratios=[8, 4, 2, 1], num_classes=CLASSES, **THEIRS)

  probe = {r"patch_embed\d\.(proj|norm)\..*": 3e-3, r".*\.attn\.sr\..*": 3e-3,
           r".*\.(attn\.proj|mlp\.fc2)\..*": 3e-3}
  yield Case("transnext_tiny", {**PYRAMID, "pretrain_size": 64}, ((64, 64), (96, 96)), build, probe)


def compact_deit():
  """Our own PyTorch form of folded compact DeiTs: each site and layout of hallucinated heads."""
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  from experiments.torch_deit import CompactDeiT
  fields = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_ratio": 4.0, "in_chans": 3,
            "global_pool": "token", "deploy": True}
  filtered = {"method": "hmhsa", "site": "probs", "rank": 1, "kernel": 3, "layout": "map",
              "real_heads": "half"}
  factored = {"method": "cffn", "rank_ratio": 0.5, "factor": "output"}
  plans = [{"heads": filtered, "ffn": factored, "blocks": {"1": {"heads": None}}},
           {"heads": {**filtered, "layout": "grid", "rank": 2, "real_heads": 1},
            "ffn": {**factored, "factor": "both"}},
           {"heads": {**filtered, "site": "logits", "kernel": 5},
            "blocks": {"0": {"ffn": factored}}}]
  for plan, distilled in zip(plans, (True, True, False), strict=True):

    def build(image_size, plan=plan, distilled=distilled):
      return CompactDeiT({**fields, "image_size": list(image_size), "distilled": distilled,
                          "num_classes": CLASSES}, plan)

    name = f"deit_tiny{'_distilled' * distilled}_patch16_224"
    yield Case(name, {**fields, "plan": json.dumps(plan)}, ((32, 48),), build, DEIT_PROBE)


FAMILIES = {"deit": deit, "vit": vit, "compact_deit": compact_deit, "lvvit": lvvit,
            "nextvit": nextvit, "pvt": pvt, "pvt_v2": pvt_v2, "inline": inline, "davit": davit,
            "shvit": shvit, "biformer": biformer, "transnext": transnext}


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
  """Returns the part of a reference file for one case."""
  native = case.build(case.sizes[0]).state_dict()
  shapes = {name: list(tensor.shape) for name, tensor in native.items()}
  runs = [{"image_size": size, "logits": logits(case, shapes, size, case.plain),
           "probed": logits(case, shapes, size, case.probe)} for size in case.sizes]
  return {"model": case.model, "fields": {**case.fields, "num_classes": CLASSES},
          "shapes": shapes, "plain": case.plain, "probe": case.probe, "runs": runs}


def main(names):
  REFERENCES.mkdir(exist_ok=True)
  for name in names or FAMILIES:
    rows = [json.dumps(reference(case)) for case in FAMILIES[name]()]
    path = REFERENCES / f"{name}.json"
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(f"{path.name}: {len(rows)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
  main(sys.argv[1:])
