"""Attention between channels instead of tokens (DaViT, see `attention.channel`)."""
import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn

from vitcompact.attention import Core
from vitcompact.attention.channel import channel
from vitcompact.methods.protocol import Site


@dataclasses.dataclass(frozen=True)
class ChannelAttention:
  """Attention axis: within each head, channels attend to channels over all tokens.

  Ding et al., arXiv 2204.03645. Keys and values give a d x d map, with which the channels of
  queries are averaged; the cost is linear in the number of tokens. DaViT alternates it with
  attention between tokens: blocks={0: {"attention": None}, ...}.

  scale: of the scores: "width", d^-0.5 as in DaViT, so that they grow with the number of tokens;
    "tokens", N^-0.5, so that they do not.

  Queries, keys, values and outputs have the shapes of a dense block, but compute another function:
  train it.
  """
  axis: ClassVar[str] = "attention"
  provenance: ClassVar = ("arXiv 2204.03645", "its use in other networks is ours")

  scale: str = "width"

  def __post_init__(self):
    if self.scale not in ("width", "tokens"):
      raise ValueError(f"ChannelAttention(scale={self.scale!r}): must be 'width' or 'tokens'")

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"softmax": "use attention=None there", "full attention": "use attention=None there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("maps", "softmax", "all scores")

  def check(self, site: Site):
    if site.queries != site.tokens:
      raise ValueError(f"ChannelAttention() in block {site.block}: needs as many keys as queries, "
                       f"and there are {site.queries} queries and {site.tokens} keys; use "
                       "attention=None there")

  def make(self, site: Site, **kwargs) -> nn.Module:
    return Channels(self.scale, **kwargs)


class Operator(NamedTuple):
  """The operator that replaces the softmax, see `attention.Core`."""
  scale: str

  def __call__(self, core: Core, query_bnhd, key_bmhd, value_bmhd):
    tokens, width = key_bmhd.shape[1], key_bmhd.shape[-1]
    for weight_bm in (core.size, core.keep_mask):   # for merged and for hidden tokens
      if weight_bm is not None:
        key_bmhd = key_bmhd * weight_bm[..., None, None].astype(key_bmhd.dtype)
    return channel(query_bnhd, key_bmhd, value_bmhd,
                   (width if self.scale == "width" else tokens) ** -0.5)


class Channels(nn.Module):
  """Replaces attention between tokens by attention between channels; has no parameters."""
  scale: str

  @nn.compact
  def __call__(self, core: Core, query_bnhd, key_bmhd, source_bs=None, fused: bool = False) -> Core:
    """Returns `core` with the operator between channels."""
    del query_bnhd, key_bmhd, source_bs, fused
    return core._replace(operator=Operator(self.scale))
