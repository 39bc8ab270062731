"""Writes references.json: foreign names and shapes of small models, and what these compute.

  PYTHONPATH=. python tests/foreign/make_references.py

Needs torch, torchvision, timm 1.0.31 and transformers 5.24 besides this package. Weights and images
are drawn at random (cases.py), not stored. For models of transformers and torchvision, the
reference is their own output; files of Google, CLIP, DINOv2, DINOv3, DeiT III and MAE are read
by timm's converters, and the reference is timm's output. A case is refused here if timm's model,
with the weights as we translate them, computes anything else.
"""
import json
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

from tests.foreign.cases import REFERENCES, drawn_state, one_image
from vitcompact import foreign

_SCHEMAS = torch.library.Library("torchvision", "DEF")
_SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
warnings.simplefilter("ignore")

import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers as hf  # noqa: E402
from timm.models import eva, vision_transformer  # noqa: E402

hf.logging.set_verbosity_error()

CLASSES, WIDTH, DEPTH, HEADS, PATCH, SIZE = 5, 24, 2, 3, 8, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
         "intermediate_size": 2 * WIDTH, "image_size": SIZE, "patch_size": PATCH,
         "num_labels": CLASSES}
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
        "intermediate_size": 12, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
PYRAMID = {"image_size": 64, "depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32],
           "num_attention_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2], "num_labels": CLASSES}
OURS = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "mlp_ratio": 2.0,
        "image_size": SIZE}


class Case(NamedTuple):
  """name: the source. model, fields: as for our `create_model`.
  output: (timm's or their model, images) -> tensor.
  """
  name: str
  model: str
  fields: dict[str, Any]
  theirs: dict[str, np.ndarray]         # the state dict in their file
  expected: torch.Tensor
  timm: torch.nn.Module | None
  output: Callable
  live: tuple[str, ...] = ()            # names in memory, if different
  config: dict[str, Any] | None = None  # the config.json of the weights


def small(name, **fields):
  """Returns timm's model in our sizes."""
  sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH,
           "num_heads": HEADS, "mlp_ratio": 2.0, "num_classes": CLASSES}
  return timm.create_model(name, **{**sizes, **fields}).eval()


def images(size=SIZE):
  return torch.from_numpy(one_image(size)).permute(0, 3, 1, 2).contiguous()


def of_transformers(name, model, fields, kind, config, theirs_output, timm_model=None,
                    timm_output=None, size=SIZE):
  """Returns the case of a transformers model: its file's names, its output with random weights."""
  with tempfile.TemporaryDirectory() as folder:
    network = kind(config)
    network.save_pretrained(folder)
    path = pathlib.Path(folder) / "model.safetensors"
    shapes = {key: value.shape for key, value in safetensors.numpy.load_file(path).items()}
    state = drawn_state(shapes)
    about = json.loads((pathlib.Path(folder) / "config.json").read_text())
    safetensors.numpy.save_file(state, path, metadata={"format": "pt"})
    loaded = kind.from_pretrained(folder, attn_implementation="eager").eval()
  with torch.no_grad():
    expected = theirs_output(loaded, images(size))
  live = tuple(network.state_dict())
  return Case(name, model, fields, state, expected, timm_model, timm_output,
              live if set(live) != set(shapes) else (), about)


def logits(model, x):
  return model(pixel_values=x).logits


def hidden(model, x):
  return model(pixel_values=x).last_hidden_state


def call(model, x):
  return model(x)


def tokens(model, x):
  return model.forward_features(x)


