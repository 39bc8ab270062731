"""MoH: a router gives each token a weight for each head, which is 0 for some heads.

Jin et al., arXiv 2410.11842. Every token uses the shared heads, and of the other, routed heads
those with the highest router scores. The released code computes all heads and multiplies some
outputs by 0, which saves nothing; `capacity` is our form that computes fewer rows. A trained
mixture also shows which heads are dispensable: `vc.compact` converts it to a plan with
`HeadPruning`.
"""
import dataclasses
import math
from fractions import Fraction
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention
from vitcompact.attention import Core
from vitcompact.layers import weight_init
from vitcompact.methods import protocol, surgery
from vitcompact.methods.heads import importance, refit
from vitcompact.methods.protocol import Site
from vitcompact.settings import weight
from vitcompact.torch_names import Entry
from vitcompact.tracing import param
from vitcompact.trees import Leaf


@dataclasses.dataclass(frozen=True)
class MoH:
  """Heads axis: each token uses `active` heads, `shared` of which are the same for all tokens.

  active, shared: a number of heads (int), or a share of a block's heads (float in (0, 1]), which is
    rounded so that at least one head is shared and one is routed; active=1.0 uses all heads. If
    `shared` is the number of all heads, none is routed, but their outputs are still weighted.
  capacity: None computes every head for every token. With a number, a routed head computes only the
    ceil(capacity * tokens * its fair share) tokens with the largest weights, and outputs 0 for the
    others: shapes are static, and rows of scores that are not needed are not computed.
  heads: None, or the method of this axis that computes the heads' outputs, such as HMHSA().
  """
  axis: ClassVar[str] = "heads"
  provenance: ClassVar = ("arXiv 2410.11842, as released", "`capacity` is ours")
  settings: ClassVar = {"loss.moh_balance": weight(0.01)}
  losses: ClassVar = {"moh_balance": lambda forward: mean_balance(forward.collections)}
  losses_across: ClassVar = ("moh_balance",)
  collections: ClassVar = ("mixtures",)
  rules: ClassVar = [(r".*/(routed|shared|between)_router", Leaf(("embed", None), decay=True))]

  active: int | float = 2 / 3
  shared: int | float = 1 / 3
  capacity: float | None = None
  heads: Any = None

  def __post_init__(self):
    for field in ("active", "shared"):
      value = getattr(self, field)
      number = isinstance(value, int | float) and not isinstance(value, bool)
      if not number or value <= 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"MoH({field}={value!r}): must be a whole number of heads, or a share of "
                         "the heads above 0 and at most 1.0")
    capacity = self.capacity
    if capacity is not None and (not isinstance(capacity, int | float) or
                                 isinstance(capacity, bool) or not 0 < capacity < math.inf):
      raise ValueError(f"MoH(capacity={capacity!r}): must be a number above 0, such as 1.25, or "
                       "None")
    if capacity is not None and self.heads is not None:
      raise ValueError(f"MoH(capacity={capacity}, heads={self.heads!r}): capacity cannot be "
                       "combined with another method; use capacity=None or heads=None")

  @property
  def scope(self) -> str:
    return "moh" if self.heads is None else protocol.scope_of(self.heads)

  def split(self, site: Site) -> tuple[int, int]:
    """Returns the numbers of (shared, active) heads of a block."""
    heads = site.heads
    shared, active = self.shared, self.active
    if isinstance(shared, float):
      shared = min(max(1, round(shared * heads)), heads - 1)
    if isinstance(active, float):
      active = max(round(active * heads), min(shared + 1, heads))
    if not shared <= active <= heads or (shared < heads and active == shared):
      raise ValueError(f"MoH(active={self.active}, shared={self.shared}): of the {heads} heads of "
                       f"block {site.block}, {active} would be active and {shared} shared; the "
                       "active heads must include the shared ones and, if there are others, at "
                       "least one of these")
    return shared, active

  def active_heads(self, site: Site) -> int:
    return self.split(site)[1] if protocol.inner_and_site(self, site)[0] is None else site.heads

  def acts(self, site: Site) -> bool:
    return site.heads > 1

  def check(self, site: Site):
    self.split(site)
    inner, _ = protocol.inner_and_site(self, site)
    if inner is not None and protocol.value_heads(inner, site) < site.heads:
      raise ValueError(f"MoH(heads={inner!r}): a mixture needs all heads of block {site.block}; "
                       "put the mixture inside the other method instead")
    if inner is not None:
      protocol.check(inner, site)

  def make(self, site: Site, **kwargs) -> nn.Module:
    inner, _ = protocol.inner_and_site(self, site)
    module = None if inner is None else inner.make(site, parent=None)
    return Mixture(site.width, site.heads, *self.split(site), self.capacity, module, **kwargs)

  def from_dense(self, site: Site, params, stats, data):
    """Keeps all heads, and makes the most important ones, in terms of the output, the shared heads.
    All weights are 1, except those of routed heads that a token does not use: untrained routers
    choose at random."""
    shared, active = self.split(site)
    if not site.local and "maps" in site.provides:   # else heads cannot be reordered
      loss_hh = importance.losses(params, data if importance.has_maps(site, data) else None)
      order = importance.kept_first(loss_hh, shared)
      params = refit.reorder_heads(params, order)
    inner, _ = protocol.inner_and_site(self, site)
    if inner is not None:
      data = data and data.with_params(params)
      params, stats = surgery.from_dense(inner, site, params, stats, data)
    fresh = surgery.fresh(dataclasses.replace(self, heads=None), site)[1]["params"]
    routers = {
        name: leaf if name == "routed_router" and active < site.heads else jnp.zeros_like(leaf)
        for name, leaf in fresh.items()}
    attn = params["attn"]
    return {**params, "attn": {**attn, self.scope: {**attn.get(self.scope, {}), **routers}}}, stats

  def to_dense(self, site: Site, params, stats, data):
    """Returns the dense block in which every head has its mean weight over calibration images."""
    attn = dict(params["attn"])
    shared, active = self.split(site)
    sums, tokens = data.sums(weight_sums, attn.pop(self.scope), jnp.zeros(shared),
                             jnp.zeros(active))[0]
    mean_h11 = jnp.asarray(sums / tokens, jnp.float32)[:, None, None]
    out = {**attn["out"], "kernel": attn["out"]["kernel"] * mean_h11}
    return {**params, "attn": {**attn, "out": out}}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries of the routers under the authors' names, transposed as linear layers are."""
    inner, _ = protocol.inner_and_site(self, site)
    entries = [] if inner is None else surgery.torch_entries(inner, site, torch, ours)
    names = router_shapes(site.width, site.heads, self.split(site)[0])
    return entries + [Entry(f"{torch}.attn.{AUTHORS[name]}.weight",
                            (f"params/{ours}/attn/{self.scope}/{name}",), "linear")
                      for name in names]


