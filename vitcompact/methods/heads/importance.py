"""How much the output of attention changes if some of its heads are removed. Our criterion."""
import itertools
import math

import jax.numpy as jnp
import numpy as np

from vitcompact.methods import protocol
from vitcompact.methods.heads import refit
from vitcompact.methods.protocol import Site
from vitcompact.regression import HIGH, gram


def losses(params, data=None) -> np.ndarray:
  """Returns a matrix L (h, h): removing a set S of heads changes the output of attention by the sum
  of L[i, j] over i and j in S (a mean square over tokens).

  With calibration images, L is the covariance of the heads' contributions: their means do not
  count, because a bias can replace them. Without images, L is diagonal, with |V_i O_i|^2, as if the
  heads' contributions were independent.
  """
  value, out = params["attn"]["value"], params["attn"]["out"]["kernel"]
  if data is None:
    size = jnp.einsum("whd,hdv->hwv", value["kernel"], out)
    return np.diag(np.asarray(jnp.sum(size * size, axis=(1, 2)), np.float64))
  function, arguments = statistics(params)
  return covariance(data.sums(function, *arguments)[0])


def statistics(params):
  """Returns (`contributions`, its arguments) of a block without methods of the heads axis."""
  value, out = params["attn"]["value"], params["attn"]["out"]["kernel"]
  bias = value.get("bias", jnp.zeros(out.shape[:2]))
  return contributions, (value["kernel"], bias, out)


def covariance(sums) -> np.ndarray:
  """Returns the covariance (h, h) of the heads' contributions, summed over the width, from sums of
  `contributions`."""
  products, totals, tokens = sums
  return products / tokens - totals @ totals.T / tokens ** 2


def has_maps(site: Site, data) -> bool:
  """Whether the block has attention maps on calibration images."""
  method = None if data is None else data.module.methods.attention
  removed = () if method is None else protocol.removes(method, site)
  return data is not None and "maps" in site.provides and "maps" not in removed


def contributions(seen, value, bias, out):
  """Returns sums over tokens of c_i . c_j (h, h) and of c_i (h, width), and the number of tokens;
  c_i = A_i V_i O_i is the contribution of head i to the attention's output.

  value (width, h, d), bias (h, d), out (h, d, width): of a block without methods of the heads axis.
  """
  seen = seen.with_fewer_images()
  values_bmhd = jnp.einsum("bmw,whd->bmhd", seen.keys, value) + bias[None, None]
  out_bnhd = jnp.einsum("bhnm,bmhd->bnhd", seen.maps, values_bmhd).astype(jnp.float32)
  heads, width = out_bnhd.shape[2:]
  # Products are summed before the output matrices, after which each head is as wide as the stream.
  products = gram(out_bnhd.reshape(-1, heads * width)).reshape(heads, width, heads, width)
  return (jnp.einsum("hdge,hdw,gew->hg", products, out, out, precision=HIGH),
          jnp.einsum("hd,hdw->hw", out_bnhd.sum(axis=(0, 1)), out, precision=HIGH),
          jnp.asarray(out_bnhd.shape[0] * out_bnhd.shape[1], jnp.float32))


def kept_first(loss_hh: np.ndarray, kept: int) -> tuple[int, ...]:
  """Returns an order of the heads: the set of kept heads, then the dropped ones, each ascending.

  loss_hh: from `losses`. Drops the set with the least loss; if there are too many sets to try,
  drops heads one by one.
  """
  heads = len(loss_hh)

  def cost(dropped):
    return loss_hh[np.ix_(dropped, dropped)].sum()

  if math.comb(heads, kept) <= refit.MAX_SETS:
    dropped = min(itertools.combinations(range(heads), heads - kept), key=cost)
  else:
    dropped = ()
    while len(dropped) < heads - kept:
      dropped += (min(set(range(heads)) - set(dropped), key=lambda head: cost((*dropped, head))),)
  return (*(head for head in range(heads) if head not in dropped), *sorted(dropped))
