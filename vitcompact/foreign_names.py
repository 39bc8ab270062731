"""Other libraries' names of weights: a table of sources, each a list of rules.

A rule maps a name to timm's (the authors' for PVT), and its values to timm's layout. A name may
have any prefix before the part that the rule matches; the prefix is kept. In a rule

  {i}          is a number, and {p} is weight or bias: the same on both sides
  {q|k|v}      are parts of one tensor, joined in this order
"""
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcompact.foreign_tensors import to_float32
from vitcompact.torch_names import to_tensor


class Rule(NamedTuple):
  """old -> new; join: maps the list of parts (None for an absent one) to the array; None: as is."""
  old: str
  new: str
  join: Callable[[list[np.ndarray | None]], np.ndarray] | None = None


class Source(NamedTuple):
  """A library or training code whose names we read.

  name: whose the names are. sign: a regular expression that matches part of one of its names.
  left_out: {regular expression of whole names: what they are} of parts that no model here has.
  before, after: functions of the whole state dict, called before and after the rules.
  refusal: why it is not supported, and what to do; "" if it is.
  """
  name: str
  sign: str
  rules: Sequence[Rule] = ()
  left_out: Mapping[str, str] = {}
  before: Callable[[dict[str, Any]], dict[str, Any]] | None = None
  after: Callable[[dict[str, Any]], dict[str, Any]] | None = None
  refusal: str = ""


def rows(parts):
  return np.concatenate(parts)


def rows_or_zeros(parts):
  """An absent part becomes zero, such as the bias of the keys, which some models do not have."""
  present = next(part for part in parts if part is not None)
  return np.concatenate([np.zeros_like(present) if part is None else part for part in parts])


def token(parts):
  """(D,) or (1, D) -> (1, 1, D)."""
  return parts[0].reshape(1, 1, -1)


def batched(parts):
  """(N, D) -> (1, N, D)."""
  return parts[0][None]


def transposed(parts):
  return parts[0].T


