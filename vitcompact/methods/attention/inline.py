"""InLine: injective linear attention, with a local term that depends on the image.

Han et al., arXiv 2412.06590 (NeurIPS 2024). Weights are linear in the scores; instead of a softmax,
a shift of their mean makes them sum to 1. They may be negative. No map is formed: the cost is
linear in the number of tokens.
"""
import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from vitcompact.attention import SCOPE, Core
from vitcompact.depthwise import SHIFT_AND_ADD
from vitcompact.layers import fan_in_uniform, gelu
from vitcompact.methods.protocol import Site
from vitcompact.torch_names import Entry, conv
from vitcompact.tracing import param
from vitcompact.trees import Leaf

TAPS = 3   # side of the local term's kernels


@dataclasses.dataclass(frozen=True)
class InLine:
  """Attention axis: linear attention instead of the softmax.

    w_ij = 1/M + c (q_i . k_j - mean_s q_i . k_s),  c = 1 / (M sqrt(d)),  over M keys
    y_i  = c q_i (K^T V) + (1 - q_i . mean(k) / sqrt(d)) mean(v)

  local: adds each channel of the values, filtered over the grid by a 3 x 3 kernel that two layers
    compute from the mean of the block's tokens; prefix tokens get nothing. It needs the whole grid,
    and as many keys as queries.

  Queries, keys, values and outputs have the shapes of a dense block, but compute another function:
  train from scratch or fine-tune. c divides by the number of keys; the released code divides by the
  number of queries, which is the same there.
  """
  axis: ClassVar[str] = "attention"
  provenance: ClassVar = ("arXiv 2412.06590", "its use in other networks is ours")
  rules: ClassVar = [(r".*/inline/kernel\d", Leaf((None, None, None), decay=True)),
                     (r".*/inline/bias\d", Leaf())]

  local: bool = True

  def __post_init__(self):
    if not isinstance(self.local, bool):
      raise ValueError(f"InLine(local={self.local!r}): must be True or False")

  def check(self, site: Site):
    if self.local and site.query_grid != site.key_grid:
      raise ValueError(f"InLine(local=True) in block {site.block}: the grid of queries is "
                       f"{site.query_grid}, that of keys {site.key_grid}; use local=False, or a "
                       "model with sr_ratios=(1, 1, 1, 1)")

  def needs(self, site: Site) -> dict[str, str]:
    del site
    needs = {"softmax": "use attention=None there"}
    return needs | ({"grid": "use local=False", "all heads": "use local=False"} if self.local
                    else {})

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("softmax", "all scores")

  def make(self, site: Site, **kwargs) -> nn.Module:
    return Linear(self, site.heads, site.head_width, site.prefix, site.query_grid, **kwargs)

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries under the authors' names."""
    names = enumerate(("0", "2"), start=1) if self.local else ()
    return [entry._replace(leaves=tuple(leaf.replace("/kernel", f"/kernel{i}")
                                        .replace("/bias", f"/bias{i}") for leaf in entry.leaves))
            for i, name in names
            for entry in conv(f"{torch}.attn.residual.{name}", f"{ours}/inline")]


class Injective(NamedTuple):
  """The operator that replaces the softmax, see `attention.Core`."""

  def __call__(self, core: Core, query_bnhd, key_bmhd, value_bmhe):
    """Returns (B, N, h, e) in the values' dtype; sums over keys are float32."""
    with jax.named_scope(SCOPE):
      scale = query_bnhd.shape[-1] ** -0.5
      # Heads before tokens: with heads in between, XLA:CPU multiplies at a quarter of the speed.
      query, key, value = (x.swapaxes(1, 2) for x in (query_bnhd, key_bmhd, value_bmhe))
      share_b1m1 = shares(core, key_bmhd)[:, None, :, None]
      key_mean, value_mean = (jnp.sum(x * share_b1m1, axis=2, keepdims=True, dtype=jnp.float32)
                              for x in (key, value))
      weighed = (key * share_b1m1).astype(key.dtype).swapaxes(2, 3)
      products_bhde = jnp.matmul(weighed, value, preferred_element_type=jnp.float32)
      # Both terms are linear in the queries: one product with a d x e matrix for each head.
      matrix_bhde = scale * (products_bhde - key_mean.swapaxes(2, 3) * value_mean)
      out = jnp.matmul(query, matrix_bhde.astype(query.dtype))
    return (out + value_mean.astype(out.dtype)).swapaxes(1, 2)

  def maps(self, core: Core, query_bnhd, key_bmhd):
    """Returns the weights w (B, h, N, M), float32; their rows sum to 1."""
    scale = query_bnhd.shape[-1] ** -0.5
    with jax.named_scope(SCOPE):
      scores = scale * jnp.einsum("bnhd,bmhd->bhnm", query_bnhd, key_bmhd,
                                  preferred_element_type=jnp.float32)
    share_b11m = shares(core, key_bmhd)[:, None, None]
    return share_b11m * (1 + scores - jnp.sum(scores * share_b11m, axis=-1, keepdims=True))


