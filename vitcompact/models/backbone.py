"""The interface of a backbone, and what all backbones share."""
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, layers
from vitcompact.block import Block
from vitcompact.execution import Execution
from vitcompact.methods.protocol import CAPABILITIES, Site
from vitcompact.plan import Plan
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

# What a block of each kind provides to methods, see `protocol.CAPABILITIES`.
ISOTROPIC = frozenset(CAPABILITIES)
HIERARCHICAL = ISOTROPIC - {"free tokens", "class token"}
WITHOUT_ATTENTION = frozenset({"grid", "token order"})


class Backbone(nn.Module):
  """The fields and methods that the library requires of a model.

  Called with images (B, H, W, in_chans), normalised float, it returns logits (B, num_classes) in
  float32; in training possibly a tuple of them, the distillation token's last, or `TokenLogits`. It
  sows "features", and whatever else its docstring mentions.

  variant: its name in the table of models. num_classes: 0 for features. dtype: of the computation.
  remat: whether the backward pass recomputes the activations of blocks. deploy: whether it is the
  deployed form.
  """
  variant: str = ""
  image_size: int | tuple[int, int] = 224
  in_chans: int = 3
  num_classes: int = 1000
  drop_path_rate: float = 0.1
  dtype: str = "float32"
  remat: bool = False
  plan: Plan = Plan()
  execution: Execution = Execution()
  deploy: bool = False

  rules: ClassVar[list[tuple[str, Leaf]]]           # for parameters that only this model has
  # What it offers as a teacher besides logits: "patch features", "patch logits".
  teaches: ClassVar[frozenset[str]] = frozenset()
  mixes_images: ClassVar[bool] = False              # whether training mixes images of a batch
  # Fields that say how it is computed or trained, not which network it is.
  free_fields: ClassVar[tuple[str, ...]] = ("drop_path_rate", "dtype", "remat", "execution")

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError if the fields contradict each other."""
    sites = self.sites()
    self.plan.check(sites, self.variant)
    self.execution.check(self.plan.mergeable(sites))

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks in order, as methods see them."""
    raise NotImplementedError

  @nn.nowrap
  def submodules(self) -> dict[str, nn.Module]:
    """Returns {name: module} of those that a plan changes or that fold, not bound to a parent. Each
    has `fold(params, stats)`, which returns (params, stats); those that a plan changes also have
    `site` and `methods`."""
    raise NotImplementedError

  @nn.nowrap
  def compactable_blocks(self) -> dict[str, nn.Module]:
    """Returns those of its submodules that a plan changes."""
    return {name: module for name, module in self.submodules().items()
            if hasattr(module, "methods")}

  @nn.nowrap
  def torch_entries(self) -> list[Entry]:
    """Returns an Entry for every tensor of its PyTorch state dict, under timm's names if timm has
    the model."""
    raise NotImplementedError

  @nn.nowrap
  def authors_name(self, name: str) -> str:
    """Returns the authors' name of a tensor, given its name in `torch_entries`."""
    return name

  @nn.nowrap
  def parameter_rules(self) -> list[tuple[str, Leaf]]:
    """Returns [(pattern, Leaf)] for every parameter, see `trees.first_match`."""
    return [*self.rules, *self.plan.parameter_rules(layers.RULES)]

  @nn.nowrap
  def site_fields(self, block: int) -> dict[str, Any]:
    """Returns the fields of a block's Site that follow from those of the model."""
    return {"block": block, "depth": self.depth, "form": self.execution.attention.get(block),
            "merged": self.execution.merged_in(block), "deploy": self.deploy, "dtype": self.dtype}

  @nn.nowrap
  def drop_path_rates(self) -> list[float]:
    """Returns the stochastic depth rate of each block, rising linearly from 0 to the model's."""
    return np.linspace(0, self.drop_path_rate, self.depth).tolist()

  @nn.nowrap
  def block_class(self, kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of a block; with `remat`, its backward pass recomputes its activations."""
    return nn.remat(kind, static_argnums=(2,)) if self.remat else kind


class Isotropic(Backbone):
  """A backbone of equal blocks over prefix tokens and the patches of one grid."""
  patch_size: int = 16
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0

  prefix: ClassVar[int] = 1

  @property
  def grid(self) -> tuple[int, int]:
    height, width = np.broadcast_to(self.image_size, 2).tolist()
    return height // self.patch_size, width // self.patch_size

  @nn.nowrap
  def check(self):
    """Raises a one-line ValueError unless patches fill the image and heads divide the width."""
    for side in np.broadcast_to(self.image_size, 2).tolist():
      refused = side % self.patch_size and not getattr(self, "ragged", False)
      if side < self.patch_size or refused:
        nearest = max(1, round(side / self.patch_size)) * self.patch_size
        raise ValueError(f"image_size={self.image_size}: {side} is not a multiple of "
                         f"patch_size={self.patch_size}; the nearest multiple: {nearest}")
    if self.width % self.heads:
      raise ValueError(f"heads={self.heads} does not divide width={self.width}; heads that do: "
                       f"{[h for h in range(1, 33) if self.width % h == 0]}")
    super().check()

  @nn.nowrap
  def sites(self) -> list[Site]:
    """Returns its blocks, as methods see them."""
    count = self.prefix + self.grid[0] * self.grid[1]
    return [Site(width=self.width, ffn_width=self.width, hidden=int(self.width * self.mlp_ratio),
                 heads=self.heads, tokens=count, prefix=self.prefix, query_grid=self.grid,
                 key_grid=self.grid,
                 tokens_left=self.plan.tokens_left(i, self.depth, count, self.prefix),
                 provides=ISOTROPIC, **self.site_fields(i)) for i in range(self.depth)]

  @nn.nowrap
  def blocks(self, **fields) -> dict[str, nn.Module]:
    """Returns {name: block}, not bound to a parent; `fields` are further fields of each block."""
    block = self.block_class(Block)
    return {f"blocks_{site.block}": block(site, self.plan.at(site), drop_path=rate, parent=None,
                                          **fields)
            for site, rate in zip(self.sites(), self.drop_path_rates(), strict=True)}


def check_images(model, images_bhwc):
  """Raises a one-line ValueError if the images do not have the shape that the model takes."""
  height, width, channels = *np.broadcast_to(model.image_size, 2), model.in_chans
  if images_bhwc.shape[1:] != (height, width, channels):
    raise ValueError(f"images of shape {images_bhwc.shape}: this model takes (B, {height}, "
                     f"{width}, {channels}); create it with image_size= and in_chans=")


def chunked(call):
  """Wraps a model's `__call__`, so that inference computes a batch in chunks of `execution.chunk`
  images, whose activations may fit a processor's caches.

  Each image gets the same result. A batch is not chunked in training (batch norms see the whole
  batch), if collections such as features are asked for, if it is split over several devices, or if
  its size is not fixed (`jax.export`).
  """
  @functools.wraps(call)
  def wrapped(self, images_bhwc, train: bool = False):
    chunk, batch = self.execution.chunk, images_bhwc.shape[0]
    at_once = train or self.is_initializing() or self.scope.mutable or attention.split()
    if chunk is None or at_once or not isinstance(batch, int) or batch <= chunk:
      return call(self, images_bhwc, train)
    divisible, unbound = batch - batch % chunk, self.clone(parent=None, name=None)

    def apply(images):
      return unbound.apply(self.variables, images)

    chunks = jax.lax.map(apply, images_bhwc[:divisible].reshape(-1, chunk, *images_bhwc.shape[1:]))
    out = chunks.reshape(divisible, *chunks.shape[2:])
    return out if divisible == batch else jnp.concatenate([out, apply(images_bhwc[divisible:])])

  return wrapped
