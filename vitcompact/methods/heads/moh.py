"""MoH: a router gives each token a weight for each head, 0 for some of them.

Jin et al., arXiv 2410.11842. Shared heads serve every token; of the others, which are routed, each
token uses those that its router prefers. As released, all heads are computed and some outputs are
multiplied by 0, which saves nothing; `capacity` is our form that computes fewer rows. A trained
mixture also tells which heads may go: `vc.compact` takes it to a plan with `HeadPruning`.
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
  """Heads axis: each token uses `active` of the heads, `shared` of them whatever the token is.

  active, shared: a number of heads, or a share of a block's in (0, 1], rounded. By share, one head
    at least is shared and one routed; active=1.0 uses all. As many shared heads as there are, given
    by number, leave none to route: they are weighed all the same.
  capacity: None computes every head for every token. A number: a routed head computes at most
    ceil(capacity * tokens * its fair share) of them, those that want it most; the others get
    nothing from it. Static shapes, and rows of scores that are never computed.
  heads: None, or the method of this axis that computes the heads' outputs, such as HMHSA().
  """
  axis: ClassVar[str] = "heads"
  settings: ClassVar = {"loss.moh_balance": weight(0.01)}
  losses: ClassVar = {"moh_balance": lambda seen: mean_balance(seen.collections)}
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
                         "them above 0 and at most 1.0")
    capacity = self.capacity
    if capacity is not None and (not isinstance(capacity, int | float) or
                                 isinstance(capacity, bool) or not 0 < capacity < math.inf):
      raise ValueError(f"MoH(capacity={capacity!r}): must be a number above 0, such as 1.25, or "
                       "None")
    if capacity is not None and self.heads is not None:
      raise ValueError(f"MoH(capacity={capacity}, heads={self.heads!r}): capacity is for heads "
                       "that are all computed; use capacity=None or heads=None")

  @property
  def scope(self) -> str:
    return "moh" if self.heads is None else protocol.scope_of(self.heads)

  def split(self, site: Site) -> tuple[int, int]:
    """(shared, active) heads of a block."""
    heads = site.heads
    shared, active = self.shared, self.active
    if isinstance(shared, float):
      shared = min(max(1, round(shared * heads)), heads - 1)
    if isinstance(active, float):
      active = max(round(active * heads), min(shared + 1, heads))
    if not shared <= active <= heads or (shared < heads and active == shared):
      raise ValueError(f"MoH(active={self.active}, shared={self.shared}): of the {heads} heads of "
                       f"block {site.block} {active} would be active and {shared} shared; the "
                       "shared ones are among the active, and one more is if any is routed")
    return shared, active

  def active_heads(self, site: Site) -> int:
    return self.split(site)[1] if protocol.inner_and_site(self, site)[0] is None else site.heads

  def acts(self, site: Site) -> bool:
    return site.heads > 1

  def check(self, site: Site):
    self.split(site)
    inner, _ = protocol.inner_and_site(self, site)
    if inner is not None and protocol.value_heads(inner, site) < site.heads:
      raise ValueError(f"MoH(heads={inner!r}): a mixture weighs all heads of block {site.block}; "
                       "put the mixture inside instead")
    if inner is not None:
      protocol.check(inner, site)

  def make(self, site: Site, **kwargs) -> nn.Module:
    inner, _ = protocol.inner_and_site(self, site)
    module = None if inner is None else inner.make(site, parent=None)
    return Mixture(site.width, site.heads, *self.split(site), self.capacity, module, **kwargs)

  def from_dense(self, site: Site, params, stats, data):
    """All heads stay, those that the output would miss most come first: they are shared. Weights
    are 1, but for routed heads that a token does not use, which untrained routers choose at random.
    """
    shared, active = self.split(site)
    if not site.local and "maps" in site.provides:   # else heads cannot change places
      lost = importance.losses(params, data if importance.has_maps(site, data) else None)
      order = importance.kept_first(lost, shared)
      params = refit.arranged(params, order)
    inner, _ = protocol.inner_and_site(self, site)
    if inner is not None:
      data = data and data.with_params(params)
      params, stats = surgery.from_dense(inner, site, params, stats, data)
    drawn = surgery.fresh(dataclasses.replace(self, heads=None), site)[1]["params"]
    own = {name: leaf if name == "routed_router" and active < site.heads else jnp.zeros_like(leaf)
           for name, leaf in drawn.items()}
    attn = params["attn"]
    return {**params, "attn": {**attn, self.scope: {**attn.get(self.scope, {}), **own}}}, stats

  def to_dense(self, site: Site, params, stats, data):
    """The dense block in which every head has its mean weight over the calibration images."""
    attn = dict(params["attn"])
    shared, active = self.split(site)
    sums, tokens = data.sums(weight_sums, attn.pop(self.scope), jnp.zeros(shared),
                             jnp.zeros(active))[0]
    mean_h11 = jnp.asarray(sums / tokens, jnp.float32)[:, None, None]
    out = {**attn["out"], "kernel": attn["out"]["kernel"] * mean_h11}
    return {**params, "attn": {**attn, "out": out}}, stats

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Routers under the authors' names, transposed as linear layers are."""
    inner, _ = protocol.inner_and_site(self, site)
    found = [] if inner is None else surgery.torch_entries(inner, site, torch, ours)
    names = router_shapes(site.width, site.heads, self.split(site)[0])
    return found + [Entry(f"{torch}.attn.{AUTHORS[name]}.weight",
                          (f"params/{ours}/attn/{self.scope}/{name}",), "linear")
                    for name in names]


