"""Head pruning: drops the least important heads of a block, the same for every image.

Michel et al., arXiv 1905.10650, and many after them. How heads are chosen, and how the others are
refitted to compensate, is ours: `HeadPruning.from_dense`.
"""
import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.methods import protocol, surgery
from vitcompact.methods.heads import importance, refit
from vitcompact.methods.protocol import Site


@dataclasses.dataclass(frozen=True)
class HeadPruning:
  """Heads axis: keeps `kept_heads` heads, with their queries, keys, values and outputs.

  kept_heads: "half" (rounded up) or a number; a block with fewer heads is an error.
  heads: None, or another method of this axis for the kept heads, such as HMHSA(), which then
    hallucinates half of them.
  """
  axis: ClassVar[str] = "heads"
  provenance: ClassVar = ("arXiv 1905.10650 and others",
                          "the choice of heads and the refit are ours")

  kept_heads: str | int = "half"
  heads: Any = None

  def __post_init__(self):
    kept = self.kept_heads
    if kept != "half" and (not isinstance(kept, int) or isinstance(kept, bool) or kept < 1):
      raise ValueError(f"HeadPruning(kept_heads={kept!r}): must be 'half' or a whole number of at "
                       "least 1")

  @property
  def scope(self) -> str:
    return "pruned" if self.heads is None else protocol.scope_of(self.heads)

  def inner_site(self, site: Site) -> Site:
    return site._replace(heads=self.value_heads(site), head_dim=site.head_width)

  def explicit(self, site: Site) -> "HeadPruning":
    return dataclasses.replace(self, kept_heads=self.value_heads(site))

  def value_heads(self, site: Site) -> int:
    kept = (site.heads + 1) // 2 if self.kept_heads == "half" else self.kept_heads
    if kept > site.heads:
      raise ValueError(f"HeadPruning(kept_heads={kept}): block {site.block} has {site.heads} heads")
    return kept

  def scored_heads(self, site: Site) -> int:
    inner, inside = protocol.inner_and_site(self, site)
    return self.value_heads(site) if inner is None else protocol.scored_heads(inner, inside)

  def acts(self, site: Site) -> bool:
    return self.value_heads(site) < site.heads or protocol.inner_and_site(self, site)[0] is not None

  def check(self, site: Site):
    if site.local:
      raise ValueError(f"HeadPruning in block {site.block}: this model adds a local term to the "
                       "outputs of all heads, so none can be dropped; use heads=None there")
    inner, inside = protocol.inner_and_site(self, site)
    if inner is not None:
      protocol.check(inner, inside)

  def needs(self, site: Site) -> dict[str, str]:
    inner, inside = protocol.inner_and_site(self, site)
    return {"maps": "use heads=None there",
            **({} if inner is None else protocol.needs(inner, inside))}

  def removes(self, site: Site) -> tuple[str, ...]:
    inner, inside = protocol.inner_and_site(self, site)
    return ("all heads", *(() if inner is None else protocol.removes(inner, inside)))

  def make(self, site: Site, **kwargs) -> nn.Module:
    inner, inside = protocol.inner_and_site(self, site)
    return KeptHeads(**kwargs) if inner is None else inner.make(inside, **kwargs)

  def from_dense(self, site: Site, params, stats, data):
    """Keeps the heads without which the attention's output would lose most.

    Without calibration images, heads are ranked by the size of their products of value and output
    matrices, |V_i O_i|. With them, the dropped set is the one with the least variance of its summed
    contributions, E |sum - mean|^2 (all sets are tried up to 20,000, else heads are dropped one by
    one); then values and outputs of the kept heads are refitted to the dense output. The constant
    part of a dropped head's contribution is added to the bias.
    """
    kept, pruning = self.value_heads(site), dataclasses.replace(self, heads=None)
    order = importance.kept_first(importance.losses(params, data), kept)
    params = refit.reorder_heads(params, order)
    constant = constant_contribution(params["attn"], kept)
    attn = surgery.cut_heads(pruning, site, params)["attn"]
    out = {**attn["out"], "bias": attn["out"]["bias"] + constant}
    params = {**params, "attn": {**attn, "out": out}}
    if data is not None:
      methods = data.module.methods._replace(heads=pruning)
      data = dataclasses.replace(data, module=data.module.clone(methods=methods), params=params)
    inner, inside = protocol.inner_and_site(self, site)
    if inner is not None:
      return surgery.from_dense(inner, inside, params, stats, data)
    return (params if data is None else refit_kept_heads(params, data, order)), stats

  @classmethod
  def options(cls, site: Site) -> list["HeadPruning"]:
    """Returns a quarter, half and three quarters of the heads."""
    kept = {round(site.heads * share) for share in (0.25, 0.5, 0.75)}
    return [cls(kept_heads=heads) for heads in sorted(kept - {0, site.heads})]

  @classmethod
  def statistics(cls, params):
    return importance.statistics(params)

  @classmethod
  def estimate(cls, options, site: Site, sums):
    """Returns the share of the variance of the attention's output that is lost with the dropped
    heads, before the others are refitted."""
    loss_hh = importance.covariance(sums)
    errors = []
    for method in options:
      kept = method.value_heads(site)
      dropped = list(importance.kept_first(loss_hh, kept)[kept:])
      errors.append(max(loss_hh[np.ix_(dropped, dropped)].sum(), 0.0) / max(loss_hh.sum(), 1e-30))
    return errors, {}

  def torch_entries(self, site: Site, torch: str, ours: str):
    """Returns no entries of its own: the kept heads are part of the block's tensors."""
    inner, inside = protocol.inner_and_site(self, site)
    return [] if inner is None else surgery.torch_entries(inner, inside, torch, ours)

  def at_size(self, site: Site) -> "HeadPruning":
    inner, inside = protocol.inner_and_site(self, site)
    return dataclasses.replace(
        self, heads=None if inner is None else protocol.at_size(inner, inside))


class KeptHeads(nn.Module):
  """Attention of the kept heads; has no parameters."""

  @nn.compact
  def __call__(self, query_bnhd, key_bmhd, value_bmhd, core: Core = attention.DENSE, x_bnw=None):
    """Returns (B, N, h, d)."""
    del x_bnw
    if attention.wants_maps(self):
      self.sow("maps", "maps", core.merged(core.maps(query_bnhd, key_bmhd)))
    return core(query_bnhd, key_bmhd, value_bmhd)


def constant_contribution(attn, kept: int):
  """Returns (width,), what the heads after the first `kept` add to every token: the bias of their
  values times their outputs, since rows of maps sum to 1."""
  if "bias" not in attn["value"]:
    return jnp.zeros(attn["out"]["kernel"].shape[-1])
  return jnp.einsum("hd,hdw->w", attn["value"]["bias"][kept:], attn["out"]["kernel"][kept:])


def refit_kept_heads(params, data, order):
  """Refits values and outputs of a pruned block to the dense output; returns its parameters."""
  attn = params["attn"]
  values = np.asarray(attn["value"]["kernel"], np.float64).transpose(1, 0, 2)
  outputs = np.asarray(attn["out"]["kernel"], np.float64)
  kept = len(values)
  fit = refit.refit(data.sums(refit.copied_sums, jnp.zeros(kept)), [[h] for h in range(kept)],
                    values, outputs)
  data.note("heads", copied=fit.copied, fitted=fit.fitted, held_out=fit.held_out,
            order=list(order))
  return {**params, "attn": {**attn, **refit.refitted_params(fit, attn)}}
