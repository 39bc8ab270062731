"""Models with links carried to another image size: predictors' weights are tied to positions."""
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.methods.attention.sparsifiner import TokenLinks


def at_rank(model: nn.Module):
  """A model's plan, in which predictors of links have the rank that they have now, at any size.

  As it is where there are none, and where they are not all of one rank.
  """
  found = [links for part in model.parts().values()
           if (links := getattr(part, "links", None)) is not None]
  ranks = {links.spec.rank_of(links.tokens) if isinstance(links, TokenLinks) else None
           for links in found}
  if len(ranks) != 1 or None in ranks:
    return model.plan
  return model.plan.with_links(rank=ranks.pop())


def resize_links(variables, old: nn.Module, new: nn.Module):
  """Variables of model `old` in which all that is tied to positions fits model `new`.

  These are the predictors, and position embeddings. Rows of patches are interpolated linearly over
  the grid, those of prefix tokens stay. W_down sums over tokens, so it is scaled by their number:
  the coefficients keep their size.

  Raises:
    ValueError: the ranks differ, and nothing says which columns belong together.
  """
  params = dict(variables["params"])
  for name, carry in carried(old, new).items():
    rows = {leaf: function(params[name]["links"][leaf]) for leaf, function in carry.items()}
    params[name] = {**params[name], "links": {**params[name]["links"], **rows}}
  for stored, wanted in zip(old.torch_entries(), new.torch_entries(), strict=True):
    if stored.positions is not None:
      name = stored.leaves[0].removeprefix("params/")
      grids = stored.positions.grid, wanted.positions.grid
      params[name] = resize_rows(params[name][0], stored.positions.prefix, *grids)[None]
  return {**variables, "params": params}


def carried(old: nn.Module, new: nn.Module) -> dict[str, dict[str, Callable]]:
  """{block: {leaf of its predictor: the function that carries its rows from `old` to `new`}}, of
  the predictors whose tokens are others. Raises ValueError where ranks differ."""
  parts, out = new.parts(), {}
  for name, part in old.parts().items():
    links, target = getattr(part, "links", None), getattr(parts[name], "links", None)
    if not isinstance(links, TokenLinks) or not isinstance(target, TokenLinks):
      continue
    rank = links.spec.rank_of(links.tokens)
    if target.spec.rank_of(target.tokens) != rank:
      raise ValueError(f"{name}/links: rank {rank} cannot become rank "
                       f"{target.spec.rank_of(target.tokens)}; give the new model "
                       f"Sparsifiner(rank={rank})")
    grids = {"grid": _grid(part, links), "new_grid": _grid(parts[name], target)}
    if grids["grid"] != grids["new_grid"]:
      share = math.prod(grids["grid"]) / math.prod(grids["new_grid"])
      out[name] = {leaf: functools.partial(resize_rows, prefix=links.prefix, **grids, scale=scale)
                   for leaf, scale in (("down", share), ("up", 1.0))}
  return out


def _grid(part, links: TokenLinks) -> tuple[int, ...]:
  return part.attn.key_grid or (links.tokens - links.prefix,)


def resize_rows(rows_mr, prefix: int, grid: tuple[int, ...], new_grid: tuple[int, ...],
                scale: float = 1.0):
  """Rows of a grid (or of a line) interpolated linearly, the first `prefix` as they are; scaled."""
  rank = rows_mr.shape[1]
  plane = jax.image.resize(rows_mr[prefix:].reshape(*grid, rank), (*new_grid, rank), "linear",
                           antialias=False)
  return scale * jnp.concatenate([rows_mr[:prefix], plane.reshape(-1, rank)])
