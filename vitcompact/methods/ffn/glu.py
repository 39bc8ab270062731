"""Gated FFNs at equal cost: GLU and its variants, and ConvGLU, whose gate has a convolution.

    GLU:      y = (act(x W_g + b_g) * (x W_v + b_v)) W_o + b_o       Shazeer, arXiv 2002.05202
    ConvGLU:  y = (act(DW3x3(x W_g + b_g)) * (x W_v + b_v)) W_o + b_o   Shi, arXiv 2311.17132

Three C x m' matrices cost as much as the two C x m matrices of a dense FFN: m' = int(2 m / 3). fc1
holds [W_g, W_v], fc2 is W_o.
"""
import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn

from vitcompact.depthwise import GateConv
from vitcompact.layers import GATED, GATES, Mlp, dense
from vitcompact.methods import protocol, surgery
from vitcompact.methods.protocol import Site
from vitcompact.torch_names import Entry, conv, linear
from vitcompact.trees import Leaf


@dataclasses.dataclass(frozen=True)
class GLU:
  """FFN axis: gates the hidden layer. Train it from scratch: a dense FFN cannot be converted.

  act: of the gate: "sigmoid" (GLU), "gelu" (GEGLU), "silu" (SwiGLU), "relu" (ReGLU), "identity".
  multiple: the hidden width is rounded to the nearest multiple of this number.
  ffn: None, or the method that makes its layers, such as CFFN(), which factorises fc2.
  """
  axis: ClassVar[str] = "ffn"
  provenance: ClassVar = ("arXiv 2002.05202", "its use in place of a dense FFN is ours")
  rules: ClassVar = []   # fc1 and fc2 have shared rules

  act: str = "silu"
  multiple: int = 1
  ffn: Any = None

  def __post_init__(self):
    name = type(self).__name__
    if not isinstance(self.act, str) or self.act not in GATES:
      raise ValueError(f"{name}(act={self.act!r}): must be one of {', '.join(GATES)}")
    is_int = isinstance(self.multiple, int) and not isinstance(self.multiple, bool)
    if not is_int or self.multiple < 1:
      raise ValueError(f"{name}(multiple={self.multiple!r}): must be a whole number of at least 1")

  def hidden(self, site: Site) -> int:
    """Returns m', the width of the gate and of the value."""
    width = int(2 * site.hidden / 3)
    return max(1, int(width / self.multiple + 0.5)) * self.multiple

  def inner_site(self, site: Site) -> Site:
    return site._replace(act=GATES[self.act], hidden=self.hidden(site))

  def check(self, site: Site):
    """Raises ValueError if the FFN is gated already, or has a mixer, which would be lost."""
    if site.act in GATED:
      raise ValueError(f"{self._where(site)}: the FFN is gated already; use ffn=None there, or "
                       "CFFN(), which makes gated FFNs smaller")
    self._check_mixer(site)
    inner, inside = protocol.inner_and_site(self, site)
    if inner is not None:
      self._check_inner(inner, inside)
      protocol.check(inner, inside)

  def _check_mixer(self, site: Site):
    if site.mixer is not None:
      raise ValueError(f"{self._where(site)}: this FFN has a convolution, from which the model "
                       "learns positions, and a GLU has none; use ConvGLU()")

  def _check_inner(self, inner, inside: Site):
    pass

  def _where(self, site: Site) -> str:
    return f"{type(self).__name__} in block {site.block}"

  def at_size(self, site: Site) -> "GLU":
    inner, inside = protocol.inner_and_site(self, site)
    return self if inner is None else dataclasses.replace(self, ffn=protocol.at_size(inner, inside))

  def make(self, site: Site, **kwargs) -> nn.Module:
    inner, gated = protocol.inner_and_site(self, site)
    if inner is not None:
      return inner.make(gated, **kwargs)
    gated = self.inner_site(site)
    return Mlp(fc1=dense(gated.fc1_width, dtype=site.dtype),
               fc2=dense(gated.ffn_width, dtype=site.dtype), **gated.mlp_options(), **kwargs)

  def from_dense(self, site: Site, params, stats, data):
    del params, stats, data
    raise ValueError(f"{self._where(site)}: a dense FFN cannot become a gated one, which is a "
                     "product of two projections; train it from scratch: "
                     "create_model(NAME, plan=plan)")

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries of fc1, the gate's rows first, and fc2; or those of the inner method."""
    inner, inside = protocol.inner_and_site(self, site)
    if inner is not None:
      return surgery.torch_entries(inner, inside, torch, ours)
    return [entry for layer in ("fc1", "fc2")
            for entry in linear(f"{torch}.mlp.{layer}", f"{ours}/mlp/{layer}")]


@dataclasses.dataclass(frozen=True)
class ConvGLU(GLU):
  """FFN axis: a GLU with a 3 x 3 depthwise convolution before the activation of its gate. It can
  also replace an FFN with a convolution. Prefix tokens, which have no neighbours, skip it."""
  provenance: ClassVar = ("arXiv 2311.17132", "its use in place of a dense FFN is ours")
  rules: ClassVar = [(r".*/mlp/mixer/conv/kernel", Leaf((None, None, None, "mlp"), decay=True))]

  act: str = "gelu"

  def inner_site(self, site: Site) -> Site:
    # The gain is 2: there are nine taps, whose initial weights have a variance of 2 / 9.
    mixer = functools.partial(GateConv, site.query_grid, site.prefix, dtype=site.dtype)
    return super().inner_site(site)._replace(mixer=mixer, mixer_gain=2)

  def needs(self, site: Site) -> dict[str, str]:
    inner, inside = protocol.inner_and_site(self, site)
    return {"grid": "use GLU() there",
            **({} if inner is None else protocol.needs(inner, inside))}

  def _check_mixer(self, site: Site):
    """Allows a mixer: this method's convolution replaces it."""

  def _check_inner(self, inner, inside: Site):
    if "fc1" in protocol.mergeable(inner, inside):
      raise ValueError(f"{self._where(inside)}: only fc2 may be factorised, since gate and value "
                       "would share the rank of fc1; use CFFN(factor='output')")

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Adds the convolution, unless the model lists its own."""
    entries = super().torch_entries(site, torch, ours)
    if site.mixer is not None:
      return entries
    return entries + conv(f"{torch}.mlp.dwconv", f"{ours}/mlp/mixer/conv")
