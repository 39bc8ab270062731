"""MCTF: fuse tokens by similarity, received attention and size, one step ahead (Lee et al., CVPR
2024, arXiv 2403.10030). Written from the paper's equations.

Each fusion has its own shapes, so XLA compiles each separately: on a CPU core, 25 s for the forward
pass of DeiT-S with 11 fusions, of which no single operation takes more than a fifth.
"""
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, token_state
from vitcompact.attention import Core
from vitcompact.methods.merging import (
  Merge,
  best_rows,
  cosines,
  even_first,
  exclude_ends,
  merge_of,
)
from vitcompact.methods.protocol import Pass, Site
from vitcompact.settings import Setting, weight
from vitcompact.token_state import Reduction, Tokens, take

LEAST = 10   # tokens that always stay, including the class token
TILE = 64    # queries whose maps are formed at a time, to sum the attention that keys receive

CHOICES = {"one_step_ahead": (0, 1, 2), "bidirectional": (True, False),
           "pooling": ("size_mean", "size_attention_mean", "max", "mean"),
           "order": ("position", "code"), "prop_attn": (True, False)}


@dataclasses.dataclass(frozen=True)
class MCTF:
  """Tokens axis: at the start of each of `blocks`, r tokens are fused into others.

  Attention A is computed for the N tokens before fusion; its rows and columns are then fused along
  with the tokens, so that values, output and FFN already have fewer tokens ("one step ahead").

  r: number of tokens that a block removes; below 1, that share of all tokens but one. At most half
    are removed, and at least 10 stay; 0 changes nothing. The authors' "fast" form is MCTF(r=0.35,
    blocks=(3, 6, 9)).
  blocks: None is 1..depth-1.
  tau_sim, tau_info, tau_size: temperatures; a criterion w is used as w^(1/tau).
  one_step_ahead: 0 fuses after the block, based on its own attention; 1 is described above; 2
    computes attention again for the fused tokens ("precise").
  bidirectional: fuses half of the r tokens from even positions into odd ones, then the other half
    from odd positions into even ones.
  pooling: how the features of a fused token and its row of A are computed: the mean weighted by
    size ("size_mean") or by size times received attention ("size_attention_mean"), the "max" (these
    rows of A sum to more than 1, and A is formed), or the plain "mean".
  order: "position" keeps tokens in ascending position; "code" puts even positions first, then odd
    ones by criterion, as in the authors' implementation.
  prop_attn: attention counts a token `size` times.

  Training adds a second pass with the same weights, which fuses between 0 and loss.second_pass_r
  tokens per block and also learns from the labels; the loss `consistency` compares the two passes.
  """
  axis: ClassVar[str] = "tokens"
  provenance: ClassVar = ("arXiv 2403.10030, written from the equations",
                          "keeping tokens in the order of their positions is ours")
  settings: ClassVar = {"loss.consistency": weight(),
                        "loss.second_pass_r": Setting(7, low=0, unit="of tokens",
                                                      formerly="loss.companion_r")}
  collections: ClassVar = ("tokens",)
  losses_across: ClassVar = ("consistency",)
  losses: ClassVar = {"consistency": lambda forward: consistency(
      _class_token(forward), _class_token(forward.second), forward.logits, forward.labels)}

  r: int | float = 16
  blocks: tuple[int, ...] | None = None
  tau_sim: float = 1.0
  tau_info: float = 20.0
  tau_size: float = 40.0
  one_step_ahead: int = 1
  bidirectional: bool = True
  pooling: str = "size_mean"
  order: str = "position"
  prop_attn: bool = True

  def __post_init__(self):
    whole_or_share = isinstance(self.r, int) or (isinstance(self.r, float) and self.r < 1)
    if isinstance(self.r, bool) or not whole_or_share or self.r < 0:
      raise ValueError(f"MCTF(r={self.r!r}): must be a whole number of tokens, or a share below "
                       "1")
    if self.blocks is not None:
      object.__setattr__(self, "blocks", token_state.checked_blocks("MCTF", self.blocks))
    for field in ("tau_sim", "tau_info", "tau_size"):
      tau = getattr(self, field)
      if isinstance(tau, bool) or not isinstance(tau, int | float) or not tau > 0:
        raise ValueError(f"MCTF({field}={tau!r}): must be a number above 0")
    for field, allowed in CHOICES.items():
      value = getattr(self, field)
      if value not in allowed or type(value) is not type(allowed[0]):
        raise ValueError(f"MCTF({field}={value!r}): must be one of {allowed}")

  def check_training(self, config):
    if config.loss.consistency and not isinstance(self.r, int):
      raise ValueError("config.loss.consistency compares with a pass that fuses fewer than r "
                       f"tokens, and the plan has {self}; give r as a whole number, or set "
                       "config.loss.consistency to 0")

  def second_pass(self, config, step: int) -> "MCTF | None":
    """Draws r once for each step; the authors draw it separately on each device."""
    if not config.loss.consistency:
      return None
    r = int(np.random.default_rng((config.seed, step)).integers(config.loss.second_pass_r + 1))
    return dataclasses.replace(self, r=min(r, self.r))

  def needs(self, site: Site) -> dict[str, str]:
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT",
            "softmax": "it fuses by attention; use ToMe there",
            "full attention": "it fuses by the attention that a token receives from all; use "
            f"blocks={{{site.block}: {{'attention': None}}}}, or ToMe"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",) if self.order == "position" else ("grid", "token order")

  @classmethod
  def options(cls, site: Site) -> list["MCTF"]:
    """Returns constant numbers per block that leave three quarters or half of the patches."""
    patches = site.tokens - site.prefix
    per_block = {round(patches * share / max(site.depth - 1, 1)) for share in (0.25, 0.5)}
    return [cls(r=r) for r in sorted(per_block - {0})]

  def reduction(self, block: int, depth: int) -> Reduction:
    """Returns what happens in this block."""
    active = range(1, depth) if self.blocks is None else self.blocks
    if block not in active or self.r == 0:
      return token_state.NOTHING
    if self.one_step_ahead == 0:
      return Reduction(after_block=self.fuse_after)
    return Reduction(fuse=self.fuse)

  def fused_count(self, tokens: int) -> int:
    """Returns how many of `tokens` tokens (including the class token) a block removes."""
    r = max(0, tokens - LEAST) if tokens - self.r < LEAST else self.r
    r = int((tokens - 1) * r + 1e-9) if 0 < r < 1 else r
    return min(r, (tokens - 1) // 2)

  def fuse_after(self, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Fuses tokens after the block, given the queries and keys that it used (real heads)."""
    merge, attention_bn = self._decide(tokens, query_bnhd, key_bnhd, prefix, ideal=0)
    return tokens if merge is None else self._apply(merge, tokens, attention_bn)

  def fuse(self, tokens: Tokens, query_bnhd, key_bnhd,
           prefix: int) -> tuple[Tokens, Callable | None]:
    """Returns the fused tokens, and a function that turns the attention of the old tokens into that
    of the fused ones; None if one_step_ahead=2."""
    precise = self.one_step_ahead == 2
    merge, attention_bn = self._decide(tokens, query_bnhd, key_bnhd, prefix,
                                       ideal=1 if precise else 0)
    if merge is None:
      return tokens, lambda core: core
    fused = self._apply(merge, tokens, attention_bn)
    if precise:
      return fused, None
    return fused, lambda core: core._replace(
        spread=lambda value: take(value, merge.moved), average=self.pooling != "max",
        gather=lambda rows: self._pool(merge, rows, sizes(tokens), attention_bn))

  def _decide(self, tokens, query_bnhd, key_bnhd, prefix, ideal) -> tuple[Merge | None, jax.Array]:
    """Returns which tokens are fused (None: none), and the attention (B, N) that each receives.

    ideal: the share of the scores computed here that the method needs: 0 if the block's attention
      computes the same scores.
    """
    x, query, key, size = jax.lax.stop_gradient((tokens.x, query_bnhd, key_bnhd, sizes(tokens)))
    batch, count, _ = x.shape
    r = self.fused_count(count)
    if not r:
      return None, None
    with attention.share(ideal):
      attention_bn = received_attention(query, key, size if tokens.proportional else None)
    weight_bmn = exclude_ends(self.criterion(x, attention_bn, size), prefix)
    pairs, score_bn = pairings(weight_bmn, r, self.bidirectional)
    rank_bn = jnp.broadcast_to(even_first(count, prefix), (batch, count))
    if self.order == "position":
      rank_bn = jnp.broadcast_to(jnp.arange(count), (batch, count))
    elif self.bidirectional:
      # The remaining odd positions follow all the even ones, ordered by score.
      best_bn = jnp.argsort(jnp.argsort(-score_bn, axis=1, stable=True), axis=1)
      odd = rank_bn[:, 1::2]
      rank_bn = rank_bn.at[:, 1::2].set(jnp.where(odd < prefix, odd, best_bn + 2 * count))
    return merge_of(pairs, rank_bn), attention_bn

  def criterion(self, x_bnw, attention_bn, size_bn):
    """Returns the weights (B, even, odd) by which pairs are chosen, in float32."""
    info_bn = _relative_inverse(attention_bn) ** (1 / self.tau_info)
    size_bn = _relative_inverse(size_bn) ** (1 / self.tau_size)
    token_bn = info_bn * size_bn
    similarity_bmn = ((cosines(x_bnw) + 1) / 2) ** (1 / self.tau_sim)
    return similarity_bmn * token_bn[:, ::2, None] * token_bn[:, None, 1::2]

  def _apply(self, merge: Merge, tokens: Tokens, attention_bn) -> Tokens:
    size_bn = sizes(tokens)
    return Tokens(self._pool(merge, tokens.x, size_bn, attention_bn), size=merge.total(size_bn),
                  proportional=self.prop_attn,
                  source=token_state.follow(token_state.identity_source(tokens), merge.moved))

  def _pool(self, merge: Merge, rows_bn, size_bn, attention_bn):
    """Pools rows, features or attention, into those of fused tokens: (B, N, ...) -> (B, K, ...)."""
    if self.pooling == "max":
      return merge.largest(rows_bn)
    weights = {"size_mean": size_bn, "size_attention_mean": size_bn * attention_bn,
               "mean": jnp.ones_like(size_bn)}
    return merge.mean(rows_bn, weights[self.pooling])


def consistency(student_bw: jax.Array, teacher_bw: jax.Array, student_bk: jax.Array,
                labels_b: jax.Array, threshold: float = 0.4) -> jax.Array:
  """Returns MCTF's consistency loss (B,): the squared error of normalised class tokens, for images
  that the student classifies correctly.

  Its mean is the mean over the images for which the student gives the true class a probability
  above `threshold`, 0 if there are none. The teacher (the same network with less fusion) gets no
  gradient.

  student_bk: the student's logits; labels_b: int, the true classes.
  """
  probability_bk = jax.nn.softmax(student_bk.astype(jnp.float32))
  passing_b = jnp.take_along_axis(probability_bk, labels_b[:, None], axis=1)[:, 0] > threshold
  error_bw = student_bw.astype(jnp.float32) - jax.lax.stop_gradient(teacher_bw.astype(jnp.float32))
  share = jnp.maximum(jnp.mean(passing_b), 1 / passing_b.shape[0])
  return jnp.where(passing_b, jnp.mean(error_bw ** 2, axis=-1), 0) / share


def _class_token(forward: Pass):
  return forward.collections["tokens"]["prefix"][0][:, 0]


def sizes(tokens: Tokens):
  """Returns (B, N) float32: how many source tokens each token holds."""
  return jnp.ones(tokens.x.shape[:2]) if tokens.size is None else tokens.size


def _relative_inverse(array_bn):
  """Returns 1/a divided by the largest 1/a of the image."""
  inverse_bn = 1 / jnp.maximum(array_bn.astype(jnp.float32), 1e-12)
  return inverse_bn / inverse_bn.max(axis=1, keepdims=True)


def pairings(weight_bmn, r: int, bidirectional: bool):
  """Returns r fusions, [(from, into), ...] with indices (B, r'), and the largest weight of each odd
  token.

  Half of r (rounded down) go from even positions into odd ones, then the rest from odd ones into
  the remaining even ones, by the same weights; if not bidirectional, all from even into odd ones.
  """
  first = r // 2 if bidirectional else r
  pairs, remaining_bmn = [], weight_bmn
  if first:   # arrays without elements would fail in ONNX Runtime
    row_br, column_br = best_rows(weight_bmn, first)
    pairs.append((2 * row_br, 2 * column_br + 1))
    fused_bm = (jnp.arange(weight_bmn.shape[1])[None, :, None] == row_br[:, None, :]).any(axis=2)
    remaining_bmn = jnp.where(fused_bm[:, :, None], -jnp.inf, weight_bmn)
  if bidirectional:
    column_br, row_br = best_rows(remaining_bmn.swapaxes(1, 2), r - first)
    pairs.append((2 * column_br + 1, 2 * row_br))
  return pairs, remaining_bmn.max(axis=1)


def received_attention(query_bnhd, key_bmhd, size_bm=None):
  """Returns the attention that each key receives, mean over heads and queries: (B, M), float32.

  Maps are formed for TILE queries at a time, never for all.
  """
  core = Core(size=size_bm)
  batch, count, heads, width = query_bnhd.shape
  tiles = -(-count // TILE)
  length = -(-count // tiles)
  padded = jnp.pad(query_bnhd, ((0, 0), (0, tiles * length - count), (0, 0), (0, 0)))
  tiles_tbnhd = padded.reshape(batch, tiles, length, heads, width).swapaxes(0, 1)
  real_tn = (jnp.arange(tiles * length) < count).reshape(tiles, length)

  def add(total_bm, tile):
    query, real_n = tile
    maps_bhnm = core.maps(query, key_bmhd)
    return total_bm + jnp.where(real_n[None, None, :, None], maps_bhnm, 0).sum(axis=(1, 2)), None

  total_bm, _ = jax.lax.scan(add, jnp.zeros(key_bmhd.shape[:2]), (tiles_tbnhd, real_tn))
  return total_bm / (heads * count)