# The authors' names of the routers.
AUTHORS = {"routed_router": "wg", "shared_router": "wg_1", "between_router": "wg_0"}


def router_shapes(width: int, heads: int, shared: int) -> dict[str, tuple[int, int]]:
  """Returns {name: shape} of the routers: over routed heads, over shared heads, and between the two
  groups; without those that have only one choice."""
  shapes = {}
  if shared < heads:
    shapes = {"routed_router": (width, heads - shared), "between_router": (width, 2)}
  return shapes | ({"shared_router": (width, shared)} if shared > 1 else {})


def weights(x_bnw, routers, shared: int, active: int):
  """Returns (weights, probabilities, choice), float32: the weight (B, N, heads) of each head for
  each token, 0 if it is not used; and for routed heads (B, N, routed), probabilities and 1 if used.

  routers: see `router_shapes`. Weights of shared heads sum to b S, of routed heads to (2 - b) k,
  where b in (0, 2) comes from the router between the groups. All are 1 if routers are 0 and every
  head is used.
  """
  def softmax(name):
    return jax.nn.softmax((x_bnw @ routers[name].astype(x_bnw.dtype)).astype(jnp.float32), axis=-1)

  if shared > 1:
    shared_bns = shared * softmax("shared_router")
  else:
    shared_bns = jnp.ones((*x_bnw.shape[:2], 1), jnp.float32)
  if "routed_router" not in routers:
    empty = shared_bns[..., :0]
    return shared_bns, empty, empty
  routed_bne, between_bn2 = softmax("routed_router"), 2 * softmax("between_router")
  used_bne = top_k_choice(routed_bne, active - shared)
  kept_bne = routed_bne * used_bne
  routed_weights_bne = (active - shared) * kept_bne / kept_bne.sum(axis=-1, keepdims=True)
  groups = [between_bn2[..., :1] * shared_bns, between_bn2[..., 1:] * routed_weights_bne]
  return jnp.concatenate(groups, axis=-1), routed_bne, used_bne


def top_k_choice(score_bne, k: int):
  """Returns (B, N, E) float32: 1 at the k largest of each token; ties go to the first.

  Compares every pair of scores: there are few heads, and XLA sorts slowly on a CPU.
  """
  count = score_bne.shape[-1]
  earlier = np.tril(np.ones((count, count), bool), -1)[None, None]
  other, own = score_bne[..., None, :], score_bne[..., :, None]
  before = (other > own) | ((other == own) & earlier)
  return (before.sum(axis=-1) < k).astype(jnp.float32)


def balance(routed_bne, used_bne):
  """Returns E sum_e (mean probability of e) (share of tokens that use e), which is k if all heads
  are used equally."""
  probability_e, used_e = (x.mean(axis=(0, 1)) for x in (routed_bne, used_bne))
  return routed_bne.shape[-1] * jnp.sum(probability_e * used_e)


