"""Converts a block's parameters by calling a method's members, or by default."""
from typing import Any

import jax

from vitcompact import attention, trees
from vitcompact.methods.protocol import Site, inner_and_site, scope_of, scored_heads, value_heads
from vitcompact.token_state import Reduction, Tokens
from vitcompact.torch_names import Entry


def from_dense(method, site: Site, params, stats, data):
  """Returns (params, stats) of a block after adding `method`.

  data: the block on calibration images, a `calibration.Calibration`, or None.
  """
  if hasattr(method, "from_dense"):
    return method.from_dense(site, params, stats, data)
  path, new = fresh(method, site)
  if not new:
    return params, stats
  old = trees.named_leaves(_subtree(params, path))
  leaves = {name: old[name] if name in old and old[name].shape == leaf.shape else leaf
            for name, leaf in trees.named_leaves(new["params"]).items()}
  if new_stats := new.get("batch_stats"):
    stats = _replace_subtree(stats, path, new_stats)
  return _replace_subtree(cut_heads(method, site, params), path, trees.nested(leaves)), stats


def cut_heads(method, site: Site, params):
  """Cuts a block's parameters to queries and keys of the first `scored_heads` heads, and values and
  outputs of the first `value_heads`."""
  if method.axis != "heads":
    return params
  scored, values = scored_heads(method, site), value_heads(method, site)
  attn = dict(params["attn"])
  for name, kept in (("query", scored), ("key", scored), ("value", values)):
    if kept < site.heads:
      attn[name] = {leaf: array[..., :kept, :] for leaf, array in attn[name].items()}
  if values < site.heads:
    attn["out"] = {**attn["out"], "kernel": attn["out"]["kernel"][:values]}
  return {**params, "attn": attn}


def fold(method, site: Site, params, stats):
  """Returns (params, stats) of the deployed block."""
  if hasattr(method, "fold"):
    return method.fold(site, params, stats)
  inner, inner_site = inner_and_site(method, site)
  return (params, stats) if inner is None else fold(inner, inner_site, params, stats)


def torch_entries(method, site: Site, torch: str, ours: str) -> list[Entry]:
  """Returns a method's tensors in a PyTorch file; `torch` and `ours` name the block on each side.
  """
  if hasattr(method, "torch_entries"):
    return method.torch_entries(site, torch, ours)
  path, new = fresh(method, site)
  path = "/".join(path)
  return [Entry(f"{torch}.{path}.{name}".replace("/", "."), (f"{kind}/{ours}/{path}/{name}",))
          for kind, tree in new.items() for name in trees.named_leaves(tree)]


def fresh(method, site: Site) -> tuple[tuple[str, ...], dict[str, Any]]:
  """Returns (path in the block, freshly initialised variables) of a method's module; {} if it has
  no variables."""
  def tokens(count, *rest):
    return jax.ShapeDtypeStruct((1, count, *rest), "float32")

  path = (scope_of(method),)
  if method.axis == "tokens":
    new = fresh_predictor(method.reduction(site.block, site.depth), site.width)
    return path, {"params": new["predict_tokens"]} if new else {}
  scored, width = scored_heads(method, site), site.head_width
  query, key = tokens(site.queries, scored, width), tokens(site.tokens, scored, width)
  if method.axis == "heads":
    path = ("attn", *path)
    value = tokens(site.tokens, value_heads(method, site), width)
    inputs = query, key, value, attention.DENSE, tokens(site.queries, site.width)
  elif method.axis == "attention":
    inputs = attention.DENSE, query, key
  else:
    inputs = (tokens(site.queries, site.ffn_width),)
  return path, dict(method.make(site, parent=None).lazy_init(jax.random.key(0), *inputs))


def fresh_predictor(reduction: Reduction, width: int) -> dict[str, Any]:
  """Returns {"predict_tokens": freshly initialised parameters} of the predictor before a block, or
  {} if there is none; predictors of different stages get different parameters."""
  if reduction.predict is None:
    return {}
  module = reduction.predict(parent=None)
  tokens = Tokens(jax.ShapeDtypeStruct((1, 2, width), "float32"))
  key = jax.random.key(getattr(module, "stage", 0))
  return {"predict_tokens": module.lazy_init(key, tokens, 1)["params"]}


def _subtree(tree, path):
  for name in path:
    tree = tree.get(name, {})
  return tree


def _replace_subtree(tree, path, new):
  """Returns the tree with `new` at a path."""
  first, *rest = path
  return {**tree, first: _replace_subtree(tree.get(first, {}), rest, new) if rest else new}
