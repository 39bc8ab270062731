"""The attention core: everything that attends goes through `Core`."""
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# A name scope: `count` finds the score and value products of a traced program by it.
SCOPE = "vitcompact.attention"


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


def _same(x):
  return x


class Core(NamedTuple):
  """softmax(q k^T / sqrt(d)) v for each head, as the tokens of a block ask for it.

  size: (B, M) or None: a key counts as so many equal keys (log size is added to its scores).
  spread: applied to the values before, gather: to the outputs after; the identity, but where tokens
    are merged between the scores and the values.
  mask: (B, h, N, M) or None: where it is false a key gets nothing from a query. `rescore` may make
    more heads than there are queries; head i then has the mask of head i modulo h.
  linked: share of the pairs of tokens that the mask leaves.
  blocks: a `links.blocks.BlockLinks` or None: which blocks of tokens are linked; it attends.
  """
  size: jax.Array | None = None
  spread: Callable = _same
  gather: Callable = _same
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
    return jax.nn.softmax(self.masked_scores(query_bnhd, key_bmhd, rescore), axis=-1)

  def __call__(self, query_bnhd, key_bmhd, value_bmhe, rescore: Callable = _same):
    """(B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e) in the values' dtype.

    e may differ from d. Without a `rescore` nobody sees the maps.
    """
    value_bmhe = self.spread(value_bmhe)
    if self.blocks is not None and rescore is _same:
      return self.gather(self.blocks.attend(query_bnhd, key_bmhd, value_bmhe, self._bias()))
    maps_bhnm = self.maps(query_bnhd, key_bmhd, rescore)
    with share(self.linked):
      out_bnhe = weigh(maps_bhnm, value_bmhe)
    return self.gather(out_bnhe)


DENSE = Core()   # all keys count alike


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def wants_links(module: nn.Module) -> bool:
  """Whether somebody asked for what predictors of links are trained with."""
  return module.is_mutable_collection("links") and not module.is_initializing()
