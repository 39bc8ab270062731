"""The attention core: everything that attends goes through `Core`."""
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# A name scope: `count` finds the score and value products of a traced program by it.
SCOPE = "vitcompact.attention"
ALIVE_EPSILON = 1e-6


def share(part: float | Fraction):
  """A name scope: of the products inside, the method needs this part; `count` reads it."""
  part = Fraction(part).limit_denominator(10 ** 9)
  return jax.named_scope(f"vitcompact.share({part.numerator}:{part.denominator})")


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


def softmax_alive(scores_bhnm, alive_bm):
  """Softmax over keys of which some (alive = 0) are hidden from all queries but their own.

  a_ij = (e_ij g_ij + eps / M) / (sum_k e_ik g_ik + eps), g_ij = alive_j (1: i = j). DynamicViT,
  eps included; the gradient reaches alive (B, M). Queries and keys are the same tokens. Float32.
  """
  count = scores_bhnm.shape[-1]
  top_bhn1 = jax.lax.stop_gradient(scores_bhnm.max(axis=-1, keepdims=True))
  seen_bnm = jnp.where(jnp.eye(count, dtype=bool)[None], 1, alive_bm[:, None, :])
  exp_bhnm = jnp.exp(scores_bhnm - top_bhn1) * seen_bnm[:, None]
  total_bhn1 = exp_bhnm.sum(axis=-1, keepdims=True)
  return (exp_bhnm + ALIVE_EPSILON / count) / (total_bhn1 + ALIVE_EPSILON)


def _same(x):
  return x


class Core(NamedTuple):
  """softmax(q k^T / sqrt(d)) v for each head, as the tokens of a block ask for it.

  size: (B, M) or None: a key counts as so many equal keys (log size is added to its scores).
  spread: applied to the values before, gather: to the outputs after; the identity, but where tokens
    are merged between the scores and the values.
  alive: (B, M) or None: see `softmax_alive`.
  mask: (B, h, N, M) or None: where it is false a key gets nothing from a query. `rescore` may make
    more heads than there are queries; head i then has the mask of head i modulo h.
  linked: share of the pairs of tokens that the mask leaves.
  blocks: a `links.blocks.BlockLinks` or None: which blocks of tokens are linked; it attends.
  """
  size: jax.Array | None = None
  spread: Callable = _same
  gather: Callable = _same
  alive: jax.Array | None = None
  mask: jax.Array | None = None
  linked: Fraction = Fraction(1)
  blocks: Any = None

  def of_heads(self, start: int, stop: int) -> "Core":
    """The attention of some of the heads."""
    if self.blocks is not None:
      return self._replace(blocks=self.blocks.of_heads(start, stop))
    return self if self.mask is None else self._replace(mask=self.mask[:, start:stop])

  def masked_scores(self, query_bnhd, key_bmhd, rescore: Callable = _same):
    """Scores (B, h, N, M), float32, -inf where there is no link."""
    # A filter over scores needs them all.
    with share(self.linked if rescore is _same else 1):
      scores_bhnm = rescore(scores(query_bnhd, key_bmhd))
    if self.size is not None:
      scores_bhnm = scores_bhnm + self._bias()[:, None, None]
    mask = self.mask if self.blocks is None else self.blocks.mask()
    if mask is None:
      return scores_bhnm
    heads, masked = scores_bhnm.shape[1], mask.shape[1]
    mask = mask if heads == masked else mask[:, jnp.arange(heads) % masked]
    return jnp.where(mask, scores_bhnm, -jnp.inf)

  def _bias(self):
    return None if self.size is None else jnp.log(self.size.astype(jnp.float32))

  def maps(self, query_bnhd, key_bmhd, rescore: Callable = _same):
    """Attention maps (B, h, N, M), float32; `rescore` changes the scores before the softmax."""
    scores_bhnm = self.masked_scores(query_bnhd, key_bmhd, rescore)
    if self.alive is not None:
      return softmax_alive(scores_bhnm, self.alive)
    return jax.nn.softmax(scores_bhnm, axis=-1)

  def merged(self, maps_bhnm):
    """The maps as the tokens that values come from and outputs go to see them."""
    if self.spread is _same:
      return maps_bhnm
    rows_bkhm = self.gather(maps_bhnm.swapaxes(1, 2))
    batch, count = rows_bkhm.shape[:2]
    holds_bm1k = self.spread(jnp.broadcast_to(jnp.eye(count)[None, :, None],
                                              (batch, count, 1, count)))
    return jnp.einsum("bnhm,bmk->bhnk", rows_bkhm, holds_bm1k[:, :, 0])

  def __call__(self, query_bnhd, key_bmhd, value_bmhe, rescore: Callable = _same):
    """(B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e) in the values' dtype.

    e may differ from d. Without a `rescore` nobody sees the maps.
    """
    count, spread_bmhe = value_bmhe.shape[1], self.spread(value_bmhe)
    if self.blocks is not None and rescore is _same and self.alive is None:
      return self.gather(self.blocks.attend(query_bnhd, key_bmhd, spread_bmhe, self._bias()))
    maps_bhnm = self.maps(query_bnhd, key_bmhd, rescore)
    # Merged maps would weigh as many values as there are.
    with share(self.linked * Fraction(count, spread_bmhe.shape[1]) ** 2):
      return self.gather(weigh(maps_bhnm, spread_bmhe))


DENSE = Core()   # all keys count alike


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def wants_links(module: nn.Module) -> bool:
  """Whether somebody asked for what predictors of links are trained with."""
  return module.is_mutable_collection("links") and not module.is_initializing()