def first_third(parts):
  return parts[0][:len(parts[0]) // 3]


def last_thirds(parts):
  return parts[0][len(parts[0]) // 3:]


def flax(layout: str):
  """A join from a Flax leaf to PyTorch's tensor, see `torch_names.Entry`."""
  return functools.partial(to_tensor, layout)


def patch_positions_only(state):
  """Adds the class token's position to the token itself in models with registers: there timm has
  positions of patches only."""
  out = dict(state)
  for name in state:
    prefix, found, _ = name.rpartition("reg_token")
    cls, pos = f"{prefix}cls_token", f"{prefix}pos_embed"
    if found and {cls, pos} <= state.keys():
      positions = to_float32(pos, state[pos])
      out[cls] = to_float32(cls, state[cls]) + positions[:, :1]
      out[pos] = positions[:, 1:]
  return out


def masked_biases(state):
  """Applies the masks by which DINOv3 keeps the bias of its keys at zero."""
  out = {name: value for name, value in state.items() if not name.endswith(".qkv.bias_mask")}
  for name in state.keys() - out.keys():
    bias = name.removesuffix("_mask")
    if bias in state:
      out[bias] = np.where(to_float32(name, state[name]) == 0, 0, to_float32(bias, state[bias]))
  return out


def eva02_biases_and_norm(state):
  """EVA-02 stores biases separately from their projections, and in masked pre-training calls the
  norm of pooled features its last norm; timm does neither."""
  separate = any(name.endswith(".attn.q_proj.weight") for name in state)
  pretrained = not any(re.search(r"(^|\.)(head|fc_norm)\.weight$", name) for name in state)

  def renamed(name):
    name = re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name) if separate else name
    return re.sub(r"(^|\.)norm\.(weight|bias)$", r"\1fc_norm.\2", name) if pretrained else name

  return {renamed(name): value for name, value in state.items()}


def bias_of_projection(state):
  """CLIP's projection has no bias; timm has it as the classifier, with a zero bias."""
  heads = [name.removesuffix("weight") for name in state if re.search(r"(^|\.)head\.weight$", name)]
  return {f"{head}bias": np.zeros(state[f"{head}weight"].shape[0], np.float32)
          for head in heads} | state


def unstacked(state):
  """Splits the stacked blocks of a scanned encoder into separate blocks."""
  out = {}
  for name, value in state.items():
    front, found, rest = name.partition("Transformer/encoderblock/")
    if found:
      out |= {f"{front}Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(value)}
    else:
      out[name] = value
  return out


def named(pairs: Mapping[str, str]) -> list[Rule]:
  """Rules for layers whose weights and biases are only renamed."""
  return [Rule(f"{old}.{{p}}", f"{new}.{{p}}") for old, new in pairs.items()]


TRANSFORMERS = "transformers'"
MASK_TOKEN = {r"(.+\.)?mask_token": "the token of masked patches"}

# transformers 5 uses other names in memory than in its files.
_VIT_BLOCK = "(?:encoder.layer|layers).{i}"
VIT = [
    Rule("embeddings.cls_token", "cls_token"),
    Rule("embeddings.distillation_token", "dist_token"),
    Rule("embeddings.register_tokens", "reg_token"),
    Rule("embeddings.position_embeddings", "pos_embed"),
    Rule(f"{_VIT_BLOCK}.attention.attention.{{query|key|value}}.{{p}}", "blocks.{i}.attn.qkv.{p}",
         rows),
    Rule(f"{_VIT_BLOCK}.attention.{{q_proj|k_proj|v_proj}}.{{p}}", "blocks.{i}.attn.qkv.{p}", rows),
    Rule(f"{_VIT_BLOCK}.mlp.{{gate_proj|up_proj}}.{{p}}", "blocks.{i}.mlp.fc1.{p}", rows),
    Rule(f"{_VIT_BLOCK}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    Rule(f"{_VIT_BLOCK}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    *named({
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        f"{_VIT_BLOCK}.attention.output.dense": "blocks.{i}.attn.proj",
        f"{_VIT_BLOCK}.attention.o_proj": "blocks.{i}.attn.proj",
        f"{_VIT_BLOCK}.(?:layernorm_before|norm1)": "blocks.{i}.norm1",
        f"{_VIT_BLOCK}.(?:layernorm_after|norm2)": "blocks.{i}.norm2",
        f"{_VIT_BLOCK}.(?:intermediate.dense|mlp.fc1|mlp.weights_in)": "blocks.{i}.mlp.fc1",
        f"{_VIT_BLOCK}.(?:output.dense|mlp.fc2|mlp.weights_out|mlp.down_proj)":
            "blocks.{i}.mlp.fc2",
        "layernorm": "norm", "(?:cls_)?classifier": "head", "distillation_classifier": "head_dist",
    }),
]

_DINOV3_BLOCK = "(?:model.)?layer.{i}"
DINOV3 = [
    Rule("embeddings.cls_token", "cls_token"),
    Rule("embeddings.register_tokens", "reg_token"),
    Rule(f"{_DINOV3_BLOCK}.attention.{{q_proj|k_proj|v_proj}}.weight", "blocks.{i}.attn.qkv.weight",
         rows),
    Rule(f"{_DINOV3_BLOCK}.attention.{{q_proj|k_proj|v_proj}}.bias", "blocks.{i}.attn.qkv.bias",
         rows_or_zeros),
    Rule(f"{_DINOV3_BLOCK}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    Rule(f"{_DINOV3_BLOCK}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    *named({
        "embeddings.patch_embeddings": "patch_embed.proj",
        f"{_DINOV3_BLOCK}.attention.o_proj": "blocks.{i}.attn.proj",
        f"{_DINOV3_BLOCK}.norm1": "blocks.{i}.norm1", f"{_DINOV3_BLOCK}.norm2": "blocks.{i}.norm2",
        f"{_DINOV3_BLOCK}.mlp.down_proj": "blocks.{i}.mlp.fc2",
    }),
]
DINOV3_PLAIN = named({f"{_DINOV3_BLOCK}.mlp.up_proj": "blocks.{i}.mlp.fc1"})
DINOV3_GATED = named({f"{_DINOV3_BLOCK}.mlp.gate_proj": "blocks.{i}.mlp.fc1_g",
                      f"{_DINOV3_BLOCK}.mlp.up_proj": "blocks.{i}.mlp.fc1_x"})

CLIP_AND_SIGLIP = [
    Rule("embeddings.class_embedding", "cls_token", token),
    Rule("embeddings.position_embedding.weight", "pos_embed", batched),
    Rule("encoder.layers.{i}.self_attn.{q_proj|k_proj|v_proj}.{p}", "blocks.{i}.attn.qkv.{p}",
         rows),
    Rule("head.probe", "attn_pool.latent"),
    Rule("head.attention.in_proj_{p}", "attn_pool.q.{p}", first_third),
    Rule("head.attention.in_proj_{p}", "attn_pool.kv.{p}", last_thirds),
    *named({
        "embeddings.patch_embedding": "patch_embed.proj", "pre_layrnorm": "norm_pre",
        "encoder.layers.{i}.self_attn.out_proj": "blocks.{i}.attn.proj",
        "encoder.layers.{i}.layer_norm1": "blocks.{i}.norm1",
        "encoder.layers.{i}.layer_norm2": "blocks.{i}.norm2",
        "encoder.layers.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
        "encoder.layers.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
        "post_layernorm": "norm", "visual_projection": "head",
        "head.attention.out_proj": "attn_pool.proj", "head.layernorm": "attn_pool.norm",
        "head.mlp.fc1": "attn_pool.mlp.fc1", "head.mlp.fc2": "attn_pool.mlp.fc2",
    }),
]

_SELF = "attention.self"
PVT = [
    Rule("encoder.patch_embeddings.3.cls_token", "cls_token"),
    *[rule for s in range(4) for rule in (
        Rule(f"encoder.patch_embeddings.{s}.position_embeddings", f"pos_embed{s + 1}"),
        Rule(f"encoder.block.{s}.{{i}}.{_SELF}.{{key|value}}.{{p}}",
             f"block{s + 1}.{{i}}.attn.kv.{{p}}", rows),
        *named({
            f"encoder.patch_embeddings.{s}.projection": f"patch_embed{s + 1}.proj",
            f"encoder.patch_embeddings.{s}.layer_norm": f"patch_embed{s + 1}.norm",
            **{f"encoder.block.{s}.{{i}}.{old}": f"block{s + 1}.{{i}}.{new}" for old, new in (
                (f"{_SELF}.query", "attn.q"), (f"{_SELF}.sequence_reduction", "attn.sr"),
                (f"{_SELF}.layer_norm", "attn.norm"), ("attention.output.dense", "attn.proj"),
                ("layer_norm_1", "norm1"), ("layer_norm_2", "norm2"),
                ("mlp.dense1", "mlp.fc1"), ("mlp.dense2", "mlp.fc2"))}}))],
    *named({"encoder.layer_norm": "norm", "classifier": "head"}),
]

PVT_V2 = [
    *[rule for s in range(4) for rule in (
        Rule(f"encoder.layers.{s}.blocks.{{i}}.attention.{{key|value}}.{{p}}",
             f"stages.{s}.blocks.{{i}}.attn.kv.{{p}}", rows),
        *named({
            f"encoder.layers.{s}.patch_embedding.proj":
                f"stages.{s}.downsample.proj" if s else "patch_embed.proj",
            f"encoder.layers.{s}.patch_embedding.layer_norm":
                f"stages.{s}.downsample.norm" if s else "patch_embed.norm",
            f"encoder.layers.{s}.layer_norm": f"stages.{s}.norm",
            **{f"encoder.layers.{s}.blocks.{{i}}.{old}": f"stages.{s}.blocks.{{i}}.{new}"
               for old, new in (
                   ("attention.query", "attn.q"), ("attention.spatial_reduction", "attn.sr"),
                   ("attention.layer_norm", "attn.norm"), ("attention.proj", "attn.proj"),
                   ("layer_norm_1", "norm1"), ("layer_norm_2", "norm2"),
                   ("mlp.dense1", "mlp.fc1"), ("mlp.dwconv.dwconv", "mlp.dwconv"),
                   ("mlp.dense2", "mlp.fc2"))}}))],
    *named({"classifier": "head"}),
]

TORCHVISION = [
    Rule("class_token", "cls_token"), Rule("encoder.pos_embedding", "pos_embed"),
    Rule("encoder.layers.encoder_layer_{i}.self_attention.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
    *named({
        "conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head",
        "encoder.layers.encoder_layer_{i}.self_attention.out_proj": "blocks.{i}.attn.proj",
        "encoder.layers.encoder_layer_{i}.ln_1": "blocks.{i}.norm1",
        "encoder.layers.encoder_layer_{i}.ln_2": "blocks.{i}.norm2",
        "encoder.layers.encoder_layer_{i}.mlp.(?:linear_1|0)": "blocks.{i}.mlp.fc1",
        "encoder.layers.encoder_layer_{i}.mlp.(?:linear_2|3)": "blocks.{i}.mlp.fc2",
    }),
]

CLIP = [
    Rule("class_embedding", "cls_token", token), Rule("positional_embedding", "pos_embed", batched),
    Rule("transformer.resblocks.{i}.attn.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
    Rule("transformer.resblocks.{i}.ls_1.gamma", "blocks.{i}.ls1.gamma"),
    Rule("transformer.resblocks.{i}.ls_2.gamma", "blocks.{i}.ls2.gamma"),
    Rule("proj", "head.weight", transposed),
    *named({
        "conv1": "patch_embed.proj", "ln_pre": "norm_pre", "ln_post": "norm",
        "transformer.resblocks.{i}.attn.out_proj": "blocks.{i}.attn.proj",
        "transformer.resblocks.{i}.ln_1": "blocks.{i}.norm1",
        "transformer.resblocks.{i}.ln_2": "blocks.{i}.norm2",
        "transformer.resblocks.{i}.mlp.c_fc": "blocks.{i}.mlp.fc1",
        "transformer.resblocks.{i}.mlp.c_proj": "blocks.{i}.mlp.fc2",
    }),
]

TRAINED_BY_DINO = [
    # Blocks grouped for FSDP: the second number is the block's, over all groups.
    Rule(r"blocks.\d+.{i}.mlp.w12.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule(r"blocks.\d+.{i}.mlp.w3.{p}", "blocks.{i}.mlp.fc2.{p}"),
    Rule(r"blocks.\d+.{i}.(?P<rest>\D.*)", "blocks.{i}.{rest}"),
    Rule("blocks.{i}.mlp.w12.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("blocks.{i}.mlp.w3.{p}", "blocks.{i}.mlp.fc2.{p}"),
]

# Flax: our own leaves have these layouts. The numbers in norms' names depend on the code's version.
_ENCODER = "(?:opt/target/|params/)?(?:img/)?"
_BLOCK = f"{_ENCODER}Transformer/encoderblock_{{i}}"
_ATTENTION = rf"{_BLOCK}/MultiHeadDotProductAttention_\d"
_POOL = f"{_ENCODER}MAPHead_0"


def _google(old, new, layout):
  return [Rule(f"{old}/kernel", f"{new}.weight", flax(layout)),
          Rule(f"{old}/bias", f"{new}.bias")]


def _google_norm(old, new):
  return [Rule(f"{old}/scale", f"{new}.weight"), Rule(f"{old}/bias", f"{new}.bias")]


def _google_heads(old, new):
  return [Rule(f"{old}/kernel", f"{new}.weight", flax("heads")),
          Rule(f"{old}/bias", f"{new}.bias", flax("heads_bias"))]


GOOGLE = [
    Rule(f"{_ENCODER}Transformer/posembed_input/pos_embedding", "pos_embed"),
    Rule(f"{_ENCODER}pos_embedding", "pos_embed"), Rule(f"{_ENCODER}cls", "cls_token"),
    Rule(f"{_POOL}/probe", "attn_pool.latent"),
    *_google(f"{_ENCODER}embedding", "patch_embed.proj", "conv"),
    *_google(f"{_ENCODER}head", "head", "linear"),
    *_google_norm(f"{_ENCODER}Transformer/encoder_norm", "norm"),
    *_google_norm(f"{_BLOCK}/LayerNorm_0", "blocks.{i}.norm1"),
    *_google_norm(f"{_BLOCK}/LayerNorm_[12]", "blocks.{i}.norm2"),
    *_google_heads(f"{_ATTENTION}/{{query|key|value}}", "blocks.{i}.attn.qkv"),
    *_google(f"{_ATTENTION}/out", "blocks.{i}.attn.proj", "out"),
    *_google(rf"{_BLOCK}/MlpBlock_\d/Dense_0", "blocks.{i}.mlp.fc1", "linear"),
    *_google(rf"{_BLOCK}/MlpBlock_\d/Dense_1", "blocks.{i}.mlp.fc2", "linear"),
    *_google_heads(f"{_POOL}/MultiHeadDotProductAttention_0/query", "attn_pool.q"),
    *_google_heads(f"{_POOL}/MultiHeadDotProductAttention_0/{{key|value}}", "attn_pool.kv"),
    *_google(f"{_POOL}/MultiHeadDotProductAttention_0/out", "attn_pool.proj", "out"),
    *_google_norm(f"{_POOL}/LayerNorm_0", "attn_pool.norm"),
    *_google(f"{_POOL}/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1", "linear"),
    *_google(f"{_POOL}/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2", "linear"),
]

SOURCES = [
    Source("Google's, of a hybrid of ResNet and ViT", r"(^|/)(conv_root|gn_root)/",
           refusal="no model here has its stem of convolutions; take a file without R in its name, "
                   "such as S_16 or B_16"),
    Source("Google's", r"(^|/)(Transformer/encoder_norm|embedding)/", GOOGLE, {
        r"(.+/)?pre_logits/.*": "the layer before the classifier of pre-training",
        r"(params/)?(txt/.*|t|b)": "the text encoder"}, before=unstacked),
    Source(TRANSFORMERS, r"(^|\.)embeddings\.patch_embeddings\.projection\.", VIT, {
        r"(.+\.)?decoder\..*": "the decoder", r"(.+\.)?pooler\.dense\..*": "the pooler",
        **MASK_TOKEN}, after=patch_positions_only),
    Source(TRANSFORMERS, r"(^|\.)layer\.\d+\.mlp\.gate_proj\.", [*DINOV3, *DINOV3_GATED],
           MASK_TOKEN),
    Source(TRANSFORMERS, r"(^|\.)embeddings\.patch_embeddings\.weight$", [*DINOV3, *DINOV3_PLAIN],
           MASK_TOKEN),
    Source(TRANSFORMERS, r"(^|\.)embeddings\.patch_embedding\.weight$", CLIP_AND_SIGLIP, {
        r"(.+\.)?(text_model\..*|text_projection\..*|logit_scale|logit_bias)": "the text encoder",
        r"(.+\.)?classifier\..*": "a classifier of mean tokens, which timm's model has not"},
           after=bias_of_projection),
    Source(TRANSFORMERS, r"(^|\.)encoder\.patch_embeddings\.\d+\.projection\.", PVT),
    Source(TRANSFORMERS, r"(^|\.)encoder\.layers\.\d+\.patch_embedding\.proj\.", PVT_V2),
    Source("torchvision's", r"(^|\.)encoder\.layers\.encoder_layer_\d+\.", TORCHVISION),
    Source("open_clip's, of timm's model", r"(^|\.)visual\.trunk\.", [
        Rule("visual.head.proj.weight", "visual.trunk.head.weight")],
        {r"(?!(.+\.)?visual\.).*": "the text encoder"}, after=bias_of_projection),
    Source("CLIP's", r"(^|\.)visual\.class_embedding$", CLIP,
           {r"(?!(.+\.)?visual\.).*": "the text encoder"}, after=bias_of_projection),
    Source("CLIP's", r"(^|\.)transformer\.resblocks\.\d+\.", CLIP,
           {r"(.+\.)?text\..*": "the text encoder"}, after=bias_of_projection),
    Source("DINOv3's", r"(^|\.)(storage_tokens|rope_embed\.periods)$|\.qkv\.bias_mask$", [
        Rule("storage_tokens", "reg_token"), *named({
            "blocks.{i}.mlp.w1": "blocks.{i}.mlp.fc1_g",
            "blocks.{i}.mlp.w2": "blocks.{i}.mlp.fc1_x",
            "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2"})],
        {r"(.+\.)?rope_embed\.periods": "the periods of rotary positions, which follow from sizes",
         r"(.+\.)?local_cls_norm\..*": "a norm of training", **MASK_TOKEN}, after=masked_biases),
    Source("MAE's", r"(^|\.)decoder_(blocks|embed|pred)\.",
           left_out={r"(.+\.)?decoder_.*": "the decoder", **MASK_TOKEN}),
    Source("EVA-02's", r"(^|\.)rope\.freqs_(cos|sin)$|\.mlp\.ffn_ln\.", named({
        "blocks.{i}.mlp.w12": "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.w1": "blocks.{i}.mlp.fc1_g",
        "blocks.{i}.mlp.w2": "blocks.{i}.mlp.fc1_x", "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2",
        "blocks.{i}.mlp.ffn_ln": "blocks.{i}.mlp.norm"}),
        {r"(.+\.)?rope\.freqs_(cos|sin)": "the angles of rotary positions, which follow from sizes",
         r"(.+\.)?lm_head\..*": "the classifier of masked patches", **MASK_TOKEN},
           before=eva02_biases_and_norm),
    # Grouped blocks, `blocks.0.5.`; but `stages.0.blocks.0.5.` is a pair in DaViT.
    Source("DINOv2's", r"(^|\.)(mask_token|register_tokens)$|\.mlp\.w12\.|"
           r"(^|\.)(?<!stages\.\d\.)blocks\.\d+\.\d+\.",
           [Rule("register_tokens", "reg_token"), *TRAINED_BY_DINO], MASK_TOKEN,
           after=patch_positions_only),
    Source("DeiT III's", r"(^|\.)blocks\.\d+\.gamma_[12]$"),
]

# Parameters for which timm has two names; a model has one of them: (pattern, replacement).
SYNONYMS = [(re.compile(r"(blocks\.\d+)\.ls([12])\.gamma"), r"\1.gamma_\2"),
            (re.compile(r"(blocks\.\d+)\.gamma_([12])"), r"\1.ls\2.gamma")]
