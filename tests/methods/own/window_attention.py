"""Attention axis: patches attend to their neighbourhood on the grid."""
import dataclasses
from fractions import Fraction
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
  """A patch sees keys at most `radius` rows and columns away; prefix tokens see and are seen."""
  axis: ClassVar = "attention"
  radius: int = 1

  def acts(self, site) -> bool:
    return site.key_grid is not None   # pooled keys may have none

  def needs(self, site):
    return {"softmax": "use attention=None there", "grid": "use attention=None there"}

  def removes(self, site):
    return ("full attention",)

  def make(self, site, **kwargs):
    return Neighbourhood(self.radius, site, **kwargs)


class Neighbourhood(nn.Module):
  radius: int
  site: Any

  def __call__(self, core, query, key, source=None, fused=False):
    places = [(np.indices(grid).reshape(2, -1).T + 0.5) / grid
              for grid in (self.site.query_grid, self.site.key_grid)]
    apart = np.abs(places[0][:, None] - places[1][None]) * self.site.key_grid
    near = np.pad(apart.max(axis=-1) <= self.radius, [(self.site.prefix, 0)] * 2,
                  constant_values=True)
    mask = jnp.broadcast_to(jnp.asarray(near), (*query.shape[::2], *near.shape))
    return core._replace(mask=mask, scored=Fraction(int(near.sum()), near.size))
