"""A ViT with overlapping patches, sinusoidal positions without parameters, and no class token."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import layers, token_state, torch_names
from vitcompact.block import block_entries
from vitcompact.models.backbone import Isotropic, check_images
from vitcompact.models.variant import Variant
from vitcompact.token_state import Tokens
from vitcompact.trees import Leaf

RULES = [(r"patches/kernel", Leaf((None, None, None, "embed"), decay=True)),
         (r"head/kernel", Leaf(("embed", "classes"), decay=True))]


def sines(grid, width: int):
  """Returns sines and cosines of row and column, of decreasing frequency: (rows * cols, width)."""
  places_pa = np.indices(grid).reshape(2, -1).T[..., None] / 100 ** np.linspace(0, 1, width // 4)
  return np.concatenate([np.sin(places_pa), np.cos(places_pa)], axis=-1).reshape(-1, width)


class OverlapViT(Isotropic):
  """Images (B, H, W, C) -> logits (B, num_classes): patches, blocks, a norm, their mean, linear."""
  prefix = 0
  rules = RULES

  @nn.nowrap
  def sites(self):
    return [site._replace(provides=site.provides - {"class token"}) for site in super().sites()]

  @nn.nowrap
  def submodules(self):
    return self.blocks(epsilon=1e-6)

  @nn.nowrap
  def torch_entries(self):
    entries = torch_names.conv("patches", "patches")
    for i, block in enumerate(self.submodules().values()):
      entries += block_entries(block, f"blocks.{i}", f"blocks_{i}")
    return entries + torch_names.norm("norm", "norm") + torch_names.linear("head", "head")

  def setup(self):
    size, half = 2 * self.patch_size, self.patch_size // 2
    self.patches = nn.Conv(self.width, (size, size), strides=self.patch_size,
                           padding=[(half, half)] * 2, dtype=self.dtype)
    for name, block in self.submodules().items():
      setattr(self, name, block)
    self.norm = layers.LayerNorm(epsilon=1e-6, dtype=self.dtype)
    self.head = layers.dense(self.num_classes, dtype=self.dtype)

  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x = jax.lax.collapse(self.patches(images_bhwc), 1, 3)
    tokens = Tokens(x + jnp.asarray(sines(self.grid, self.width), x.dtype)[None])
    for i in range(self.depth):
      tokens = getattr(self, f"blocks_{i}")(tokens, train)
      token_state.record(self, i, tokens, self.prefix)
    tokens = tokens.replace(x=self.norm(tokens.x))
    return self.head(token_state.mean_of_patches(tokens, self.prefix)).astype(jnp.float32)


VARIANTS = {"overlap_vit_tiny": Variant(OverlapViT, {"width": 192, "heads": 3})}
