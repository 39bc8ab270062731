"""hMHSA: compute half of the attention maps, hallucinate the others from them.

Our reconstruction of hallucinated-MHSA (Xu et al., arXiv 2306.10875), of which only the abstract
is public. A hallucinated map is the map of a real head, its source, filtered by a small separable
kernel over (query, key): A^ = sum_r U_r A W_r with U, W banded. It is linear in A, so
A^ V = sum_r U_r (A (W_r V)): the key-side filter moves onto the values, the query-side filter onto
the output, and no N x M map is formed for a hallucinated head. A real head and the heads that use
its map share one softmax: one attention with wider values.
"""
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.depthwise import SHIFT_AND_ADD
from vitcompact.methods import surgery
from vitcompact.methods.heads import refit
from vitcompact.methods.protocol import Site
from vitcompact.tracing import param
from vitcompact.trees import Leaf


@dataclasses.dataclass(frozen=True)
class HMHSA:
  """Heads axis: compute `real_heads` attention maps, hallucinate the others.

  site: "probs" filters the maps after the softmax (moved onto values and outputs: fast);
    "logits" mixes and filters the scores before the softmax (forms maps: a slower reference).
  rank: number of separable terms, 1 to `kernel`; `kernel` terms give any kernel x kernel filter.
  kernel: number of taps per side, odd.
  layout: "map" filters along the order of tokens, class token included; "grid" filters over the 2-D
    grids of query and key patches, with one gain for each prefix token.
  real_heads: "half" (rounded up) or a number; the other heads are hallucinated.
  """
  axis: ClassVar[str] = "heads"
  provenance: ClassVar = ("arXiv 2306.10875, of which only the abstract is public",
                          "our reconstruction: everything except that half of the maps are "
                          "hallucinated from the others")
  scope: ClassVar[str] = "hallucinate"
  # No weight decay: it would pull the taps, initially a delta, to zero.
  rules: ClassVar = [(r".*/hallucinate/(query_taps|key_taps|query_gain|key_gain|mix|taps)", Leaf())]

  site: str = "probs"
  rank: int = 1
  kernel: int = 3
  layout: str = "map"
  real_heads: str | int = "half"

  def __post_init__(self):
    if self.site not in ("probs", "logits"):
      raise ValueError(f"HMHSA(site={self.site!r}): must be 'probs' or 'logits'")
    if self.layout not in ("map", "grid"):
      raise ValueError(f"HMHSA(layout={self.layout!r}): must be 'map' or 'grid'")
    if not is_count(self.kernel) or self.kernel % 2 == 0:
      raise ValueError(f"HMHSA(kernel={self.kernel!r}): must be an odd whole number, such as 3")
    if not is_count(self.rank) or self.rank > self.kernel:
      raise ValueError(f"HMHSA(rank={self.rank!r}): must be a whole number from 1 to "
                       f"kernel={self.kernel}, which already gives every filter")
    if self.real_heads != "half" and not is_count(self.real_heads):
      raise ValueError(f"HMHSA(real_heads={self.real_heads!r}): must be 'half' or a whole number "
                       "of at least 1")
    if self.site == "logits" and (self.layout == "grid" or self.rank > 1):
      raise ValueError(f"HMHSA(site='logits', layout={self.layout!r}, rank={self.rank}): the "
                       "logits site has one full filter over the map; use layout='map', rank=1")

  def count_real(self, heads: int) -> int:
    """Returns how many of `heads` have a computed map; a single head is always real."""
    if heads == 1:
      return 1
    if self.real_heads == "half":
      return (heads + 1) // 2
    if self.real_heads > heads:
      raise ValueError(f"HMHSA(real_heads={self.real_heads}): the block has only {heads} heads")
    return self.real_heads

  def explicit(self, site: Site) -> "HMHSA":
    return dataclasses.replace(self, real_heads=self.count_real(site.heads))

  def scored_heads(self, site: Site) -> int:
    return self.count_real(site.heads)

  def acts(self, site: Site) -> bool:
    return self.scored_heads(site) < site.heads

  def needs(self, site: Site) -> dict[str, str]:
    del site
    out = {"maps": "use heads=None there",
           "token order": "use order='position' in the method that reduces tokens"}
    out |= ({"grid": "use layout='map' there"} if self.layout == "grid" else
            {"token line": "use layout='grid' there"})
    if self.site == "logits":
      out |= {"softmax": "use site='probs'",
              "all scores": "use site='probs', or granularity='token'"}
    return out

  def from_dense(self, site: Site, params, stats, data):
    """Chooses and fits the heads on calibration images. Without these, or if a local term fixes the
    order of heads, the first heads are real and the others copy their maps in order."""
    taps = {}
    if data is not None and not site.local:
      params, taps = refit.fit_hallucinated(self, site, params, data)
    _, new = surgery.fresh(self, site)
    params = surgery.cut_heads(self, site, params)
    leaves = {**new["params"], **taps}
    return {**params, "attn": {**params["attn"], self.scope: leaves}}, stats

  @classmethod
  def options(cls, site: Site) -> list["HMHSA"]:
    """Returns numbers of real heads from half of the heads to all but one."""
    layout = "map" if "token line" in site.provides else "grid"
    return [cls(real_heads=real, layout=layout)
            for real in range((site.heads + 1) // 2, site.heads)]

  @classmethod
  def statistics(cls, params):
    """Returns the sums for the error of each head as a replacement of each other."""
    value, out = params["attn"]["value"], params["attn"]["out"]["kernel"]
    bias = value.get("bias", jnp.zeros(out.shape[:2]))
    return refit.head_costs, (value["kernel"], bias, out)

  @classmethod
  def estimate(cls, options, site: Site, sums):
    """Returns relative errors of the attention's output with copied maps, and the table head_cost:
    [i][j] is the error of head i as a replacement of head j."""
    costs, _ = sums
    total = np.trace(costs)
    errors = [refit.arrange(costs, method.count_real(site.heads)).cost / total
              for method in options]
    table = costs / np.diag(costs)[None]
    return errors, {"head_cost": np.where(np.eye(len(costs)), 0, table).round(4).tolist()}

  def make(self, site: Site, **kwargs) -> nn.Module:
    return Hallucinate(self, site.query_grid, site.key_grid, site.prefix, **kwargs)


def is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def shifted_sum(x, taps, axes: tuple[int, ...]):
  """Sums taps[t] * (x shifted by t) over t, zero-padded: a depthwise correlation along `axes`.

  Args:
    x: any array.
    taps: {offsets: array that broadcasts against x}, one entry for each tap.
    axes: the axes of x to shift, one for each offset of a tap.
  """
  reach = max(abs(step) for offsets in taps for step in offsets)
  padded = jnp.pad(x, [(reach, reach) if axis in axes else (0, 0) for axis in range(x.ndim)])
  total = 0
  for offsets, tap in taps.items():
    start, stop = [0] * x.ndim, list(padded.shape)
    for axis, step in zip(axes, offsets, strict=True):
      start[axis] = reach + step
      stop[axis] = start[axis] + x.shape[axis]
    total = total + jax.lax.slice(padded, start, stop) * tap
  return total


def filter_line(x_bnhrd, taps_hrk):
  """Correlates tokens with K taps along their order: y[n] = sum_t taps[t] x[n + t - K//2]."""
  half, tokens = taps_hrk.shape[-1] // 2, x_bnhrd.shape[1]

  def shift_tokens(step):
    """Shifts tokens by `step`; concatenates, which XLA:CPU runs faster than padding."""
    if step == 0:
      return x_bnhrd
    if attention.portable():
      return jax.lax.pad(x_bnhrd, jnp.zeros((), x_bnhrd.dtype),
                         [(-step, step, 0) if axis == 1 else (0, 0, 0) for axis in range(5)])
    kept = x_bnhrd[:, max(step, 0):max(tokens + min(step, 0), 0)]
    zeros = jnp.zeros_like(x_bnhrd[:, :abs(step)])
    return jnp.concatenate([kept, zeros] if step > 0 else [zeros, kept], axis=1)

  with jax.named_scope(SHIFT_AND_ADD):
    return sum(shift_tokens(t - half) * taps_hrk[None, None, :, :, t, None]
               for t in range(taps_hrk.shape[-1]))


def filter_grid(x_bnhrd, taps_hrkk, gain_hrp, grid: tuple[int, int]):
  """Correlates the tokens of a grid with K x K taps; prefix tokens are scaled by their gain."""
  prefix = gain_hrp.shape[-1]
  half = taps_hrkk.shape[-1] // 2
  steps = range(-half, half + 1)
  taps = {(s, t): taps_hrkk[None, None, None, :, :, s + half, t + half, None]
          for s in steps for t in steps}
  batch, tokens, *rest = x_bnhrd.shape
  with jax.named_scope(SHIFT_AND_ADD):
    plane = shifted_sum(x_bnhrd[:, prefix:].reshape(batch, *grid, *rest), taps, axes=(1, 2))
    flat = plane.reshape(batch, tokens - prefix, *plane.shape[3:])
    if not prefix:
      return flat
    gain_1phr1 = gain_hrp.transpose(2, 0, 1)[None, ..., None]
    return jnp.concatenate([x_bnhrd[:, :prefix] * gain_1phr1, flat], axis=1)


def attend_hallucinated(core: Core, query_bnfd, key_bmfd, value_bmhd, key_filter: Callable,
                        query_filter: Callable):
  """Computes attention in which hallucinated heads use filtered maps, without forming these maps.

  The source of hallucinated head g is real head g mod f.

  Args:
    core: the attention of one call.
    query_bnfd, key_bmfd: (B, N, f, d), (B, M, f, d) of the f real heads.
    value_bmhd: (B, M, h, d) of all heads: the real ones, then the hallucinated ones.
    key_filter: (B, M, g, d) values of the hallucinated heads -> (B, M, g, rank, d).
    query_filter: (B, N, g, rank, d) -> (B, N, g, d).
  Returns:
    (B, N, h, d).
  """
  real, heads, width = query_bnfd.shape[2], value_bmhd.shape[2], value_bmhd.shape[3]
  if heads == real:
    return core(query_bnfd, key_bmfd, value_bmhd)
  spread_bmgrd = key_filter(value_bmhd[:, :, real:])
  rank = spread_bmgrd.shape[3]
  partners = -(-(heads - real) // real)            # hallucinated heads of a real head, at most
  full = heads - real - (partners - 1) * real      # number of real heads with that many partners
  real_out, partner_out = [], [[] for _ in range(partners)]
  for start, stop, count in ((0, full, partners), (full, real, partners - 1)):
    if start == stop:
      continue
    # Real heads with one partner less make a second, narrower call, so that no values are padded.
    values = [value_bmhd[:, :, start:stop]]
    for p in range(count):
      spread = spread_bmgrd[:, :, p * real + start:p * real + stop]
      values.append(spread.reshape(*spread.shape[:3], rank * width))
    out = core.of_heads(start, stop)(query_bnfd[:, :, start:stop], key_bmfd[:, :, start:stop],
                                     jnp.concatenate(values, axis=-1))
    real_out.append(out[..., :width])
    for p in range(count):
      part = out[..., width * (1 + p * rank):width * (1 + (p + 1) * rank)]
      partner_out[p].append(part.reshape(*part.shape[:3], rank, width))
  hallucinated = jnp.concatenate([x for row in partner_out for x in row], axis=2)
  return jnp.concatenate([*real_out, query_filter(hallucinated)], axis=2)


class ScoreFilter(NamedTuple):
  """Scores of the real heads -> scores of all heads: mixes heads, then filters each map with K x K
  taps.

  mix (f, g); taps (g, K, K).
  """
  mix: jax.Array
  taps: jax.Array

  @property
  def reach(self) -> int:
    """Halo: how many rows before and after those of the result the filter needs."""
    return self.taps.shape[-1] // 2

  def __call__(self, scores_bfnm, edges: bool = True):
    """Filters scores, (B, f, N, M) -> (B, h, N, M); edges: see `attention.Core`."""
    reach, (_, _, rows, keys) = self.reach, scores_bfnm.shape
    padding = reach if edges else 0
    with jax.named_scope(SHIFT_AND_ADD):
      # Summing costs less than a product of matrices this narrow.
      x_bgnm = sum(scores_bfnm[:, i, None] * self.mix[i][None, :, None, None]
                   for i in range(self.mix.shape[0]))
      x_bgnm = jnp.pad(x_bgnm, [(0, 0), (0, 0), (padding, padding), (reach, reach)])
      rows, steps = rows + 2 * (padding - reach), range(2 * reach + 1)
      filtered_bgnm = sum(
          x_bgnm[:, :, s:s + rows, t:t + keys] * self.taps[None, :, s, t, None, None]
          for s in steps for t in steps)
    real_bfnm = scores_bfnm if edges else scores_bfnm[:, :, reach:reach + rows]
    return jnp.concatenate([real_bfnm, filtered_bgnm], axis=1)


def delta_init(key, shape, dtype=jnp.float32):
  """Initialises each of shape[0] kernels as a centred delta."""
  del key
  return jnp.zeros(shape, dtype).at[:, *(k // 2 for k in shape[1:])].set(1)


def terms_init(spread: float):
  """Makes an initialiser of kernels (heads, rank, ...): the first term is a centred delta, the
  others are N(0, spread^2)."""
  def init(key, shape, dtype=jnp.float32):
    draws = spread * jax.random.normal(key, shape, dtype)
    return draws.at[:, 0].set(delta_init(key, (shape[0], *shape[2:]), dtype))
  return init


class Hallucinate(nn.Module):
  """Attention with real and hallucinated heads; owns the taps.

  query_grid, key_grid: (height, width) of the patches among queries and keys, or None without a
    grid; prefix: number of tokens before the patches. Only layout="grid" uses them.
  """
  spec: HMHSA
  query_grid: tuple[int, int] | None = None
  key_grid: tuple[int, int] | None = None
  prefix: int = 0

  @nn.compact
  def __call__(self, query_bnfd, key_bmfd, value_bmhd, core: Core = attention.DENSE, x_bnw=None):
    """Returns (B, N, h, d); x is not used."""
    del x_bnw
    spec, real = self.spec, query_bnfd.shape[2]
    hallucinated = value_bmhd.shape[2] - real
    if spec.site == "logits":
      return self._attend_mixed(query_bnfd, key_bmfd, value_bmhd, hallucinated, core)
    # Further terms start at zero on the query side only (u = 0, gain 0): with both sides at zero
    # they would get no gradient.
    key_taps, key_gain = self._taps("key", hallucinated, self.key_grid, spread=0.1, gain=1.0)
    query_taps, query_gain = self._taps("query", hallucinated, self.query_grid, spread=0.0,
                                        gain=0.0)
    # Correlating the key axis of the map equals correlating the values with the reversed taps.
    reversed_taps = jnp.flip(key_taps, range(2, key_taps.ndim))

    def key_filter(value_bmgd):
      return filter_side(value_bmgd[:, :, :, None], reversed_taps, key_gain, self.key_grid)

    def query_filter(out_bngrd):
      return filter_side(out_bngrd, query_taps, query_gain, self.query_grid).sum(axis=3)

    if attention.wants_maps(self):
      maps_bfnm = core.merged(core.maps(query_bnfd, key_bmfd))
      maps_bgnm = maps_bfnm[:, jnp.arange(hallucinated) % real]
      by_key = filter_side(maps_bgnm.transpose(0, 3, 1, 2)[:, :, :, None], key_taps, key_gain,
                           self.key_grid)
      filtered_bgnm = query_filter(by_key.transpose(0, 4, 2, 3, 1)).transpose(0, 2, 1, 3)
      self.sow("maps", "maps", jnp.concatenate([maps_bfnm, filtered_bgnm], axis=1))
    return attend_hallucinated(core, query_bnfd, key_bmfd, value_bmhd, key_filter, query_filter)

  def _taps(self, side: str, hallucinated: int, grid, spread: float, gain: float):
    """Returns the taps, and the gains of prefix tokens or None; `spread` and `gain` initialise the
    terms after the first."""
    spec = self.spec
    on_grid = spec.layout == "grid" and grid is not None
    shape = (hallucinated, spec.rank) + (spec.kernel,) * (2 if on_grid else 1)
    taps = param(self, f"{side}_taps", terms_init(spread), shape)
    if not on_grid or not self.prefix:
      return taps, None

    def init(key, shape, dtype=jnp.float32):
      del key
      return jnp.full(shape, gain, dtype).at[:, 0].set(1)

    return taps, param(self, f"{side}_gain", init, (hallucinated, spec.rank, self.prefix))

  def _attend_mixed(self, query_bnfd, key_bmfd, value_bmhd, hallucinated: int, core: Core):
    real = query_bnfd.shape[2]

    def identity_columns(key, shape, dtype=jnp.float32):
      del key
      return jnp.eye(real, dtype=dtype)[:, jnp.arange(shape[1]) % real]

    mix = param(self, "mix", identity_columns, (real, hallucinated))
    taps = param(self, "taps", delta_init, (hallucinated, self.spec.kernel, self.spec.kernel))

    rescore = ScoreFilter(mix, taps)
    if attention.wants_maps(self):
      self.sow("maps", "maps", core.merged(core.maps(query_bnfd, key_bmfd, rescore)))
    return core(query_bnfd, key_bmfd, value_bmhd, rescore)


def filter_side(x_bnhrd, taps, gain, grid):
  """Applies `filter_line` or `filter_grid`, depending on the rank of the taps."""
  taps = taps.astype(x_bnhrd.dtype)
  if taps.ndim == 3:
    return filter_line(x_bnhrd, taps)
  if gain is None:
    gain = jnp.ones((*taps.shape[:2], 0))
  return filter_grid(x_bnhrd, taps, gain.astype(x_bnhrd.dtype), grid)