def transformers_cases():
  vit = hf.ViTConfig(**SIZES, layer_norm_eps=1e-6)   # Google's; the default is 1e-12
  yield of_transformers("transformers ViT", "vit_tiny_patch16_224",
                        {**OURS, "num_classes": CLASSES}, hf.ViTForImageClassification, vit, logits,
                        small("vit_tiny_patch16_224"), call)
  yield of_transformers("transformers ViT without classifier", "vit_tiny_patch16_224",
                        {**OURS, "num_classes": 0}, hf.ViTModel, vit,
                        lambda model, x: hidden(model, x)[:, 0],
                        small("vit_tiny_patch16_224", num_classes=0), call)
  deit = hf.DeiTConfig(**SIZES, layer_norm_eps=1e-6)
  yield of_transformers("transformers DeiT", "deit_tiny_distilled_patch16_224",
                        {**OURS, "num_classes": CLASSES}, hf.DeiTForImageClassificationWithTeacher,
                        deit, logits, small("deit_tiny_distilled_patch16_224"), call)
  mae = hf.ViTMAEConfig(**SIZES, layer_norm_eps=1e-6, mask_ratio=0.0, decoder_hidden_size=12,
                        decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                        decoder_intermediate_size=12)

  def unmasked(model, x):   # it still shuffles, by the given noise: in order
    noise = torch.arange(16.0)[None].repeat(len(x), 1)
    return model.vit(pixel_values=x, noise=noise).last_hidden_state[:, 0]
  yield of_transformers("transformers MAE", "vit_base_patch16_224", {**OURS, "num_classes": 0},
                        hf.ViTMAEForPreTraining, mae, unmasked,
                        small("vit_base_patch16_224", num_classes=0), call)
  yield of_transformers("transformers DINOv2", "vit_small_patch14_dinov2",
                        {**OURS, "num_classes": 0}, hf.Dinov2Model, hf.Dinov2Config(**DINO), hidden,
                        small("vit_small_patch14_dinov2", num_classes=0), tokens)
  yield of_transformers("transformers DINOv2 with SwiGLU", "vit_giant_patch14_dinov2",
                        {**OURS, "num_classes": 0, "mlp_ratio": 64 / 24}, hf.Dinov2Model,
                        hf.Dinov2Config(**{**DINO, "mlp_ratio": 4}, use_swiglu_ffn=True), hidden,
                        small("vit_giant_patch14_dinov2", num_classes=0, mlp_ratio=2.66667 * 2),
                        tokens)
  yield of_transformers("transformers DINOv2 with registers", "vit_small_patch14_reg4_dinov2",
                        {**OURS, "num_classes": 0}, hf.Dinov2WithRegistersModel,
                        hf.Dinov2WithRegistersConfig(**DINO), hidden,
                        small("vit_small_patch14_reg4_dinov2", num_classes=0), tokens)
  for gated in (False, True):
    for bias in (False, True):
      config = hf.DINOv3ViTConfig(**SIZES, num_register_tokens=4, use_gated_mlp=gated,
                                  query_bias=bias, value_bias=bias, layer_norm_eps=1e-5,
                                  hidden_act="silu" if gated else "gelu")
      name = f"vit_small{'_plus' * gated}_patch16_dinov3{'_qkvb' * bias}"
      yield of_transformers(
          f"transformers DINOv3{' gated' * gated}{' with biases' * bias}",
          name.removesuffix("_qkvb"),
          {**OURS, "num_classes": 0, **({"qkv_bias": True} if bias else {})},
          hf.DINOv3ViTModel, config, hidden,
          small(name, num_classes=0), tokens)
  clip = hf.CLIPConfig(text_config=TEXT, vision_config={**SIZES, "projection_dim": 7},
                       projection_dim=7)
  for act, infix in (("quick_gelu", "_quickgelu"), ("gelu", "")):
    clip.vision_config.hidden_act = act
    name = f"vit_base_patch16_clip{infix}_224"
    yield of_transformers(f"transformers CLIP {act}", name, {**OURS, "num_classes": 7},
                          hf.CLIPModel, clip,
                          lambda model, x: pooled(model.get_image_features(pixel_values=x)),
                          small(name, num_classes=7), call)
  yield of_transformers("transformers CLIP vision", "vit_base_patch16_clip_224",
                        {**OURS, "num_classes": 0}, hf.CLIPVisionModel, clip.vision_config,
                        lambda model, x: model(pixel_values=x).pooler_output,
                        small("vit_base_patch16_clip_224", num_classes=0), call)
  siglip = hf.SiglipConfig(text_config={**TEXT, "projection_size": WIDTH}, vision_config=SIZES)
  yield of_transformers("transformers SigLIP", "vit_base_patch16_siglip_224",
                        {**OURS, "num_classes": 0, "act": "gelu_tanh"}, hf.SiglipModel, siglip,
                        lambda model, x: pooled(model.get_image_features(pixel_values=x)),
                        small("vit_base_patch16_siglip_224", num_classes=0,
                              act_layer="gelu_tanh"), call)
  ours = {"depths": PYRAMID["depths"], "widths": PYRAMID["hidden_sizes"],
          "heads": PYRAMID["num_attention_heads"], "mlp_ratios": PYRAMID["mlp_ratios"],
          "image_size": 64, "num_classes": CLASSES}
  yield of_transformers("transformers PVT", "pvt_tiny", ours, hf.PvtForImageClassification,
                        hf.PvtConfig(**PYRAMID), logits, size=64)
  for linear in (False, True):
    fields = {"depths": PYRAMID["depths"], "num_classes": CLASSES, "linear": linear,
              "embed_dims": PYRAMID["hidden_sizes"], "num_heads": PYRAMID["num_attention_heads"],
              "mlp_ratios": PYRAMID["mlp_ratios"]}
    yield of_transformers(f"transformers PVT v2{' linear' * linear}",
                          f"pvt_v2_b2{'_li' * linear}", ours, hf.PvtV2ForImageClassification,
                          hf.PvtV2Config(**PYRAMID, linear_attention=linear), logits,
                          timm.create_model("pvt_v2_b2", **fields).eval(), call, size=64)


