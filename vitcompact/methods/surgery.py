"""What methods do to the parameters of a block, and what is done for those that do not say."""
from typing import Any

import jax

from vitcompact import attention, trees
from vitcompact.methods.protocol import Site, inner_and_site, scope_of, scored_heads, value_heads
from vitcompact.token_state import Reduction, Tokens
from vitcompact.torch_names import Entry


def from_dense(method, site: Site, params, stats, data):
  """(params, stats) of a block in which `method` is new.

  data: the block on calibration images, a `calibration.Calibration`, or None.
  """
  if hasattr(method, "from_dense"):
    return method.from_dense(site, params, stats, data)
  place, new = fresh(method, site)
  if not new:
    return params, stats
  old = trees.named_leaves(_at(params, place))
  kept = {name: old[name] if name in old and old[name].shape == leaf.shape else leaf
          for name, leaf in trees.named_leaves(new["params"]).items()}
  if seen := new.get("batch_stats"):
    stats = _put(stats, place, seen)
  return _put(cut_heads(method, site, params), place, trees.nested(kept)), stats


def cut_heads(method, site: Site, params):
  """A block's parameters with the queries and keys of the first `scored_heads` heads alone, the
  values and outputs of the first `value_heads`."""
  if method.axis != "heads":
    return params
  scored, valued = scored_heads(method, site), value_heads(method, site)
  attn = dict(params["attn"])
  for name, kept in (("query", scored), ("key", scored), ("value", valued)):
    if kept < site.heads:
      attn[name] = {leaf: array[..., :kept, :] for leaf, array in attn[name].items()}
  if valued < site.heads:
    attn["out"] = {**attn["out"], "kernel": attn["out"]["kernel"][:valued]}
  return {**params, "attn": attn}


def fold(method, site: Site, params, stats):
  """(params, stats) of the deployed block."""
  if hasattr(method, "fold"):
    return method.fold(site, params, stats)
  other, seen = inner_and_site(method, site)
  return (params, stats) if other is None else fold(other, seen, params, stats)


def torch_entries(method, site: Site, torch: str, ours: str) -> list[Entry]:
  """A method's tensors in a PyTorch file; `torch` and `ours` name the block on each side."""
  if hasattr(method, "torch_entries"):
    return method.torch_entries(site, torch, ours)
  place, new = fresh(method, site)
  path = "/".join(place)
  return [Entry(f"{torch}.{path}.{name}".replace("/", "."), (f"{kind}/{ours}/{path}/{name}",))
          for kind, tree in new.items() for name in trees.named_leaves(tree)]


def fresh(method, site: Site) -> tuple[tuple[str, ...], dict[str, Any]]:
  """(path in the block, freshly drawn variables) of a method's module; {} where it has none."""
  def tokens(count, *rest):
    return jax.ShapeDtypeStruct((1, count, *rest), "float32")

  place = (scope_of(method),)
  if method.axis == "tokens":
    new = fresh_predictor(method.reduction(site.block, site.depth), site.width)
    return place, {"params": new["predict_tokens"]} if new else {}
  scored, width = scored_heads(method, site), site.head_width
  query, key = tokens(site.queries, scored, width), tokens(site.tokens, scored, width)
  if method.axis == "heads":
    place = ("attn", *place)
    valued = value_heads(method, site)
    inputs = (query, key, tokens(site.tokens, valued, width), attention.DENSE,
              tokens(site.queries, site.width))
  elif method.axis == "attention":
    inputs = attention.DENSE, query, key
  else:
    inputs = (tokens(site.queries, site.ffn_width),)
  return place, dict(method.make(site, parent=None).lazy_init(jax.random.key(0), *inputs))


def fresh_predictor(reduction: Reduction, width: int) -> dict[str, Any]:
  """{"predict_tokens": freshly drawn parameters} of what decides before a block which tokens go on,
  or {} where nothing does; the predictors of several stages differ."""
  if reduction.predict is None:
    return {}
  module = reduction.predict(parent=None)
  tokens = Tokens(jax.ShapeDtypeStruct((1, 2, width), "float32"))
  key = jax.random.key(getattr(module, "stage", 0))
  return {"predict_tokens": module.lazy_init(key, tokens, 1)["params"]}


def _at(tree, path):
  for name in path:
    tree = tree.get(name, {})
  return tree


def _put(tree, path, leaf):
  """The tree with another subtree at a path."""
  first, *rest = path
  return {**tree, first: _put(tree.get(first, {}), rest, leaf) if rest else leaf}
