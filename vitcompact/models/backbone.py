"""The contract of a backbone, and what the backbones share before their layers."""
import functools
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention
from vitcompact.execution import Execution
from vitcompact.methods.protocol import CAPABILITIES, Site
from vitcompact.plan import Plan
from vitcompact.torch_names import Entry
from vitcompact.trees import Leaf

# What a block of each kind provides to methods, see `protocol.CAPABILITIES`.
ISOTROPIC = frozenset(CAPABILITIES)
HIERARCHICAL = ISOTROPIC - {"free tokens", "class token"}
WITHOUT_ATTENTION = frozenset({"grid", "token order"})


class Backbone(Protocol):
  """What the library asks of a model, a linen Module with these fields and methods.

  Called with images (B, H, W, in_chans), normalised float, it returns logits (B, num_classes) in
  float32. It sows "features", and what its docstring says besides.
  """
  variant: str                        # its name in the table of models
  image_size: int | tuple[int, int]
  in_chans: int
  num_classes: int                    # 0: features
  drop_path_rate: float
  dtype: str                          # of the computation
  remat: bool
  plan: Plan
  execution: Execution
  deploy: bool                        # the folded form
  # Below, what a trainer may learn from.
  teaches: frozenset[str]             # of "patch features", "patch logits"
  mixes_images: bool                  # whether training mixes the images of a batch (MixToken)

  def check(self) -> None:
    """Raises ValueError, one line, where the fields do not go together."""

  def sites(self) -> list[Site]:
    """Its blocks in order, as methods see them."""

  def submodules(self) -> dict[str, nn.Module]:
    """{name: module} that a plan changes or that fold, not bound to a parent. Each has
    `fold(params, stats)`, which returns (params, stats); those that a plan changes also `site` and
    `methods`."""

  def parameter_rules(self) -> list[tuple[str, Leaf]]:
    """[(pattern, Leaf)] for every parameter; see `trees.first_match`."""

  def torch_entries(self) -> list[Entry]:
    """Every tensor of its PyTorch state dict, under timm's names where timm has the model."""

  def authors_name(self, name: str) -> str:
    """The authors' name of a tensor, from that of `torch_entries`."""


def site_fields(model, block: int) -> dict[str, Any]:
  """Fields of a Site that follow from a model's own."""
  return {"block": block, "form": model.execution.attention.get(block),
          "merged": model.execution.merged_in(block), "deploy": model.deploy, "dtype": model.dtype}


def isotropic_sites(model, prefix: int) -> list[Site]:
  """The blocks of a model whose blocks are alike, with a class token and free tokens."""
  count, grid = prefix + model.grid[0] * model.grid[1], model.grid
  return [Site(depth=model.depth, width=model.width, ffn_width=model.width,
               hidden=int(model.width * model.mlp_ratio),
               heads=model.heads, tokens=count, prefix=prefix, query_grid=grid, key_grid=grid,
               tokens_left=model.plan.tokens_left(i, model.depth, count, prefix),
               provides=ISOTROPIC, **site_fields(model, i)) for i in range(model.depth)]


def drop_path_rates(model) -> list[float]:
  """Stochastic depth's rate of each block: linear from 0 to the model's."""
  return np.linspace(0, model.drop_path_rate, model.depth).tolist()


def check_plan(model):
  """Raises ValueError where the plan or the execution record does not fit the model's blocks."""
  sites = model.sites()
  model.plan.check(sites, model.variant)
  model.execution.check(model.plan.mergeable(sites))


def check_grid_and_heads(model):
  """Raises ValueError, one line, unless patches fill the image and heads divide the width."""
  for side in np.broadcast_to(model.image_size, 2).tolist():
    if side < model.patch_size or side % model.patch_size:
      near = max(1, round(side / model.patch_size)) * model.patch_size
      raise ValueError(f"image_size={model.image_size}: {side} is not a multiple of "
                       f"patch_size={model.patch_size}; the nearest that is: {near}")
  if model.width % model.heads:
    raise ValueError(f"heads={model.heads} does not divide width={model.width}; heads that do: "
                     f"{[h for h in range(1, 33) if model.width % h == 0]}")


def check_images(model, images_bhwc):
  """Raises ValueError, one line, where images are not of the one size that a model takes."""
  height, width, channels = *np.broadcast_to(model.image_size, 2), model.in_chans
  if images_bhwc.shape[1:] != (height, width, channels):
    raise ValueError(f"images of shape {images_bhwc.shape}: this model takes (B, {height}, "
                     f"{width}, {channels}); create it with image_size= and in_chans=")


def chunked(call):
  """A model's `__call__`, which in inference computes a batch in chunks of `execution.chunk`
  images: what these need may fit a processor's caches.

  The same function of each image. Training, whose batch norms see a batch, calls from which
  something is collected besides the logits, such as features, batches that lie on several devices
  and those of no fixed size (`jax.export`) run all at once.
  """
  @functools.wraps(call)
  def wrapped(self, images_bhwc, train: bool = False):
    chunk, batch = self.execution.chunk, images_bhwc.shape[0]
    at_once = train or self.is_initializing() or self.scope.mutable or attention.split()
    if chunk is None or at_once or not isinstance(batch, int) or batch <= chunk:
      return call(self, images_bhwc, train)
    whole, unbound = batch - batch % chunk, self.clone(parent=None, name=None)

    def apply(images):
      return unbound.apply(self.variables, images)

    chunks = jax.lax.map(apply, images_bhwc[:whole].reshape(-1, chunk, *images_bhwc.shape[1:]))
    out = chunks.reshape(whole, *chunks.shape[2:])
    return out if whole == batch else jnp.concatenate([out, apply(images_bhwc[whole:])])

  return wrapped
