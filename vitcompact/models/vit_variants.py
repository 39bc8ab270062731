"""The named isotropic models with plain patch embeddings, with timm's names and sizes."""
from vitcompact.models.variant import Variant
from vitcompact.models.vit import VisionTransformer

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_SIZES = {   # width, depth, heads
    "tiny": (192, 12, 3), "small": (384, 12, 6), "small_plus": (384, 12, 6), "medium": (512, 12, 8),
    "base": (768, 12, 12), "large": (1024, 24, 16), "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16), "huge_plus": (1280, 32, 20), "giant": (1536, 40, 24),
    "7b": (4096, 40, 32)}


def _vit(size: str, patch_size: int = 16, image_size: int = 224, *, crop: float = 0.9, mean=None,
         std=None, crop_mode: str = "center", **fields) -> Variant:
  """Makes a variant; fields: of `VisionTransformer`, where they differ from its defaults."""
  width, depth, heads = _SIZES[size]
  sizes = {"width": width, "depth": depth, "heads": heads, "patch_size": patch_size,
           "image_size": image_size, **fields}
  defaults = VisionTransformer()
  sizes = {name: value for name, value in sizes.items()
           if name in ("width", "depth", "heads") or value != getattr(defaults, name)}
  prepared = {} if mean is None else {"mean": mean, "std": std}
  return Variant(VisionTransformer, sizes, crop=crop, crop_mode=crop_mode, **prepared)


def _clip(size: str, patch_size: int, image_size: int = 224, **options) -> Variant:
  return _vit(size, patch_size, image_size, pre_norm=True, epsilon=1e-5, **{**CLIP, **options})


def _siglip(size: str, patch_size: int, image_size: int, **options) -> Variant:
  ratio = {"mlp_ratio": 3.7362} if size == "so400m" else {}
  # For the widest models with patches of 16 pixels, timm uses GELU's tanh approximation.
  act = {"act": "gelu_tanh"} if (size, patch_size) == ("so400m", 16) else {}
  ragged = {"ragged": True} if image_size % patch_size else {}
  return _vit(size, patch_size, image_size, num_classes=0, **ragged,
              **{"class_token": False, "global_pool": "map", **HALF, **ratio, **act, **options})


def _dinov2(size: str, **options) -> Variant:
  gated = {"mlp_ratio": 8 / 3, "act": "swiglu"} if size == "giant" else {}
  return _vit(size, 14, 518, crop=1.0, layer_scale=1e-5, num_classes=0, **gated, **options)


def _dinov3(size: str) -> Variant:
  gated = {"small_plus": {"act": "swiglu"}, "huge_plus": {"act": "swiglu"},
           "7b": {"act": "swiglu", "mlp_ratio": 2.0}}.get(size, {})
  return _vit(size, 16, 256, crop=1.0, reg_tokens=4, pos_embed_of="none", rotary=100.0,
              layer_scale=1e-5, qkv_bias=False, epsilon=1e-5, global_pool="avg", norm_pooled=False,
              num_classes=0, **gated)


def _eva02(size: str, image_size: int, *, classes: bool) -> Variant:
  inner = {"ffn_norm": True} if size in ("base", "large") else {}
  inner |= {"crop_mode": "squash"} if image_size == 448 else {}
  return _vit(size, 14, image_size, rotary=10000.0, rotary_grid=16, act="swiglu", mlp_ratio=8 / 3,
              key_bias=False, global_pool="avg", **inner, **CLIP,
              **({"crop": 1.0} if classes else {"num_classes": 0}))


_DEIT = {f"deit_{size}{'_distilled' * distilled}_patch16_{pixels}":
         _vit(size, image_size=pixels, distilled=distilled, antialias=False,
              crop=0.9 if pixels == 224 else 1.0)
         for distilled in (False, True)
         for size, pixels in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))}
_DEIT3 = {f"deit3_{size}_patch{patch}_{pixels}":
          _vit(size, patch, pixels, crop=0.9 if pixels == 224 else 1.0, pos_embed_of="patches",
               layer_scale=1e-6)
          for size, patch, pixels in (
              ("small", 16, 224), ("small", 16, 384), ("medium", 16, 224), ("base", 16, 224),
              ("base", 16, 384), ("large", 16, 224), ("large", 16, 384), ("huge", 14, 224))}
