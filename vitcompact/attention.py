"""The attention core: everything that attends goes through `Core`."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# A name scope: `count` finds the score and value products of a traced program by it.
SCOPE = "vitcompact.attention"


def scores(query_bnhd, key_bmhd):
  """Scaled scores q.k / sqrt(d), in float32: (B, N, h, d), (B, M, h, d) -> (B, h, N, M)."""
  scale = query_bnhd.shape[-1] ** -0.5
  with jax.named_scope(SCOPE):
    return jnp.einsum("bnhd,bmhd->bhnm", query_bnhd * scale, key_bmhd,
                      preferred_element_type=jnp.float32)


def weigh(maps_bhnm, value_bmhe):
  """Values averaged under attention maps: (B, h, N, M), (B, M, h, e) -> (B, N, h, e)."""
  with jax.named_scope(SCOPE):
    return jnp.einsum("bhnm,bmhe->bnhe", maps_bhnm.astype(value_bmhe.dtype), value_bmhe)


def _same(x):
  return x


class Core(NamedTuple):
  """softmax(q k^T / sqrt(d)) v for each head, as the tokens of a block ask for it.

  size: (B, M) or None: a key counts as so many equal keys (log size is added to its scores).
  spread: applied to the values before, gather: to the outputs after; the identity, but where tokens
    are merged between the scores and the values.
  """
  size: jax.Array | None = None
  spread: Callable = _same
  gather: Callable = _same

  def maps(self, query_bnhd, key_bmhd, rescore: Callable = _same):
    """Attention maps (B, h, N, M), float32; `rescore` changes the scores before the softmax."""
    scores_bhnm = rescore(scores(query_bnhd, key_bmhd))
    if self.size is not None:
      scores_bhnm = scores_bhnm + jnp.log(self.size.astype(jnp.float32))[:, None, None]
    return jax.nn.softmax(scores_bhnm, axis=-1)

  def __call__(self, query_bnhd, key_bmhd, value_bmhe, rescore: Callable = _same):
    """(B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e) in the values' dtype.

    e may differ from d. Without a `rescore` nobody sees the maps.
    """
    maps_bhnm = self.maps(query_bnhd, key_bmhd, rescore)
    return self.gather(weigh(maps_bhnm, self.spread(value_bmhe)))


DENSE = Core()   # all keys count alike


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()
