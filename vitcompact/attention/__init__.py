"""The attention core: everything that attends goes through `Core`."""
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.attention import backends

# A name scope: `count` finds the score and value products of a traced program by it.
SCOPE = "vitcompact.attention"
KEEP_EPSILON = 1e-6

FORMS = ("einsum", "images", "tiled", "cudnn", "splash", "tokamax")
# On a CPU. Below so many scores of a head all are formed at once; up to so many, of so many keys,
# those of one image in turn. `python -m experiments.attention_speed` prints the times.
FEW_ENTRIES, MANY_ENTRIES, MANY_KEYS = 100 ** 2, 400 ** 2, 240
# Elsewhere. Beyond so many, tiles, for the sake of memory.
LARGEST_MAP = 1024 ** 2
LEAST_SPLASH = 512   # keys
# Of all heads together, and queries: a tile where something is done to the scores.
ROW_ENTRIES, LEAST_ROWS = 2 ** 18, 16

# Part of the cache keys of jax.jit: whoever asks for a backend gets no program of another.
_asked = jax.make_user_context(None)
_split = jax.make_user_context(False)


def using(name: str | None):
  """A context in which attention is computed by this backend; None: by the one that fits best.

  It decides while a program is traced. What a backend cannot do is left to "tiled": masks, dropped
  tokens and filters over scores. Links between blocks have kernels of their own, which run where
  nothing is asked for, see `links.blocks`. Only "einsum" knows derivatives by forward mode.
  """
  if name is not None and name not in FORMS:
    raise ValueError(f"attention backend {name!r}: must be one of {', '.join(FORMS)}, or None")
  return _asked(name)


def asked() -> str | None:
  """The backend that was asked for, if any."""
  return _asked.value


def split_over(devices: int):
  """A context in which the images of a batch lie on so many devices."""
  return _split(devices > 1)


def split() -> bool:
  """Whether the images lie on several devices: a loop over them cannot be split, and each device
  would run all of it."""
  return _split.value


def in_turn() -> bool:
  """Whether images are computed one after the other, for the sake of a CPU's cache."""
  return jax.default_backend() == "cpu" and not split()


def backend(platform: str, dtype, *, queries: int, keys: int, width: int, plain: bool = True,
            hopper: bool = False, devices: int = 1, turns: bool = True) -> str:
  """How attention is computed best.

  platform: "cpu", "gpu" or "tpu"; devices: how many there are. hopper: a GPU of that generation or
    a later one. width: the largest of queries, keys and values, see `backends.channels`.
  plain: nothing but a bias of keys changes the scores.
  turns: see `in_turn`.
  Returns:
    "einsum", all scores at once; "images", an image in turn; "tiled", tiles of queries, whose
    memory is linear in tokens; "cudnn" (16 bits only); "splash" (a single TPU: XLA does not know
    how to share its kernel out). "tokamax" is only ever asked for.
  """
  entries = queries * keys
  if platform == "cpu" and turns:
    if entries < FEW_ENTRIES:
      return "einsum"
    return "images" if entries < MANY_ENTRIES and keys < MANY_KEYS else "tiled"
  if plain and not cudnn_refusal(platform, dtype, width=width, hopper=hopper):
    return "cudnn"
  if platform == "tpu" and plain and devices == 1 and keys >= LEAST_SPLASH:
    return "splash"
  return "einsum" if entries <= LARGEST_MAP else "tiled"


def cudnn_refusal(platform: str, dtype, *, width: int, hopper: bool) -> str:
  """Why cuDNN does not compute such attention; empty: it does."""
  if platform != "gpu":
    return f"runs on NVIDIA GPUs, not on a {platform}"
  most = 256 if hopper else 128
  if jnp.dtype(dtype).itemsize != 2 or width > most:
    return f"takes 16 bits and up to {most} channels, not {jnp.dtype(dtype)} and {width}"
  return ""


def _check_runs(name: str, platform: str, dtype, **fields):
  """Raises ValueError where a backend that was asked for cannot run."""
  why = cudnn_refusal(platform, dtype, **fields) if name == "cudnn" else ""
  if name == "splash" and platform != "tpu":
    why = f"runs on TPUs, not on a {platform}"
  if why:
    raise ValueError(f"attention backend {name!r} {why}; ask for another, or for none (in a Plan, "
                     "backends={}): then the one that fits is taken")