_VIT = {f"vit_{size}_patch{patch}_{pixels}":
        _vit(size, patch, pixels, crop=0.9 if pixels == 224 else 1.0, **HALF)
        for size, patch, pixels in (
            ("tiny", 16, 224), ("tiny", 16, 384), ("small", 16, 224), ("small", 16, 384),
            ("small", 32, 224), ("small", 32, 384), ("base", 16, 224), ("base", 16, 384),
            ("base", 32, 224), ("base", 32, 384), ("base", 8, 224), ("large", 16, 224),
            ("large", 16, 384), ("large", 32, 384), ("large", 14, 224))}
# These were trained without a classifier.
_FEATURES = {
    "vit_small_patch8_224": _vit("small", 8, num_classes=0),
    "vit_large_patch32_224": _vit("large", 32, num_classes=0, **HALF),
    "vit_huge_patch14_224": _vit("huge", 14, num_classes=0, **HALF)}
_CLIP = {
    "vit_base_patch32_clip_224": _clip("base", 32),
    "vit_base_patch16_clip_224": _clip("base", 16, crop=0.95),
    "vit_large_patch14_clip_224": _clip("large", 14, crop=1.0, **HALF),
    "vit_large_patch14_clip_336": _clip("large", 14, 336, crop=1.0, crop_mode="squash", **HALF),
    "vit_huge_patch14_clip_224": _clip("huge", 14, crop=1.0),
    "vit_huge_patch14_clip_336": _clip("huge", 14, 336, crop=1.0, crop_mode="squash"),
    # OpenAI's activation; the head is CLIP's projection into the joint space of images and texts.
    "vit_base_patch32_clip_quickgelu_224": _clip("base", 32, act="quick_gelu", num_classes=512),
    "vit_base_patch16_clip_quickgelu_224": _clip("base", 16, act="quick_gelu", num_classes=512,
                                                 crop=1.0),
    "vit_large_patch14_clip_quickgelu_224": _clip("large", 14, act="quick_gelu", num_classes=768,
                                                  crop=1.0),
    "vit_large_patch14_clip_quickgelu_336": _clip("large", 14, 336, act="quick_gelu",
                                                  num_classes=768, crop=1.0),
    "vit_huge_patch14_clip_quickgelu_224": _clip("huge", 14, act="quick_gelu", num_classes=1024,
                                                 crop=1.0)}
_SIGLIP = {f"vit_{size}_patch{patch}_siglip_{gap}{pixels}":
           _siglip(size, patch, pixels, **({"global_pool": "avg", "norm_pooled": False} if gap
                                           else {}))
           for gap in ("", "gap_")
           for size, patch, pixels in (
               ("base", 16, 224), ("base", 16, 256), ("base", 16, 384), ("base", 16, 512),
               ("base", 32, 256), ("large", 16, 256), ("large", 16, 384), ("large", 16, 512),
               ("so400m", 14, 224), ("so400m", 14, 378), ("so400m", 14, 384), ("so400m", 16, 256),
               ("so400m", 16, 384), ("so400m", 16, 512))}
_SIGLIP["vit_so400m_patch14_siglip_gap_384"] = _SIGLIP[
    "vit_so400m_patch14_siglip_gap_384"]._replace(crop=1.0)
_DINOV2 = {
    **{f"vit_{size}_patch14_dinov2": _dinov2(size) for size in ("small", "base", "large", "giant")},
    **{f"vit_{size}_patch14_reg4_dinov2": _dinov2(size, reg_tokens=4, pos_embed_of="patches")
       for size in ("small", "base", "large", "giant")}}
_DINOV3 = {f"vit_{size}_patch16_dinov3": _dinov3(size)
           for size in ("small", "small_plus", "base", "large", "huge_plus", "7b")}
_EVA02 = {f"eva02_{size}_patch14_{pixels}": _eva02(size, pixels, classes=pixels > 224)
          for size, pixels in (("tiny", 224), ("tiny", 336), ("small", 224), ("small", 336),
                               ("base", 224), ("base", 448), ("large", 224), ("large", 448))}
VARIANTS = {**_DEIT, **_DEIT3, **_VIT, **_FEATURES, **_CLIP, **_SIGLIP, **_DINOV2, **_DINOV3,
            **_EVA02}
