"""DeiT and the plain ViT: an isotropic transformer (Touvron et al., arXiv 2012.12877)."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import layers, token_state, torch_names
from vitcompact.block import block_entries
from vitcompact.models.backbone import Isotropic, check_images, chunked
from vitcompact.models.variant import Variant
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry, Positions
from vitcompact.trees import Leaf

EPSILON = 1e-6   # of every LayerNorm

RULES = [
    (r"(cls_token|pos_embed)", Leaf((None, None, "embed"))),
    # It decays, as in the authors' training; timm exempts it since.
    (r"dist_token", Leaf((None, None, "embed"), decay=True)),
    (r"patch_embed/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head(_dist)?/kernel", Leaf(("embed", "classes"), decay=True)),
]


class VisionTransformer(Isotropic):
  """Patches, class token (and distillation token), learned positions, pre-norm blocks, linear head.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32. A distilled
  model returns (class logits, distillation logits) in training, their mean in inference.
  num_classes=0 returns the pooled features (B, width). global_pool: "token" (class token), "avg"
  (mean of the patch tokens, normalised after), "" (no pooling: every token).
  position_std: of positions before training. DeiT's 0.02 is far below what patches bring: a narrow
  model that has to relate distant places may not learn to for thousands of steps, and does with 0.5
  in hundreds.
  """
  distilled: bool = False
  global_pool: str = "token"
  position_std: float = 0.02

  rules = RULES

  @property
  def teaches(self) -> frozenset[str]:
    """Mean-pooled features are normalised after pooling: then no patch has features to compare."""
    return frozenset() if self.global_pool == "avg" else frozenset({"patch features"})

  @property
  def prefix(self) -> int:
    return 2 if self.distilled else 1

  @nn.nowrap
  def check(self):
    """Raises ValueError, one line, where the fields do not go together."""
    if self.global_pool not in ("token", "avg", ""):
      raise ValueError(f"global_pool={self.global_pool!r}: must be 'token', 'avg' or ''")
    if self.position_std < 0:
      raise ValueError(f"position_std={self.position_std}: must be at least 0")
    super().check()

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """{name: block}, the modules that a plan changes or that fold, not bound to a parent."""
    return self.blocks(epsilon=EPSILON)

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """timm's state dict, one Entry a tensor; a folded compact model's, with names of our own."""
    tokens = ["cls_token", "dist_token"][:self.prefix]
    entries = [Entry(name, (f"params/{name}",)) for name in tokens]
    entries.append(Entry("pos_embed", ("params/pos_embed",),
                         positions=Positions(self.grid, self.prefix)))
    entries += torch_names.patches("patch_embed.proj", "patch_embed/proj")
    for i, block in enumerate(self.submodules().values()):
      entries += block_entries(block, f"blocks.{i}", f"blocks_{i}")
    norm = "fc_norm" if self.global_pool == "avg" else "norm"
    entries += torch_names.norm(norm, norm)
    for name in ["head", "head_dist"][:self.prefix] if self.num_classes else []:
      entries += torch_names.linear(name, name)
    return entries

  def setup(self):
    self.patch_embed = layers.PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
    tokens = ["cls_token", "dist_token"][:self.prefix]
    self.tokens = [self.param(name, layers.weight_init, (1, 1, self.width)) for name in tokens]
    count = self.prefix + self.grid[0] * self.grid[1]
    self.pos_embed = self.param("pos_embed", nn.initializers.normal(self.position_std),
                                (1, count, self.width))
    for name, module in self.submodules().items():
      setattr(self, name, module)
    # Mean-pooled features are normalised after pooling, under timm's name for that norm.
    norm = layers.LayerNorm(epsilon=EPSILON, dtype=self.dtype)
    if self.global_pool == "avg":
      self.fc_norm = norm
    else:
      self.norm = norm
    if self.num_classes:
      self.head = layers.dense(self.num_classes, dtype=self.dtype)
      if self.distilled:
        self.head_dist = layers.dense(self.num_classes, dtype=self.dtype)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x = self.patch_embed(images_bhwc)
    x = jax.lax.collapse(x, 1, 3)
    tokens = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], 1, self.width)) for t in self.tokens]
    x = jnp.concatenate([*tokens, x], axis=1) + self.pos_embed.astype(x.dtype)
    tokens = Tokens(x)
    for i in range(self.depth):
      tokens = getattr(self, f"blocks_{i}")(tokens, train)
      token_state.record(self, i, tokens, self.prefix)
    return self._head(tokens, train)

  def _head(self, tokens: Tokens, train: bool):
    if self.global_pool == "avg":
      x = self.fc_norm(token_state.mean_of_patches(tokens, self.prefix))
    else:
      x = self.norm(tokens.x)
      token_state.record_last(self, x, tokens, self.prefix)
    by_token = self.global_pool == "token"
    if not self.num_classes:
      return (x[:, :self.prefix].mean(axis=1) if by_token else x).astype(jnp.float32)
    if not self.distilled:
      return self.head(x[:, 0] if by_token else x).astype(jnp.float32)
    x_class, x_dist = (x[:, 0], x[:, 1]) if by_token else (x, x)
    logits = self.head(x_class).astype(jnp.float32), self.head_dist(x_dist).astype(jnp.float32)
    return logits if train else (logits[0] + logits[1]) / 2


_WIDTHS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
           "large": (1024, 24, 16)}


def _sizes(size: str, **fields):
  width, depth, heads = _WIDTHS[size]
  return {"width": width, "depth": depth, "heads": heads, **fields}


VARIANTS = {
    **{f"deit_{size}{'_distilled' * distilled}_patch16_224":
       Variant(VisionTransformer, _sizes(size, distilled=distilled))
       for distilled in (False, True) for size in ("tiny", "small", "base")},
    **{f"deit_base{'_distilled' * distilled}_patch16_384":
       Variant(VisionTransformer, _sizes("base", distilled=distilled, image_size=384), crop=1.0)
       for distilled in (False, True)},
    **{f"vit_{size}_patch16_224":
       Variant(VisionTransformer, _sizes(size), mean=(0.5,) * 3, std=(0.5,) * 3)
       for size in ("tiny", "small", "base", "large")},
}