@functools.cache
def _is_hopper() -> bool:
  capability = getattr(jax.devices()[0], "compute_capability", "0.0")
  return float(capability) >= 9


def share(part: float | Fraction):
  """A name scope: of the products inside, the method needs this part; `count` reads it."""
  part = Fraction(part).limit_denominator(10 ** 9)
  return jax.named_scope(f"vitcompact.share({part.numerator}:{part.denominator})")


def scores(query_bnhd, key_bmhd):
  """Scaled scores q.k / sqrt(d), in float32: (B, N, h, d), (B, M, h, d) -> (B, h, N, M)."""
  scale = query_bnhd.shape[-1] ** -0.5
  with jax.named_scope(SCOPE):
    return jnp.einsum("bnhd,bmhd->bhnm", query_bnhd * scale, key_bmhd,
                      preferred_element_type=jnp.float32)


def weigh(maps_bhnm, value_bmhe):
  """Values averaged under attention maps: (B, h, N, M), (B, M, h, e) -> (B, N, h, e)."""
  with jax.named_scope(SCOPE):
    return jnp.einsum("bhnm,bmhe->bnhe", maps_bhnm.astype(value_bmhe.dtype), value_bmhe)


def softmax_kept(scores_bhnm, keep_bm, own_n=None):
  """Softmax over keys of which some (keep_mask = 0) are hidden from all queries but their own.

  a_ij = (e_ij g_ij + eps / M) / (sum_k e_ik g_ik + eps), g_ij = keep_mask_j (1: i = j). DynamicViT,
  eps included; the gradient reaches keep_mask (B, M). Float32. own_n: (N,) or (B, N), the key that is
  each query's own; None: queries and keys are the same tokens.
  """
  queries, count = scores_bhnm.shape[-2:]
  own_n = jnp.arange(queries) if own_n is None else own_n
  own_bn1 = jnp.broadcast_to(own_n, (keep_bm.shape[0], queries))[..., None]
  top_bhn1 = jax.lax.stop_gradient(scores_bhnm.max(axis=-1, keepdims=True))
  seen_bnm = jnp.where(own_bn1 == jnp.arange(count)[None, None], 1, keep_bm[:, None, :])
  exp_bhnm = jnp.exp(scores_bhnm - top_bhn1) * seen_bnm[:, None]
  total_bhn1 = exp_bhnm.sum(axis=-1, keepdims=True)
  return (exp_bhnm + KEEP_EPSILON / count) / (total_bhn1 + KEEP_EPSILON)


def _same(x):
  return x


