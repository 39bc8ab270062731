"""DeiT and the plain ViT: one straight transformer (Touvron et al., arXiv 2012.12877)."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import layers, token_state
from vitcompact.block import Attention, Block, make_links, make_mlp
from vitcompact.methods.attention import sparsifiner
from vitcompact.methods.ffn import cffn
from vitcompact.methods.heads import hmhsa
from vitcompact.methods.tokens import dynamicvit
from vitcompact.models import torch_names
from vitcompact.models.images import check_images, in_parts
from vitcompact.models.torch_names import Entry, Positions
from vitcompact.models.variant import Variant
from vitcompact.plan import Plan
from vitcompact.token_state import Tokens
from vitcompact.trees import Leaf

EPSILON = 1e-6   # of every LayerNorm

LEAVES = [
    (r"(cls_token|pos_embed)", Leaf((None, None, "embed"))),
    # It decays, as in the authors' training; timm exempts it since.
    (r"dist_token", Leaf((None, None, "embed"), decay=True)),
    (r"patch_embed/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"head(_dist)?/kernel", Leaf(("embed", "classes"), decay=True)),
]


class VisionTransformer(nn.Module):
  """Patches, class token (and distillation token), learned positions, pre-norm blocks, linear head.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32. A distilled
  model returns (class logits, distillation logits) in training, their mean in inference.
  num_classes=0 returns the pooled features (B, width). global_pool: "token" (class token), "avg"
  (mean of the patch tokens, normalised after), "" (no pooling: every token).
  position_std: of positions before training. DeiT's 0.02 is far below what patches bring: a narrow
  model that has to relate distant places may not learn to for thousands of steps, and does with 0.5
  in hundreds.
  """
  variant: str = ""
  image_size: int | tuple[int, int] = 224
  patch_size: int = 16
  in_chans: int = 3
  num_classes: int = 1000
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0
  distilled: bool = False
  global_pool: str = "token"
  position_std: float = 0.02
  drop_path_rate: float = 0.1
  dtype: str = "float32"
  remat: bool = False
  plan: Plan = Plan()
  deploy: bool = False

  @property
  def grid(self) -> tuple[int, int]:
    height, width = np.broadcast_to(self.image_size, 2).tolist()
    return height // self.patch_size, width // self.patch_size

  @property
  def prefix(self) -> int:
    return 2 if self.distilled else 1

  @nn.nowrap
  def check(self):
    """Raises ValueError, one line, where the fields do not go together."""
    for side in np.broadcast_to(self.image_size, 2).tolist():
      if side < self.patch_size or side % self.patch_size:
        near = max(1, round(side / self.patch_size)) * self.patch_size
        raise ValueError(f"image_size={self.image_size}: {side} is not a multiple of "
                         f"patch_size={self.patch_size}; the nearest that is: {near}")
    if self.width % self.heads:
      raise ValueError(f"heads={self.heads} does not divide width={self.width}; heads that do: "
                       f"{[h for h in range(1, 33) if self.width % h == 0]}")
    if self.global_pool not in ("token", "avg", ""):
      raise ValueError(f"global_pool={self.global_pool!r}: must be 'token', 'avg' or ''")
    if self.position_std < 0:
      raise ValueError(f"position_std={self.position_std}: must be at least 0")
    self.plan.check_depth(self.depth)

  @nn.nowrap
  def parts(self) -> dict[str, nn.Module]:
    """{name: block}, the modules that a plan changes or that fold, not bound to a parent."""
    rates = np.linspace(0, self.drop_path_rate, self.depth).tolist()
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    parts, count = {}, self.prefix + self.grid[0] * self.grid[1]
    for i in range(self.depth):
      plan, name = self.plan.at(i), f"blocks_{i}"
      attn = Attention(self.width, self.heads, spec=plan.heads, query_grid=self.grid,
                       key_grid=self.grid, prefix=self.prefix, dtype=self.dtype,
                       backend=plan.backend, parent=None)
      mlp = make_mlp(plan, width=self.width, hidden=int(self.width * self.mlp_ratio),
                     deploy=self.deploy, dtype=self.dtype, name=name)
      left = self.plan.tokens_left(i, self.depth, count, self.prefix)
      links = make_links(plan, attn, keys=count, left=left, deploy=self.deploy)
      parts[name] = block(attn, mlp, drop_path=rates[i], epsilon=EPSILON, dtype=self.dtype,
                          reduce_tokens=self.plan.reduction(i, self.depth), links=links,
                          parent=None)
    return parts

  @nn.nowrap
  def leaf_rules(self) -> list[tuple[str, Leaf]]:
    """[(pattern, Leaf)] for every parameter under any plan; see `trees.first_match`."""
    return [*LEAVES, *hmhsa.LEAVES, *sparsifiner.LEAVES, *dynamicvit.LEAVES, *cffn.LEAVES,
            *layers.LEAVES]

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """timm's state dict, one Entry a tensor; a folded compact model's, with names of our own."""
    tokens = ["cls_token", "dist_token"][:self.prefix]
    entries = [Entry(name, (f"params/{name}",)) for name in tokens]
    entries.append(Entry("pos_embed", ("params/pos_embed",),
                         positions=Positions(self.grid, self.prefix)))
    entries += torch_names.patches("patch_embed.proj", "patch_embed/proj")
    for i, part in enumerate(self.parts().values()):
      entries += torch_names.block(f"blocks.{i}", f"blocks_{i}", part)
    norm = "fc_norm" if self.global_pool == "avg" else "norm"
    entries += torch_names.norm(norm, norm)
    for name in ["head", "head_dist"][:self.prefix] if self.num_classes else []:
      entries += torch_names.linear(name, name)
    return entries

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """The authors and timm use the same names."""
    return name

  def setup(self):
    self.patch_embed = layers.PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
    tokens = ["cls_token", "dist_token"][:self.prefix]
    self.tokens = [self.param(name, layers.weight_init, (1, 1, self.width)) for name in tokens]
    count = self.prefix + self.grid[0] * self.grid[1]
    self.pos_embed = self.param("pos_embed", nn.initializers.normal(self.position_std),
                                (1, count, self.width))
    for name, part in self.parts().items():
      setattr(self, name, part)
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

  @in_parts
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