def shares(core: Core, key_bmhd):
  """Returns (B, M) float32, the share of each key: 1/M, or in proportion to size and keep mask."""
  share = jnp.ones(key_bmhd.shape[:2], jnp.float32)
  for weight_bm in (core.size, core.keep_mask):
    share = share if weight_bm is None else share * weight_bm
  return share / share.sum(axis=1, keepdims=True)


class Linear(nn.Module):
  """Makes attention linear; owns the two layers that compute the local term's kernels.

  Layers are grouped by heads and stored like grouped convolutions: kernel1 (1, d, heads * d),
  kernel2 (1, d, heads * d * 9), with the taps of a channel next to each other.
  """
  spec: InLine
  heads: int
  head_width: int
  prefix: int = 0
  grid: tuple[int, int] | None = None

  def setup(self):
    if self.spec.local:
      draw, width = fan_in_uniform(self.head_width), self.heads * self.head_width
      for i, out in ((1, width), (2, width * TAPS ** 2)):
        setattr(self, f"kernel{i}", param(self, f"kernel{i}", draw, (1, self.head_width, out)))
        setattr(self, f"bias{i}", param(self, f"bias{i}", draw, (out,)))

  def __call__(self, core: Core, query_bnhd, key_bmhd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` with the linear operator and the local term."""
    del query_bnhd, key_bmhd, source_bs, fused
    return core._replace(operator=Injective(), local=self.local_term if self.spec.local else None)

  def local_term(self, value_bnhd, x_bnw):
    """Filters the values by kernels that depend on x (B, N, heads * d); returns (B, N, h, d)."""
    batch, tokens, heads, _ = value_bnhd.shape
    mean_bhd = optimization_barrier(x_bnw).mean(axis=1).reshape(batch, heads, -1)
    hidden_bhd = gelu(self._linear_per_head(mean_bhd, self.kernel1, self.bias1))
    taps_bct = self._linear_per_head(hidden_bhd, self.kernel2, self.bias2)
    taps_bct = taps_bct.reshape(batch, -1, TAPS ** 2)
    reach, (height, width) = TAPS // 2, self.grid
    planes = value_bnhd[:, self.prefix:].reshape(batch, height, width, -1)
    # Channels last, padded once: a CPU then reads whole vectors.
    taps_tb11c = optimization_barrier(taps_bct.transpose(2, 0, 1)[:, :, None, None])
    padded = optimization_barrier(
        jnp.pad(planes, [(0, 0), (reach, reach), (reach, reach), (0, 0)]))
    with jax.named_scope(SHIFT_AND_ADD):
      filtered = sum(padded[:, s:s + height, t:t + width] * taps_tb11c[s * TAPS + t]
                     for s in range(TAPS) for t in range(TAPS))
    filtered = jnp.pad(filtered.reshape(batch, tokens - self.prefix, -1),
                       [(0, 0), (self.prefix, 0), (0, 0)])
    return filtered.reshape(value_bnhd.shape)

  def _linear_per_head(self, x_bhd, kernel, bias):
    """Applies a linear layer of its own to each head: (B, h, d) -> (B, h, out)."""
    kernel_dhk = kernel[0].reshape(self.head_width, self.heads, -1).astype(x_bhd.dtype)
    return jnp.einsum("bhd,dhk->bhk", x_bhd, kernel_dhk) + \
        bias.reshape(1, self.heads, -1).astype(x_bhd.dtype)
