"""Heads axis: each token turns each head up or down."""
import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.settings import weight


def balance(forward_pass) -> jax.Array:
  """Returns how unequally the heads of a block are used, averaged over blocks: (B,)."""
  gates = jax.tree.leaves(forward_pass.collections["gates"])   # (B, N, heads) of each block
  return sum(jnp.var(gate_bnh.mean(axis=1), axis=-1) for gate_bnh in gates) / len(gates)


@dataclasses.dataclass(frozen=True)
class Gate:
  """Each token weights its heads by 2 sigmoid(x W + b): initially by 1, like a dense model."""
  axis: ClassVar = "heads"
  settings: ClassVar = {"loss.gate_balance": weight(0.1)}
  losses: ClassVar = {"gate_balance": balance}
  collections: ClassVar = ("gates",)

  def make(self, site, **kwargs):
    return GatedHeads(site.heads, site.dtype, **kwargs)


class GatedHeads(nn.Module):
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, query, key, value, core, x):
    score = nn.Dense(self.heads, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="score")
    gate_bnh = 2 * nn.sigmoid(score(x))
    if not self.is_initializing():
      self.sow("gates", "gate", gate_bnh)
    return core(query, key, value) * gate_bnh[..., None]