class Core(NamedTuple):
  """softmax(q k^T / sqrt(d)) v for each head, as the tokens of a block ask for it.

  size: (B, M) or None: a key counts as so many equal keys (log size is added to its scores).
  spread: applied to the values before, gather: to the outputs after; the identity, but where tokens
    are merged between the scores and the values. average: whether `gather` gives means of rows;
    else the outputs do not tell what it makes of the maps, which are then formed.
  keep_mask: (B, M) or None: see `softmax_kept`.
  mask: (B, h, N, M) or None: where it is false a key gets nothing from a query. `rescore` may make
    more heads than there are queries; head i then has the mask of head i modulo h.
  scored: share of the pairs of tokens that the mask leaves.
  layout: a `links.blocks.BlockLinks` or None: which blocks of tokens are scored; it attends.

  A `rescore` changes the scores before the softmax: (B, f, N, M), edges -> (B, h, N, M). A row of
  its result may depend on `rescore.reach` rows before and behind, 0 beyond the ends. edges: these
  are all rows; False: the first and the last `reach` are there for the others' sake, and are no
  rows of the result.
  """
  size: jax.Array | None = None
  spread: Callable = _same
  gather: Callable = _same
  average: bool = True
  keep_mask: jax.Array | None = None
  mask: jax.Array | None = None
  scored: Fraction = Fraction(1)
  layout: Any = None

  def of_heads(self, start: int, stop: int) -> "Core":
    """The attention of some of the heads."""
    if self.layout is not None:
      return self._replace(layout=self.layout.of_heads(start, stop))
    return self if self.mask is None else self._replace(mask=self.mask[:, start:stop])

  def masked_scores(self, query_bnhd, key_bmhd, rescore: Callable | None = None,
                    edges: bool = True):
    """Scores (B, h, N, M), float32, -inf where there is no link. edges: of `rescore`."""
    # A filter over scores needs them all.
    with share(self.scored if rescore is None else 1):
      scores_bhnm = scores(query_bnhd, key_bmhd)
    if rescore is not None:
      scores_bhnm = rescore(scores_bhnm, edges)
    if self.size is not None:
      scores_bhnm = scores_bhnm + self._bias()[:, None, None]
    mask = self._mask()
    if mask is None:
      return scores_bhnm
    heads, masked = scores_bhnm.shape[1], mask.shape[1]
    mask = mask if heads == masked else mask[:, jnp.arange(heads) % masked]
    return jnp.where(mask, scores_bhnm, -jnp.inf)

  def _bias(self):
    return None if self.size is None else jnp.log(self.size.astype(jnp.float32))

  def maps(self, query_bnhd, key_bmhd, rescore: Callable | None = None, own_n=None,
           edges: bool = True):
    """Attention maps (B, h, N, M), float32. own_n: see `softmax_kept`; edges: of `rescore`."""
    scores_bhnm = self.masked_scores(query_bnhd, key_bmhd, rescore, edges)
    if self.keep_mask is not None:
      return softmax_kept(scores_bhnm, self.keep_mask, own_n)
    return jax.nn.softmax(scores_bhnm, axis=-1)

  def merged(self, maps_bhnm):
    """The maps as the tokens that values come from and outputs go to see them."""
    if self.spread is _same:
      return maps_bhnm
    rows_bnhm = maps_bhnm.swapaxes(1, 2)
    batch, count = jax.eval_shape(self.gather, rows_bnhm).shape[:2]
    holds_bm1k = self.spread(jnp.broadcast_to(jnp.eye(count)[None, :, None],
                                              (batch, count, 1, count)))
    rows_bnhk = jnp.einsum("bnhm,bmk->bnhk", rows_bnhm, holds_bm1k[:, :, 0])
    return self.gather(rows_bnhk).swapaxes(1, 2)

  def __call__(self, query_bnhd, key_bmhd, value_bmhe, rescore: Callable | None = None):
    """(B, N, h, d), (B, M, h, d), (B, M, h, e) -> (B, N, h, e) in the values' dtype.

    e may differ from d. Nobody sees the maps, and most backends do not form them.
    """
    if not self.average:
      return weigh(self.merged(self.maps(query_bnhd, key_bmhd, rescore)), value_bmhe)
    count, value_bmhe = value_bmhe.shape[1], self.spread(value_bmhe)
    if self.layout is not None and rescore is None and self.keep_mask is None:
      return self.gather(self.layout.attend(query_bnhd, key_bmhd, value_bmhe, self._bias()))
    # Merged maps would weigh as many values as there are.
    needed = self.scored * Fraction(count, value_bmhe.shape[1]) ** 2
    return self.gather(self._attend(query_bnhd, key_bmhd, value_bmhe, rescore, needed))

  def _attend(self, query_bnhd, key_bmhd, value_bmhe, rescore, needed):
    platform, biased = jax.default_backend(), self.size is not None
    plain = rescore is None and self.keep_mask is None and self.mask is None and self.layout is None
    device = {"width": backends.channels(query_bnhd.shape[-1], value_bmhe.shape[-1], biased),
              "hopper": platform == "gpu" and _is_hopper()}
    name = _asked.value or backend(
        platform, value_bmhe.dtype, queries=query_bnhd.shape[1], keys=key_bmhd.shape[1],
        plain=plain, devices=jax.device_count(), turns=in_turn(), **device)
    if plain and name != "einsum":
      _check_runs(name, platform, value_bmhe.dtype, **device)
      turns = {"images": None if split() else "images", "tiled": "heads" if in_turn() else None}
      attend = (functools.partial(backends.tiled, in_turn=turns[name]) if name in turns
                else getattr(backends, name))
      with jax.named_scope(SCOPE):
        return attend(query_bnhd, key_bmhd, value_bmhe, self._bias())
    rows = {"einsum": Core._at_once, "images": Core._at_once}.get(name, Core._in_rows)
    attend = functools.partial(rows, rescore=rescore, needed=needed)
    if name != "einsum" and in_turn():
      return self._images_in_turn(attend, query_bnhd, key_bmhd, value_bmhe)
    return attend(self, query_bnhd, key_bmhd, value_bmhe)

  def _at_once(self, query_bnhd, key_bmhd, value_bmhe, *, rescore, needed, own_n=None, edges=True):
    """All scores of these queries formed."""
    if self.keep_mask is not None:
      maps_bhnm = self.maps(query_bnhd, key_bmhd, rescore, own_n, edges)
      with share(needed):
        return weigh(maps_bhnm, value_bmhe)
    scores_bhnm = self.masked_scores(query_bnhd, key_bmhd, rescore, edges)
    top_bhn1 = jax.lax.stop_gradient(scores_bhnm.max(axis=-1, keepdims=True))
    exp_bhnm = jnp.exp(scores_bhnm - top_bhn1)
    # Divided after the product, of which there is less, and in its order: both are faster.
    total_bhn1 = exp_bhnm.sum(axis=-1, keepdims=True)
    with share(needed), jax.named_scope(SCOPE):
      out_bhne = jnp.einsum("bhnm,bmhe->bhne", exp_bhnm.astype(value_bmhe.dtype), value_bmhe,
                            preferred_element_type=jnp.float32)
    return (out_bhne / total_bhn1).astype(value_bmhe.dtype).swapaxes(1, 2)

  def _images_in_turn(self, attend, query_bnhd, key_bmhd, value_bmhe):
    def image(arrays):
      (size, keep_mask, mask), *arrays = jax.tree.map(lambda x: x[None], arrays)
      core = self._replace(size=size, keep_mask=keep_mask, mask=mask, layout=None)
      return attend(core, *arrays)[0]

    fields = (self.size, self.keep_mask, self._mask())
    return jax.lax.map(image, (fields, query_bnhd, key_bmhd, value_bmhe))

  def _in_rows(self, query_bnhd, key_bmhd, value_bmhe, *, rescore, needed):
    """Tiles of queries in turn, computed again in the backward pass."""
    queries, keys, heads = *(x.shape[1] for x in (query_bnhd, key_bmhd)), value_bmhe.shape[2]
    tiles = -(-queries // max(LEAST_ROWS, ROW_ENTRIES // (keys * heads)))
    rows, reach = -(-queries // tiles), 0 if rescore is None else rescore.reach
    start_t1 = rows * jnp.arange(tiles)[:, None]
    missing = tiles * rows - queries
    around_tr = start_t1 + jnp.arange(rows + 2 * reach)[None]
    padded = jnp.pad(query_bnhd, [(0, 0), (reach, reach + missing), (0, 0), (0, 0)])
    mask = self._mask()
    if mask is not None:
      mask = jnp.pad(mask, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=True)
      mask = jnp.moveaxis(mask.reshape(*mask.shape[:2], tiles, rows, keys), 2, 0)

    # Laid out as products want them, which XLA:CPU would do anew for each tile.
    key_bhdm, value_bhme = key_bmhd.transpose(0, 2, 3, 1), value_bmhe.swapaxes(1, 2)

    @jax.checkpoint
    def tile(arrays):
      query_bnhd, own_n, mask = arrays
      core = self._replace(mask=mask, layout=None)
      return core._at_once(query_bnhd, key_bhdm.transpose(0, 3, 1, 2), value_bhme.swapaxes(1, 2),
                           rescore=rescore, needed=needed, own_n=own_n, edges=False)

    out_tbnhe = jax.lax.map(tile, (jnp.moveaxis(padded[:, around_tr], 1, 0),
                                   start_t1 + jnp.arange(rows)[None], mask))
    out_btnhe = jnp.moveaxis(out_tbnhe, 0, 1)
    return out_btnhe.reshape(-1, tiles * rows, *out_btnhe.shape[3:])[:, :queries]

  def _mask(self):
    return self.mask if self.layout is None else self.layout.mask()


DENSE = Core()   # all keys count alike


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def wants_predictions(module: nn.Module) -> bool:
  """Whether somebody asked for what predictors of links are trained with."""
  return module.is_mutable_collection("attention") and not module.is_initializing()