def pooled(out):
  return out if isinstance(out, torch.Tensor) else out.pooler_output


def torchvision_case():
  model = torchvision.models.VisionTransformer(SIZE, PATCH, DEPTH, HEADS, WIDTH, 2 * WIDTH,
                                               num_classes=CLASSES).eval()
  state = drawn_state({name: value.shape for name, value in model.state_dict().items()})
  model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
  with torch.no_grad():
    expected = model(images())
  return Case("torchvision ViT", "deit_tiny_patch16_224", {**OURS, "num_classes": CLASSES}, state,
              expected, small("deit_tiny_patch16_224"), call)


def google_shapes(front, stacked, mha, mlp, norm, positions):
  """Returns names and shapes of a .npz of vision_transformer or big_vision."""
  d, h, w = WIDTH // HEADS, HEADS, WIDTH
  block = {"LayerNorm_0/scale": (w,), "LayerNorm_0/bias": (w,), f"LayerNorm_{norm}/scale": (w,),
           f"LayerNorm_{norm}/bias": (w,),
           **{f"MultiHeadDotProductAttention_{mha}/{name}/{leaf}": shape
              for name in ("query", "key", "value")
              for leaf, shape in (("kernel", (w, h, d)), ("bias", (h, d)))},
           f"MultiHeadDotProductAttention_{mha}/out/kernel": (h, d, w),
           f"MultiHeadDotProductAttention_{mha}/out/bias": (w,),
           f"MlpBlock_{mlp}/Dense_0/kernel": (w, 2 * w), f"MlpBlock_{mlp}/Dense_0/bias": (2 * w,),
           f"MlpBlock_{mlp}/Dense_1/kernel": (2 * w, w), f"MlpBlock_{mlp}/Dense_1/bias": (w,)}
  shapes = {"embedding/kernel": (PATCH, PATCH, 3, w), "embedding/bias": (w,),
            positions: (1, 17, w), "cls": (1, 1, w), "head/kernel": (w, CLASSES),
            "head/bias": (CLASSES,), "Transformer/encoder_norm/scale": (w,),
            "Transformer/encoder_norm/bias": (w,)}
  for i in [None] if stacked else range(DEPTH):
    path = "Transformer/encoderblock" + ("" if stacked else f"_{i}")
    shapes |= {f"{path}/{name}": (DEPTH, *shape) if stacked else shape
               for name, shape in block.items()}
  return {front + name: shape for name, shape in shapes.items()}


def map_head_shapes():
  """Returns names and shapes of big_vision's SigLIP encoder: attention pooling, no class token."""
  shapes = google_shapes("params/img/", True, 0, 0, 1, "pos_embedding")
  shapes = {name: shape for name, shape in shapes.items() if "/head/" not in name
            and not name.endswith("/cls")}
  shapes["params/img/pos_embedding"] = (1, 16, WIDTH)
  d, w, pool = WIDTH // HEADS, WIDTH, "params/img/MAPHead_0"
  shapes |= {f"{pool}/MultiHeadDotProductAttention_0/{name}/{leaf}": shape
             for name in ("query", "key", "value")
             for leaf, shape in (("kernel", (w, HEADS, d)), ("bias", (HEADS, d)))}
  return shapes | {
      f"{pool}/probe": (1, 1, w), f"{pool}/LayerNorm_0/scale": (w,),
      f"{pool}/LayerNorm_0/bias": (w,),
      f"{pool}/MultiHeadDotProductAttention_0/out/kernel": (HEADS, d, w),
      f"{pool}/MultiHeadDotProductAttention_0/out/bias": (w,),
      f"{pool}/MlpBlock_0/Dense_0/kernel": (w, 2 * w), f"{pool}/MlpBlock_0/Dense_0/bias": (2 * w,),
      f"{pool}/MlpBlock_0/Dense_1/kernel": (2 * w, w), f"{pool}/MlpBlock_0/Dense_1/bias": (w,),
      "params/txt/Encoder_0/encoder_norm/scale": (12,), "params/t": (1,), "params/b": (1,)}


