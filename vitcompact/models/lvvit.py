"""LV-ViT: an isotropic transformer with a convolutional stem, trained with token labels.

Jiang et al., arXiv 2104.10858 (token labelling, MixToken).
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import layers, token_state, torch_names
from vitcompact.block import block_entries
from vitcompact.methods.protocol import Site
from vitcompact.models.backbone import Isotropic, check_images, chunked
from vitcompact.models.token_logits import TokenLogits
from vitcompact.models.variant import Variant
from vitcompact.token_state import Tokens
from vitcompact.torch_names import Entry, Positions
from vitcompact.tracing import param
from vitcompact.trees import Leaf

EPSILON = 1e-5   # of every LayerNorm
STEM = {"conv1": (7, 2), "conv2": (3, 1), "conv3": (3, 1)}   # kernel size, stride

RULES = [
    (r"(cls_token|pos_embed)", Leaf((None, None, "embed"))),
    (r"stem/conv\d/conv/kernel", Leaf((None, None, None, None), decay=True)),
    (r"stem/proj/kernel", Leaf((None, None, None, "embed"), decay=True)),
    (r"(aux_)?head/kernel", Leaf(("embed", "classes"), decay=True)),
]


def draw_box(key, grid: tuple[int, int]):
  """Draws a box as CutMix does; returns bool (h, w), true in the box. The share outside is U(0, 1)
  and the centre is uniform. Cells beyond the edge are cut off, and sides are rounded down to even
  numbers."""
  lam_key, *centre_keys = jax.random.split(key, 3)
  cut = jnp.sqrt(1 - jax.random.uniform(lam_key))
  inside = []
  for centre_key, size in zip(centre_keys, grid, strict=True):
    centre = jax.random.randint(centre_key, (), 0, size)
    half = (size * cut).astype(jnp.int32) // 2
    cell = jnp.arange(size)
    inside.append((cell >= centre - half) & (cell < centre + half))
  return inside[0][:, None] & inside[1][None, :]


def swap(x_bhwc, box_hw):
  """Exchanges the cells of the box with those of the reversed batch; its own inverse."""
  return jnp.where(box_hw[None, :, :, None], x_bhwc[::-1], x_bhwc)


class Stem(nn.Module):
  """Three convolutions with batch norms at half the resolution, then patches of the result.

  (B, H, W, C) -> (B, H / patch_size, W / patch_size, width).
  """
  width: int
  patch_size: int
  hidden: int
  deploy: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x_bhwc, train: bool = False):
    for name, (size, stride) in STEM.items():
      init = layers.fan_in_uniform(size ** 2 * x_bhwc.shape[-1])
      conv = layers.ConvNorm(self.hidden, size, stride, kernel_init=init, deploy=self.deploy,
                             dtype=self.dtype, name=name)
      x_bhwc = nn.relu(conv(x_bhwc, train))
    patch = (self.patch_size // 2,) * 2
    init = layers.fan_in_uniform(patch[0] ** 2 * self.hidden)
    return nn.Conv(self.width, patch, strides=patch, padding="VALID", kernel_init=init,
                   bias_init=init, dtype=self.dtype, name="proj")(x_bhwc)

  @nn.nowrap
  def fold(self, params, stats):
    """Returns (params, {}) of the deployed stem, with batch norms folded into the convolutions."""
    if self.deploy:
      return params, stats
    folded = {name: layers.fold_conv_norm(params[name], stats[name]) for name in STEM}
    return {**params, **folded}, {}


class LVViT(Isotropic):
  """Convolutional stem, class token, learned positions, pre-norm blocks, two linear heads.

  Images (B, H, W, in_chans), normalised float -> logits (B, num_classes) in float32: those of the
  class token, plus half the maximum over patches of the second head's. In training it returns
  `TokenLogits`. mix_token: whether training exchanges a box of patches, drawn from the "dropout"
  key, between the images of a batch. num_classes=0 returns the class token's features (B, width).
  """
  depth: int = 16
  mlp_ratio: float = 3.0
  stem_width: int = 64
  skip_lam: float = 2.0
  mix_token: bool = True

  rules = RULES
  teaches = frozenset({"patch logits"})
  free_fields = (*Isotropic.free_fields, "mix_token")

  @property
  def mixes_images(self) -> bool:
    return self.mix_token

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    if self.patch_size < 2 or self.patch_size % 2:
      raise ValueError(f"patch_size={self.patch_size}: must be even, because the stem halves the "
                       "image before it cuts patches")
    super().check()

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them."""
    return [site._replace(qkv_bias=False) for site in super().sites()]

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: module} of those that a plan changes or that fold, not bound to a parent."""
    stem = Stem(self.width, self.patch_size, self.stem_width, deploy=self.deploy, dtype=self.dtype,
                parent=None)
    return {"stem": stem, **self.blocks(epsilon=EPSILON, skip_lam=self.skip_lam)}

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns one Entry for each tensor of the authors' state dict of the dense model."""
    entries = [Entry("cls_token", ("params/cls_token",)),
               Entry("pos_embed", ("params/pos_embed",), positions=Positions(self.grid, 1))]
    for i, name in enumerate(STEM, start=1):
      entries += torch_names.conv_norm(f"patch_embed.conv{i}", f"patch_embed.bn{i}", f"stem/{name}")
    entries += torch_names.conv("patch_embed.proj", "stem/proj")
    blocks = self.submodules()
    for i in range(self.depth):
      entries += block_entries(blocks[f"blocks_{i}"], f"blocks.{i}", f"blocks_{i}")
    entries += torch_names.norm("norm", "norm")
    for name in ("head", "aux_head") if self.num_classes else ():
      entries += torch_names.linear(name, name)
    return entries

  def setup(self):
    self.cls_token = param(self, "cls_token", layers.weight_init, (1, 1, self.width))
    count = 1 + self.grid[0] * self.grid[1]
    self.pos_embed = param(self, "pos_embed", layers.weight_init, (1, count, self.width))
    for name, module in self.submodules().items():
      setattr(self, name, module)
    self.norm = layers.LayerNorm(epsilon=EPSILON, dtype=self.dtype)
    if self.num_classes:
      self.head = layers.dense(self.num_classes, dtype=self.dtype)
      self.aux_head = layers.dense(self.num_classes, dtype=self.dtype)

  @chunked
  def __call__(self, images_bhwc, train: bool = False):
    check_images(self, images_bhwc)
    x = self.stem(images_bhwc, train)
    box = jnp.zeros(self.grid, bool)
    if train and self.mix_token:
      box = draw_box(self.make_rng("dropout"), self.grid)
      x = swap(x, box)
    x = jax.lax.collapse(x, 1, 3)
    token = jnp.broadcast_to(self.cls_token.astype(x.dtype), (x.shape[0], 1, self.width))
    x = jnp.concatenate([token, x], axis=1) + self.pos_embed.astype(x.dtype)
    tokens = Tokens(x)
    for i in range(self.depth):
      tokens = getattr(self, f"blocks_{i}")(tokens, train)
      token_state.record(self, i, tokens, 1)
    x = self.norm(tokens.x)
    token_state.record_last(self, x, tokens, 1)
    if not self.num_classes:
      return x[:, 0].astype(jnp.float32)
    logits = self.head(x[:, 0]).astype(jnp.float32)
    token_logits = self.aux_head(x[:, 1:]).astype(jnp.float32)
    if not train:
      self._record_logits(logits, token_logits, tokens)
      if tokens.remainder is not None:
        token_logits = jnp.where(tokens.remainder[:, 1:, None], -jnp.inf, token_logits)
      return logits + 0.5 * token_logits.max(axis=1)
    token_logits, keep_mask = token_state.by_patch(token_logits, tokens, 1)
    return TokenLogits(logits, self._unmix(token_logits, box), 1 - box.mean(),
                       self._unmix(jax.lax.stop_gradient(keep_mask)[..., None], box)[..., 0])

  def _record_logits(self, logits, token_logits, tokens: Tokens):
    """Sows in "tokens" a teacher's targets: "logits" and "token_logits" of each source patch."""
    if self.is_mutable_collection("tokens") and not self.is_initializing():
      self.sow("tokens", "logits", logits)
      self.sow("tokens", "token_logits", token_state.by_patch(token_logits, tokens, 1)[0])

  def _unmix(self, rows_bpk, box_hw):
    """Moves rows of patches (B, P, K) back to where the patches were before MixToken."""
    rows_bhwk = rows_bpk.reshape(-1, *self.grid, rows_bpk.shape[-1])
    return swap(rows_bhwk, box_hw).reshape(rows_bpk.shape)


VARIANTS = {
    "lvvit_t": Variant(LVViT, {"width": 240, "depth": 12, "heads": 4, "skip_lam": 1.0}),
    "lvvit_s": Variant(LVViT, {"width": 384, "depth": 16, "heads": 6}),
    "lvvit_m": Variant(LVViT, {"width": 512, "depth": 20, "heads": 8, "drop_path_rate": 0.2},
                       crop=1.0),
}
