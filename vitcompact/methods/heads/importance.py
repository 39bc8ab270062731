"""What the attention's output would lose without some of its heads. Ours."""
import itertools
import math

import jax.numpy as jnp
import numpy as np

from vitcompact.methods import protocol
from vitcompact.methods.heads import refit
from vitcompact.methods.protocol import Site
from vitcompact.regression import HIGH, gram


def losses(params, data=None) -> np.ndarray:
  """(h, h): without a set of heads, the sum of its rows and columns is lost, in mean squares of the
  attention's output.

  From calibration images, the covariance of what heads contribute; what a head always adds, a bias
  can make up for. Without them, |V_i O_i|^2, as if heads contributed independently.
  """
  value, out = params["attn"]["value"], params["attn"]["out"]["kernel"]
  if data is None:
    size = jnp.einsum("whd,hdv->hwv", value["kernel"], out)
    return np.diag(np.asarray(jnp.sum(size * size, axis=(1, 2)), np.float64))
  function, arguments = statistics(params)
  return covariance(data.sums(function, *arguments)[0])


def statistics(params):
  """(`contributions`, its arguments) of a block without methods of its heads."""
  value, out = params["attn"]["value"], params["attn"]["out"]["kernel"]
  bias = value.get("bias", jnp.zeros(out.shape[:2]))
  return contributions, (value["kernel"], bias, out)


def covariance(sums) -> np.ndarray:
  """(h, h) of what heads add, summed over the width, from sums of `contributions`."""
  products, totals, tokens = sums
  return products / tokens - totals @ totals.T / tokens ** 2


def has_maps(site: Site, data) -> bool:
  """Whether the block that calibration images go through has attention maps."""
  method = None if data is None else data.module.methods.attention
  taken = () if method is None else protocol.removes(method, site)
  return data is not None and "maps" in site.provides and "maps" not in taken


def contributions(seen, value, bias, out):
  """Sums over tokens of c_i . c_j (h, h) and of c_i (h, width), and their number; c_i = A_i V_i O_i
  is what head i adds to the attention's output.

  value (width, h, d), bias (h, d), out (h, d, width): of a block without methods of its heads.
  """
  seen = seen.of_fewer_images()
  values_bmhd = jnp.einsum("bmw,whd->bmhd", seen.keys, value) + bias[None, None]
  made_bnhd = jnp.einsum("bhnm,bmhd->bnhd", seen.maps, values_bmhd).astype(jnp.float32)
  heads, width = made_bnhd.shape[2:]
  # Behind the outputs they are as wide as the stream, head by head; their products need not be.
  products = gram(made_bnhd.reshape(-1, heads * width)).reshape(heads, width, heads, width)
  return (jnp.einsum("hdge,hdw,gew->hg", products, out, out, precision=HIGH),
          jnp.einsum("hd,hdw->hw", made_bnhd.sum(axis=(0, 1)), out, precision=HIGH),
          jnp.asarray(made_bnhd.shape[0] * made_bnhd.shape[1], jnp.float32))


def kept_first(lost: np.ndarray, kept: int) -> tuple[int, ...]:
  """The heads in an order in which the set of those that stay comes first, each set by number.

  lost: from `losses`. The set that goes is the one without which least is lost; of too many sets to
  try all, heads go one by one.
  """
  heads = len(lost)

  def cost(gone):
    return lost[np.ix_(gone, gone)].sum()

  if math.comb(heads, kept) <= refit.SETS:
    gone = min(itertools.combinations(range(heads), heads - kept), key=cost)
  else:
    gone = ()
    while len(gone) < heads - kept:
      gone += (min(set(range(heads)) - set(gone), key=lambda head: cost((*gone, head))),)
  return (*(head for head in range(heads) if head not in gone), *sorted(gone))