# What the authors call the routers.
AUTHORS = {"routed_router": "wg", "shared_router": "wg_1", "between_router": "wg_0"}


def router_shapes(width: int, heads: int, shared: int) -> dict[str, tuple[int, int]]:
  """{name: shape} of the routers: among the routed heads, among the shared ones, and between the
  two kinds; where there is a choice."""
  shapes = {}
  if shared < heads:
    shapes = {"routed_router": (width, heads - shared), "between_router": (width, 2)}
  return shapes | ({"shared_router": (width, shared)} if shared > 1 else {})


def weights(x_bnw, routers, shared: int, active: int):
  """(weights, probabilities, choice): (B, N, heads), the weight of each head for each token, 0 of
  those that it does not use; (B, N, routed) of the routed heads, choice 1 or 0; float32.

  routers: see `router_shapes`. Weights of shared heads sum to b S, of routed heads to (2 - b) k,
  with b in (0, 2) by the router between them. All are 1 where routers are 0 and every head is used.
  """
  def softmax(name):
    return jax.nn.softmax((x_bnw @ routers[name].astype(x_bnw.dtype)).astype(jnp.float32), axis=-1)

  if shared > 1:
    shared_bns = shared * softmax("shared_router")
  else:
    shared_bns = jnp.ones((*x_bnw.shape[:2], 1), jnp.float32)
  if "routed_router" not in routers:
    none = shared_bns[..., :0]
    return shared_bns, none, none
  routed_bne, between_bn2 = softmax("routed_router"), 2 * softmax("between_router")
  chosen_bne = chosen(routed_bne, active - shared)
  kept_bne = routed_bne * chosen_bne
  routed_weights_bne = (active - shared) * kept_bne / kept_bne.sum(axis=-1, keepdims=True)
  found = [between_bn2[..., :1] * shared_bns, between_bn2[..., 1:] * routed_weights_bne]
  return jnp.concatenate(found, axis=-1), routed_bne, chosen_bne


def chosen(score_bne, k: int):
  """(B, N, E) float32: 1 at the k largest of each token, the first ones among equals.

  Each score is compared with each other: heads are few, and XLA sorts slowly on a CPU.
  """
  count = score_bne.shape[-1]
  earlier = np.tril(np.ones((count, count), bool), -1)[None, None]
  other, own = score_bne[..., None, :], score_bne[..., :, None]
  before = (other > own) | ((other == own) & earlier)
  return (before.sum(axis=-1) < k).astype(jnp.float32)


def balance(routed_bne, chosen_bne):
  """E sum_e (mean probability of e) (share of tokens that use e) = k where all are used alike."""
  probability_e, used_e = (x.mean(axis=(0, 1)) for x in (routed_bne, chosen_bne))
  return routed_bne.shape[-1] * jnp.sum(probability_e * used_e)


def mean_balance(collections):
  """Mean of `balance` over the blocks that have routers."""
  found = jax.tree.leaves(collections["mixtures"])
  return sum(found) / len(found)


def weight_sums(seen, routers, shared, active):
  """Sums over tokens of the weights (heads,), and their number; of `shared` and `active` only the
  lengths count."""
  weights_bnh, _, _ = weights(seen.queries, routers, len(shared), len(active))
  return weights_bnh.sum(axis=(0, 1)), jnp.asarray(math.prod(weights_bnh.shape[:2]), jnp.float32)


class Mixture(nn.Module):
  """The heads' outputs, each token's by its own weights; owns the routers, float32.

  inner: what computes the outputs, or None: the attention that it is called with.
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
    """(B, N, h, d); x_bnw: the input of the attention, by which tokens choose."""
    weights_bnh, routed_bne, chosen_bne = weights(x_bnw, self.routers, self.shared, self.active)
    if self.shared < self.heads and not self.is_initializing():
      self.sow("mixtures", "balance", balance(routed_bne, chosen_bne))
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
  """The heads' outputs by weight, of routed heads those of the `rows` tokens of largest weight.

  A core that treats all rows alike computes these rows alone; else all are computed, and some
  dropped: the same function.
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
  made_bred = core(query_bred, key_bmhd[:, :, shared:], value_bmhd[:, :, shared:])
  made_bred = made_bred * weights_bre1.astype(dtype)
  # Which row a token has in a head, or the row of zeros after the last: gathers, as scatters are
  # slow on CPUs and GPUs.
  tokens = jnp.arange(weights_bnh.shape[1])
  same_bern = taken_ber[..., None] == tokens[None, None, None]
  place_ben = jnp.where(same_bern.any(2), same_bern.argmax(2), rows)
  made_bred = jnp.pad(made_bred, [(0, 0), (0, 1), (0, 0), (0, 0)])
  routed = jnp.take_along_axis(made_bred, place_ben.swapaxes(1, 2)[..., None], axis=1)
  return jnp.concatenate([always * weights_bnh[:, :, :shared, None].astype(dtype), routed], axis=2)
