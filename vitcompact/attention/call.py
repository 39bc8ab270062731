"""`Core`: one call of attention and its options."""
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitcompact.attention import forms, reference
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.choice import choose
from vitcompact.attention.device import current, requested_form


def _identity(x):
  return x


class Core(NamedTuple):
  """softmax(q k^T / sqrt(d)) v for each head, with options that depend on the tokens of a block.

  size: (B, M) or None: a key counts as `size` equal keys (log size is added to its scores).
  merge: (B, M, ...) -> (B, K, ...) or None: weighted means, with the same weights for keys and
    values, taken before the scores; `size` then has shape (B, K).
  spread, gather: functions of the values before attention and of the outputs after it, if tokens
    are merged between scores and values; else the identity. average: whether `gather` returns means
    of rows. If not, it cannot be applied to outputs, and the maps are formed.
  keep_mask: (B, M) or None: see `reference.softmax_kept`.
  mask: (B, h, N, M) or None: if false, the query does not attend to the key. If `rescore` returns
    more heads than that, head i has the mask of head i modulo h.
  scored: the share of the pairs of tokens that the mask keeps.
  layout: which blocks of tokens attend to which, or None.
  value_share: the share of the scored pairs that is needed for the values: tokens that are merged
    after the scores count once; set by the call itself.
  operator: replaces the softmax: (core, query, key, value) -> (B, N, h, e); its `maps` (core,
    query, key) returns maps if it has any. local: (value of all heads, x) -> (B, N, h, d), added to
    the heads' outputs; x (B, N, width) is the input of the attention.

  A `rescore` changes the scores before the softmax: (B, f, N, M), edges -> (B, h, N, M). A row of
  its result may depend on `rescore.reach` rows before and after it, with zeros beyond the ends.
  edges=True: the scores are all rows. edges=False: the first and last `reach` rows are a halo, and
  not rows of the result.
  """
  size: jax.Array | None = None
  merge: Callable | None = None
  spread: Callable = _identity
  gather: Callable = _identity
  average: bool = True
  keep_mask: jax.Array | None = None
  mask: jax.Array | None = None
  scored: Fraction = Fraction(1)
  layout: BlockLayout | None = None
  value_share: Fraction = Fraction(1)
  operator: Callable | None = None
  local: Callable | None = None

  def __call__(self, query_bnhd, key_bmhd, value_bmhe, rescore: Callable | None = None):
    """(B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e) in the values' dtype.

    e may differ from d. Most forms do not form the maps.
    """
    if self.operator is not None:
      return self.gather(self.operator(self, query_bnhd, key_bmhd, self.spread(value_bmhe)))
    if self.merge is not None:
      merged = self._replace(merge=None)
      return merged(query_bnhd, self.merge(key_bmhd), self.merge(value_bmhe), rescore)
    if not self.average:
      return reference.weigh(self.merged(self.maps(query_bnhd, key_bmhd, rescore)), value_bmhe)
    count, value_bmhe = value_bmhe.shape[1], self.spread(value_bmhe)
    arrays, device = (query_bnhd, key_bmhd, value_bmhe), current()
    choice = choose(device, self, *arrays, rescore, requested_form())
    if choice.block_sparse:
      return self.gather(self.layout.attend(*arrays, self.bias(), choice.form))
    if self.layout is not None:
      warnings.warn(choice.note, stacklevel=2)
    call = self.masked()._replace(value_share=Fraction(count, value_bmhe.shape[1]) ** 2)
    return self.gather(forms.COMPUTE[choice.form](call, *arrays, rescore, device))

  def maps(self, query_bnhd, key_bmhd, rescore: Callable | None = None, own_n=None,
           edges: bool = True):
    """Returns attention maps (B, h, N, M), float32; see `reference.maps`. Merged keys share the
    weight of their mean."""
    if self.operator is not None:
      return self.operator.maps(self, query_bnhd, key_bmhd)
    if self.merge is not None:
      merged = self._replace(merge=None)
      maps_bhnk = merged.maps(query_bnhd, self.merge(key_bmhd), rescore, own_n, edges)
      batch, count = key_bmhd.shape[:2]
      share_bkm = self.merge(jnp.broadcast_to(jnp.eye(count), (batch, count, count)))
      return jnp.einsum("bhnk,bkm->bhnm", maps_bhnk, share_bkm)
    return reference.maps(self, query_bnhd, key_bmhd, rescore, own_n, edges)

  def merged(self, maps_bhnm):
    """Converts maps of the tokens that are scored to maps of the tokens that have values and
    outputs, if tokens are merged in between."""
    if self.spread is _identity:
      return maps_bhnm
    rows_bnhm = maps_bhnm.swapaxes(1, 2)
    batch, count = jax.eval_shape(self.gather, rows_bnhm).shape[:2]
    holds_bm1k = self.spread(jnp.broadcast_to(jnp.eye(count)[None, :, None],
                                              (batch, count, 1, count)))
    rows_bnhk = jnp.einsum("bnhm,bmk->bnhk", rows_bnhm, holds_bm1k[:, :, 0])
    return self.gather(rows_bnhk).swapaxes(1, 2)

  def of_heads(self, start: int, stop: int) -> "Core":
    """Returns the attention of heads `start` to `stop`."""
    if self.layout is not None:
      return self._replace(layout=self.layout.of_heads(start, stop))
    return self if self.mask is None else self._replace(mask=self.mask[:, start:stop])

  def masked(self) -> "Core":
    """Returns the same attention with a mask of tokens instead of a layout of blocks."""
    return self if self.layout is None else self._replace(mask=self.layout.mask(), layout=None)

  def bias(self):
    """Returns (B, M) float32 to add to the scores of keys, or None."""
    return None if self.size is None else jnp.log(self.size.astype(jnp.float32))

  def is_merged(self) -> bool:
    """Whether tokens are merged between the scores and the values."""
    return self.spread is not _identity or self.gather is not _identity

  def is_plain(self, rescore: Callable | None = None) -> bool:
    """Whether every query attends to every key, and only a bias on keys changes the scores."""
    return all(x is None for x in (rescore, self.keep_mask, self.mask, self.layout,
                                   self.operator))


DENSE = Core()   # full attention, all keys alike