def google_cases():
  fields = {**OURS, "num_classes": CLASSES}
  old = google_shapes("", False, 1, 3, 2, "Transformer/posembed_input/pos_embedding")
  extra = {"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)}
  rows = (("Google vision_transformer", "vit_tiny_patch16_224", fields, old | extra, {}),
          ("Google big_vision, scanned", "vit_tiny_patch16_224", fields,
           google_shapes("params/", True, 0, 0, 1, "pos_embedding"), {}),
          ("Google big_vision SigLIP", "vit_base_patch16_siglip_224",
           {**fields, "num_classes": 0, "act": "gelu_tanh"},
           map_head_shapes(), {"num_classes": 0, "act_layer": "gelu_tanh"}))
  for name, model, ours, shapes, changes in rows:
    state, reference = drawn_state(shapes), small(model, **changes)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
      np.savez(f"{folder}/weights.npz", **state)
      reference.load_pretrained(f"{folder}/weights.npz")
      yield Case(name, model, ours, state, reference(images()), small(model, **changes), call)


def by_timm(name, model, ours, shapes, output, convert, **changes):
  """Returns the case of a file that timm's converter reads, with timm's output."""
  state = drawn_state(shapes)
  reference = small(model, **changes)
  given = convert({key: torch.from_numpy(value.copy()) for key, value in state.items()}, reference)
  reference.load_state_dict({key: value for key, value in given.items()
                             if not key.startswith("decoder")})
  with torch.no_grad():
    expected = output(reference, images())
  return Case(name, model.removesuffix("_qkvb"), ours, state, expected, small(model, **changes),
              output)


def block_shapes(gated=(), layer_scale=None, chunk=False, depth=DEPTH):
  """Returns names and shapes of timm's blocks, with names that differ in foreign training code."""
  w = WIDTH
  shapes = {}
  for i in range(depth):
    front = f"blocks.0.{i}" if chunk else f"blocks.{i}"
    ffn = gated or (("fc1", (2 * w, w)), ("fc2", (w, 2 * w)))
    shapes |= {f"{front}.{norm}.{leaf}": (w,) for norm in ("norm1", "norm2")
               for leaf in ("weight", "bias")}
    shapes |= {f"{front}.attn.qkv.weight": (3 * w, w), f"{front}.attn.qkv.bias": (3 * w,),
               f"{front}.attn.proj.weight": (w, w), f"{front}.attn.proj.bias": (w,)}
    shapes |= {f"{front}.mlp.{layer}.weight": shape for layer, shape in ffn}
    shapes |= {f"{front}.mlp.{layer}.bias": shape[:1] for layer, shape in ffn}
    if layer_scale:
      shapes |= {f"{front}.{layer_scale.format(n)}": (w,) for n in (1, 2)}
  return shapes


def authors_cases():
  w, features = WIDTH, {**OURS, "num_classes": 0}
  ends = {"cls_token": (1, 1, w), "patch_embed.proj.weight": (w, 3, PATCH, PATCH),
          "patch_embed.proj.bias": (w,), "norm.weight": (w,), "norm.bias": (w,)}
  positions = {"pos_embed": (1, 17, w)}
  head = {"head.weight": (CLASSES, w), "head.bias": (CLASSES,)}
  timms = vision_transformer.checkpoint_filter_fn
  yield by_timm("DINOv2", "vit_small_patch14_dinov2", features,
                ends | positions | block_shapes(layer_scale="ls{}.gamma") | {"mask_token": (1, w)},
                tokens, timms, num_classes=0)
  swiglu = (("w12", (128, w)), ("w3", (w, 64)))
  yield by_timm("DINOv2 with SwiGLU and registers", "vit_giant_patch14_reg4_dinov2",
                {**features, "mlp_ratio": 64 / 24},
                ends | positions | block_shapes(swiglu, "ls{}.gamma")
                | {"mask_token": (1, w), "register_tokens": (1, 4, w)},
                tokens, timms, num_classes=0, mlp_ratio=2.66667 * 2)
  for gated in (False, True):
    ffn = (("w1", (2 * w, w)), ("w2", (2 * w, w)), ("w3", (w, 2 * w))) if gated else ()
    name = f"vit_small{'_plus' * gated}_patch16_dinov3_qkvb"
    masks = {f"blocks.{i}.attn.qkv.bias_mask": (3 * w,) for i in range(DEPTH)}
    yield by_timm(f"DINOv3{' gated' * gated}", name, {**features, "qkv_bias": True},
                  ends | block_shapes(ffn, "ls{}.gamma") | masks
                  | {"mask_token": (1, w), "storage_tokens": (1, 4, w), "rope_embed.periods": (2,)},
                  tokens, eva.checkpoint_filter_fn, num_classes=0)
  yield by_timm("DeiT III", "deit3_small_patch16_224", {**OURS, "num_classes": CLASSES},
                ends | {"pos_embed": (1, 16, w)} | head | block_shapes(layer_scale="gamma_{}"),
                call, lambda state, model: timms(state, model, adapt_layer_scale=True))
  decoder = {"decoder_pos_embed": (1, 17, 12), "decoder_embed.weight": (12, w),
             "decoder_embed.bias": (12,), "decoder_norm.weight": (12,), "decoder_norm.bias": (12,),
             "decoder_blocks.0.attn.qkv.weight": (36, 12), "decoder_pred.weight": (192, 12),
             "decoder_pred.bias": (192,), "mask_token": (1, 1, 12)}
  yield by_timm("MAE", "vit_base_patch16_224", features,
                ends | positions | block_shapes() | decoder, call, timms, num_classes=0)
  clip = {"class_embedding": (w,), "positional_embedding": (17, w), "proj": (w, 7),
          "conv1.weight": (w, 3, PATCH, PATCH), "ln_pre.weight": (w,), "ln_pre.bias": (w,),
          "ln_post.weight": (w,), "ln_post.bias": (w,)}
  for i in range(DEPTH):
    block = f"transformer.resblocks.{i}"
    clip |= {f"{block}.{name}": shape for name, shape in (
        ("ln_1.weight", (w,)), ("ln_1.bias", (w,)), ("ln_2.weight", (w,)), ("ln_2.bias", (w,)),
        ("attn.in_proj_weight", (3 * w, w)), ("attn.in_proj_bias", (3 * w,)),
        ("attn.out_proj.weight", (w, w)), ("attn.out_proj.bias", (w,)),
        ("mlp.c_fc.weight", (2 * w, w)), ("mlp.c_fc.bias", (2 * w,)),
        ("mlp.c_proj.weight", (w, 2 * w)), ("mlp.c_proj.bias", (w,)))}
  text = {"transformer.resblocks.0.attn.in_proj_weight": (36, 12), "ln_final.weight": (12,),
          "transformer.resblocks.0.ln_1.weight": (12,), "token_embedding.weight": (9, 12),
          "positional_embedding": (8, 12), "text_projection": (12, 7), "logit_scale": ()}
  yield by_timm("CLIP", "vit_base_patch16_clip_quickgelu_224", {**OURS, "num_classes": 7},
                {f"visual.{name}": shape for name, shape in clip.items()} | text, call, timms,
                num_classes=7)
  trunk = ends | positions | block_shapes() | {"norm_pre.weight": (w,), "norm_pre.bias": (w,)}
  trunk.pop("patch_embed.proj.bias")
  yield by_timm("open_clip with timm's trunk", "vit_base_patch16_clip_224",
                {**OURS, "num_classes": 7},
                {f"visual.trunk.{name}": shape for name, shape in trunk.items()}
                | {"visual.head.proj.weight": (7, w)} | {f"text.{name}": shape
                                                         for name, shape in text.items()},
                call, timms, num_classes=7)


def main():
  rows = []
  for case in [*transformers_cases(), torchvision_case(), *google_cases(), *authors_cases()]:
    state = dict(case.theirs)
    row = {"name": case.name, "model": case.model, "fields": case.fields,
           "shapes": {name: list(value.shape) for name, value in state.items()},
           "wanted": np.round(case.expected.numpy().astype(np.float64), 6).tolist()}
    if case.config:
      row["config"] = case.config
    if case.live:
      row["live"] = list(case.live)
    if case.timm is not None:
      shapes = {name: tuple(value.shape) for name, value in case.timm.state_dict().items()}
      new = foreign.find(state, set(shapes))[0]
      found = {name: value.shape for name, value in new.state.items()}
      assert found == shapes, (case.name, found.items() ^ shapes.items())
      case.timm.load_state_dict({name: torch.from_numpy(np.array(value))
                                 for name, value in new.state.items()})
      with torch.no_grad():
        got = case.output(case.timm, images(case.fields["image_size"]))
      difference = float((got - case.expected).abs().max())
      assert difference < 1e-5 * max(1, float(case.expected.abs().max())), (case.name, difference)
      print(f"{case.name}: {difference:.1e} of {float(case.expected.abs().max()):.2f}")
      row["timm"] = {name: list(shape) for name, shape in shapes.items()}
    rows.append(json.dumps(row))
  REFERENCES.write_text("[\n" + ",\n".join(rows) + "\n]\n")
  print(f"{REFERENCES.name}: {len(rows)} cases, {REFERENCES.stat().st_size} bytes")


if __name__ == "__main__":
  main()
