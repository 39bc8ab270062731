"""The plain vision transformer, with options for DeiT, CLIP, SigLIP, DINOv2, DINOv3 and EVA-02.

arXiv 2010.11929 (ViT), 2012.12877 (DeiT), 2204.07118 (DeiT III), 2103.00020 (CLIP), 2303.15343
(SigLIP), 2304.07193 (DINOv2), 2309.16588 (registers), 2508.10104 (DINOv3), 2303.11331 (EVA-02).
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import layers, token_state, torch_names
from vitcompact.block import block_entries
from vitcompact.methods.protocol import Site
from vitcompact.models.backbone import Isotropic, check_images, chunked
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry, Positions
from vitcompact.tracing import param
from vitcompact.trees import Leaf

RULES = [
    (r"(cls_token|reg_token|pos_embed|attn_pool/latent)", Leaf((None, None, "embed"))),
    # It has weight decay, as in the authors' training; timm now exempts it.
    (r"dist_token", Leaf((None, None, "embed"), decay=True)),
    (r"patch_embed/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head(_dist)?/kernel", Leaf(("embed", "classes"), decay=True)),
]
# The allowed values of fields.
CHOICES = {
    "global_pool": ("token", "avg", "map", ""),
    "pos_embed_of": ("all", "patches", "none"),
    "act": tuple(layers.ACTIVATIONS),
}


class AttentionPool(nn.Module):
  """One learned query attends to the tokens, then an FFN: (B, N, width) -> (B, width).

  The "MAP head" of SigLIP (Zhai et al., arXiv 2106.04560, section 3.4).
  """
  heads: int
  hidden: int
  act: str
  epsilon: float
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bnw, tokens: Tokens):
    width, act = x_bnw.shape[-1], layers.ACTIVATIONS[self.act]
    latent = param(self, "latent", nn.initializers.normal(width ** -0.5), (1, 1, width))
    to_heads = functools.partial(layers.ToHeads, self.heads, width // self.heads, dtype=self.dtype)
    query, key, value = (to_heads(name=name) for name in ("query", "key", "value"))
    query_bnhd = query(jnp.broadcast_to(latent, (x_bnw.shape[0], 1, width)))
    out = layers.FromHeads(width, dtype=self.dtype, name="out")
    x = out(tokens.core()(query_bnhd, key(x_bnw), value(x_bnw)))
    fc1 = layers.dense(self.hidden * (2 if act in layers.GATED else 1), dtype=self.dtype)
    mlp = layers.Mlp(fc1=fc1, fc2=layers.dense(width, dtype=self.dtype), act=act, name="mlp")
    return (x + mlp(layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x)))[:, 0]


class VisionTransformer(Isotropic):
  """Patches, prefix tokens, positions, pre-norm blocks, a norm, pooling, linear head.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32. A distilled
  model returns (class logits, distillation logits) in training, their mean in inference.
  num_classes=0 returns the pooled features (B, width).

  class_token, distilled, reg_tokens: the prefix tokens: whether there is a class token and a
    distillation token, and the number of registers, in this order.
  pos_embed_of: which tokens have a learned position embedding: "all", "patches", "none".
  rotary: temperature of rotary positions, which rotate queries and keys of patches (see `rotary`),
    or None. rotary_grid: None for DINOv3's form; for EVA-02's, the side in patches of the grid on
    which they were trained.
  pre_norm: whether there is a norm before the blocks, and no bias in the patch embedding (CLIP).
  layer_scale: initial factor of each residual branch's channels, or None for no such factors.
  act: of the FFN: "gelu", "gelu_tanh", "quick_gelu" or "swiglu", whose fc1 is twice as wide.
  qkv_bias: of queries, keys and values; key_bias=False: of queries and values alone (EVA-02).
  qk_norm: queries and keys are normalised, head by head, before their scores.
  ffn_norm: the hidden layer of FFNs is normalised before fc2 (EVA-02, base and large).
  epsilon: of every LayerNorm.
  global_pool: "token" (class token), "avg" (mean of the patch tokens), "map" (`AttentionPool`), ""
    (no pooling: every token). norm_pooled: whether the last norm comes after pooling; None: only
    for "avg", as in timm, which calls that norm fc_norm.
  position_std: standard deviation of the initial position embeddings. DeiT's 0.02 is small next to
    the patch embeddings: a narrow model that has to relate distant places may not learn to for
    thousands of steps; with 0.5 it does in hundreds. antialias: whether to antialias when position
    embeddings are resized, as timm does and DeiT's authors do not.
  ragged: accepts images whose sides are not multiples of the patch size, and drops the last rows
    and columns, as timm does; else such images are refused.
  """
  class_token: bool = True
  distilled: bool = False
  reg_tokens: int = 0
  pos_embed_of: str = "all"
  rotary: float | None = None
  rotary_grid: int | None = None
  pre_norm: bool = False
  layer_scale: float | None = None
  act: str = "gelu"
  qkv_bias: bool = True
  key_bias: bool = True
  qk_norm: bool = False
  ffn_norm: bool = False
  epsilon: float = 1e-6
  global_pool: str = "token"
  norm_pooled: bool | None = None
  position_std: float = 0.02
  antialias: bool = True
  ragged: bool = False

  rules = RULES

  @property
  def teaches(self) -> frozenset[str]:
    """If the last norm comes after pooling, there are no normalised patch features to compare."""
    return frozenset() if self.norm_after_pooling else frozenset({"patch features"})

  @property
  def norm_after_pooling(self) -> bool:
    return self.global_pool == "avg" if self.norm_pooled is None else self.norm_pooled

  @property
  def class_tokens(self) -> list[str]:
    """Names of the tokens that classifiers read."""
    return ["cls_token"] * self.class_token + ["dist_token"] * self.distilled

  @property
  def prefix(self) -> int:
    return len(self.class_tokens) + self.reg_tokens

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    for field, choices in CHOICES.items():
      if getattr(self, field) not in choices:
        raise ValueError(f"{field}={getattr(self, field)!r}: must be one of "
                         f"{', '.join(map(repr, choices))}")
    for field, least in (("position_std", 0), ("reg_tokens", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")
    for field in ("epsilon", "rotary", "rotary_grid", "layer_scale"):
      value = getattr(self, field)
      if value is not None and not value > 0:
        raise ValueError(f"{field}={value}: must be above 0")
    if self.distilled and not self.class_token:
      raise ValueError("distilled=True: a distillation token needs a class token; give "
                       "class_token=True")
    if self.distilled and self.global_pool == "map":
      raise ValueError("global_pool='map' gives one vector, and distilled=True has two classifiers")
    if self.global_pool == "token" and not self.class_token:
      raise ValueError("global_pool='token' needs class_token=True; 'avg' and 'map' do not")
    if self.rotary is None and self.rotary_grid is not None:
      raise ValueError(f"rotary_grid={self.rotary_grid} needs rotary positions, and rotary=None "
                       "has none; give rotary=10000.0, as in EVA-02, or leave it out")
    if self.rotary is not None and self.width // self.heads % 4:
      raise ValueError(f"rotary={self.rotary} rotates a quarter of each head's width by rows and a "
                       f"quarter by columns: width / heads = {self.width // self.heads} must be a "
                       "multiple of 4")
    super().check()

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them."""
    without = frozenset() if self.class_token else frozenset({"class token"})
    return [site._replace(provides=site.provides - without, qkv_bias=self.qkv_bias,
                          key_bias=self.key_bias, act=layers.ACTIVATIONS[self.act],
                          rotary=self.rotary, rotary_grid=self.rotary_grid,
                          qk_norm=self.epsilon if self.qk_norm else None,
                          ffn_norm=self.epsilon if self.ffn_norm else None,
                          layer_scale=self.layer_scale) for site in super().sites()]

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: block}, the modules that a plan changes or that fold, not bound to a parent.
    """
    return self.blocks(epsilon=self.epsilon)

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns one Entry for each tensor of timm's state dict; tensors of a folded compact model
    that timm does not have get names of our own."""
    tokens = [*self.class_tokens, *["reg_token"] * bool(self.reg_tokens)]
    entries = [Entry(name, (f"params/{name}",)) for name in tokens]
    if self.pos_embed_of != "none":
      entries.append(Entry("pos_embed", ("params/pos_embed",), positions=Positions(
          self.grid, self.prefix if self.pos_embed_of == "all" else 0,
          "antialiased" if self.antialias else "bicubic")))
    entries += torch_names.patches("patch_embed.proj", "patch_embed/proj",
                                   use_bias=not self.pre_norm)
    entries += torch_names.norm("norm_pre", "norm_pre") if self.pre_norm else []
    # timm implements rotary positions in its Eva model, with other names; EVA-02 models without a
    # norm inside the FFN have gate and value in one tensor.
    names, eva02 = {}, self.rotary_grid is not None
    if self.rotary is not None:
      apart = self.act == "swiglu" and (self.ffn_norm or not eva02)
      names = {"layer_scale": "gamma_{}", "fc1": ("fc1_g", "fc1_x") if apart else ("fc1",),
               "fused": not (eva02 and self.ffn_norm)}
    for i, block in enumerate(self.submodules().values()):
      entries += block_entries(block, f"blocks.{i}", f"blocks_{i}", **names)
    norm = "fc_norm" if self.norm_after_pooling else "norm"
    entries += torch_names.norm(norm, norm)
    if self.global_pool == "map":
      entries += [Entry("attn_pool.latent", ("params/attn_pool/latent",)),
                  *torch_names.heads("attn_pool.q", "attn_pool", ("query",)),
                  *torch_names.heads("attn_pool.kv", "attn_pool", ("key", "value")),
                  *torch_names.out("attn_pool.proj", "attn_pool/out"),
                  *torch_names.norm("attn_pool.norm", "attn_pool/norm"),
                  *torch_names.linear("attn_pool.mlp.fc1", "attn_pool/mlp/fc1"),
                  *torch_names.linear("attn_pool.mlp.fc2", "attn_pool/mlp/fc2")]
    heads = ["head", "head_dist"][:1 + self.distilled] if self.num_classes else []
    for name in heads:
      entries += torch_names.linear(name, name)
    return entries

  def setup(self):
    self.patch_embed = layers.PatchEmbed(self.width, self.patch_size, use_bias=not self.pre_norm,
                                         dtype=self.dtype)
    tokens = [param(self, name, layers.weight_init, (1, 1, self.width))
              for name in self.class_tokens]
    if self.reg_tokens:
      tokens.append(param(self, "reg_token", layers.weight_init, (1, self.reg_tokens, self.width)))
    self.tokens = tokens
    if self.pos_embed_of != "none":
      prefix = self.prefix if self.pos_embed_of == "all" else 0
      self.pos_embed = param(self, "pos_embed", nn.initializers.normal(self.position_std),
                                  (1, prefix + self.grid[0] * self.grid[1], self.width))
    for name, module in self.submodules().items():
      setattr(self, name, module)

    def norm():
      return layers.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)

    if self.pre_norm:
      self.norm_pre = norm()
    # timm has another name for a norm after pooling.
    if self.norm_after_pooling:
      self.fc_norm = norm()
    else:
      self.norm = norm()
    if self.global_pool == "map":
      self.attn_pool = AttentionPool(self.heads, int(self.width * self.mlp_ratio), self.act,
                                     self.epsilon, dtype=self.dtype)
    if self.num_classes:
      self.head = layers.dense(self.num_classes, dtype=self.dtype)
      if self.distilled:
        self.head_dist = layers.dense(self.num_classes, dtype=self.dtype)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x = jax.lax.collapse(self.patch_embed(images_bhwc), 1, 3)
    if self.pos_embed_of == "patches":
      x = x + self.pos_embed.astype(x.dtype)
    tokens = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in self.tokens]
    x = jnp.concatenate([*tokens, x], axis=1) if tokens else x
    if self.pos_embed_of == "all":
      x = x + self.pos_embed.astype(x.dtype)
    if self.pre_norm:
      x = self.norm_pre(x)
    tokens = Tokens(x)
    for i in range(self.depth):
      tokens = getattr(self, f"blocks_{i}")(tokens, train)
      token_state.record(self, i, tokens, self.prefix)
    return self._head(self._pool(tokens), train)

  def _pool(self, tokens: Tokens):
    """Returns the input of the classifiers: (B, class tokens, width); (B, width) for "avg" and
    "map"; (B, N, width) without pooling."""
    if not self.norm_after_pooling:
      tokens = tokens.replace(x=self.norm(tokens.x))
      token_state.record_last(self, tokens.x, tokens, self.prefix)
    x = tokens.x
    if self.global_pool == "token":
      x = x[:, :len(self.class_tokens)]
    elif self.global_pool == "avg":
      x = token_state.mean_of_patches(tokens, self.prefix)
    elif self.global_pool == "map":
      x = self.attn_pool(x, tokens)
    return self.fc_norm(x) if self.norm_after_pooling else x

  def _head(self, x, train: bool):
    by_token = self.global_pool == "token"
    if not self.num_classes:
      return (x.mean(axis=1) if by_token else x).astype(jnp.float32)
    if not self.distilled:
      return self.head(x[:, 0] if by_token else x).astype(jnp.float32)
    x_class, x_dist = (x[:, 0], x[:, 1]) if by_token else (x, x)
    logits = self.head(x_class).astype(jnp.float32), self.head_dist(x_dist).astype(jnp.float32)
    return logits if train else (logits[0] + logits[1]) / 2