def mean_balance(collections):
  """Returns the mean of `balance` over the blocks that have routers."""
  losses = jax.tree.leaves(collections["mixtures"])
  return sum(losses) / len(losses)


def weight_sums(seen, routers, shared, active):
  """Returns sums over tokens of the weights (heads,), and the number of tokens; of `shared` and
  `active`, only the lengths are used."""
  weights_bnh, _, _ = weights(seen.queries, routers, len(shared), len(active))
  return weights_bnh.sum(axis=(0, 1)), jnp.asarray(math.prod(weights_bnh.shape[:2]), jnp.float32)


class Mixture(nn.Module):
  """Multiplies each token's head outputs by its weights; owns the routers, float32.

  inner: the module that computes the outputs; None: the attention that is passed in.
  """
  width: int
  heads: int
  shared: int
  active: int
  capacity: float | None = None
  inner: nn.Module | None = None

  def setup(self):
    if self.inner is not None:
      nn.share_scope(self, self.inner)
    shapes = router_shapes(self.width, self.heads, self.shared)
    self.routers = {name: param(self, name, weight_init, shape) for name, shape in shapes.items()}

  def __call__(self, query_bnfd, key_bmfd, value_bmhd, core: Core = attention.DENSE, x_bnw=None):
    """Returns (B, N, h, d); x_bnw: the input of the attention, and of the routers."""
    weights_bnh, routed_bne, used_bne = weights(x_bnw, self.routers, self.shared, self.active)
    if self.shared < self.heads and not self.is_initializing():
      self.sow("mixtures", "balance", balance(routed_bne, used_bne))
    arrays = query_bnfd, key_bmfd, value_bmhd
    if self.inner is not None:
      heads_bnhd = self.inner(*arrays, core, x_bnw)
    else:
      if attention.wants_maps(self):
        self.sow("maps", "maps", core.merged(core.maps(query_bnfd, key_bmfd)))
      if self.capacity is not None and self.shared < self.heads:
        share = Fraction(self.active - self.shared, self.heads - self.shared)
        rows = min(math.ceil(self.capacity * share * query_bnfd.shape[1]), query_bnfd.shape[1])
        return by_capacity(core, *arrays, weights_bnh, self.shared, rows)
      with attention.share(Fraction(self.active, self.heads)):
        heads_bnhd = core(*arrays)
    return heads_bnhd * weights_bnh[..., None].astype(heads_bnhd.dtype)


def by_capacity(core: Core, query_bnhd, key_bmhd, value_bmhd, weights_bnh, shared: int, rows: int):
  """Returns the weighted outputs of the heads; routed heads only for the `rows` tokens of largest
  weight.

  If the core treats all rows alike, only these rows are computed; else all are computed and the
  others dropped, which is the same function.
  """
  _, taken_ber = jax.lax.top_k(weights_bnh[..., shared:].swapaxes(1, 2), rows)
  if not core.is_plain() or core.operator is not None or core.is_merged():
    inside_ben = (taken_ber[..., None] == jnp.arange(weights_bnh.shape[1])[None, None, None]).any(2)
    batch, _, tokens = inside_ben.shape
    first_bsn = jnp.ones((batch, shared, tokens), bool)
    inside_bnh = jnp.concatenate([first_bsn, inside_ben], axis=1).swapaxes(1, 2)
    heads_bnhd = core(query_bnhd, key_bmhd, value_bmhd)
    return heads_bnhd * (weights_bnh * inside_bnh)[..., None].astype(heads_bnhd.dtype)
  dtype = value_bmhd.dtype
  always = core.of_heads(0, shared)(*(x[:, :, :shared] for x in (query_bnhd, key_bmhd, value_bmhd)))
  index_bre1 = taken_ber.swapaxes(1, 2)[..., None]
  query_bred = jnp.take_along_axis(query_bnhd[:, :, shared:], index_bre1, axis=1)
  weights_bre1 = jnp.take_along_axis(weights_bnh[:, :, shared:, None], index_bre1, axis=1)
  out_bred = core(query_bred, key_bmhd[:, :, shared:], value_bmhd[:, :, shared:])
  out_bred = out_bred * weights_bre1.astype(dtype)
  # The row of each token in a head, or a row of zeros after the last one: a gather, as scatters are
  # slow on CPUs and GPUs.
  tokens = jnp.arange(weights_bnh.shape[1])
  same_bern = taken_ber[..., None] == tokens[None, None, None]
  place_ben = jnp.where(same_bern.any(2), same_bern.argmax(2), rows)
  out_bred = jnp.pad(out_bred, [(0, 0), (0, 1), (0, 0), (0, 0)])
  routed = jnp.take_along_axis(out_bred, place_ben.swapaxes(1, 2)[..., None], axis=1)
  return jnp.concatenate([always * weights_bnh[:, :, :shared, None].astype(dtype), routed], axis=2)
