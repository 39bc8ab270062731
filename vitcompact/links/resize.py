"""Models with links carried to another image size: predictors' weights are tied to positions."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.links.sparsifiner import TokenLinks


def resize_links(variables, old: nn.Module, new: nn.Module):
  """Variables of model `old` in which all that is tied to positions fits model `new`.

  These are the predictors, and position embeddings. Rows of patches are interpolated linearly over
  the grid, those of prefix tokens stay. W_down sums over tokens, so it is scaled by their number:
  the coefficients keep their size.

  Raises:
    ValueError: the ranks differ, and nothing says which columns belong together.
  """
  parts, params = new.parts(), dict(variables["params"])
  for name, part in old.parts().items():
    links, target = getattr(part, "links", None), getattr(parts[name], "links", None)
    if not isinstance(links, TokenLinks) or not isinstance(target, TokenLinks):
      continue
    rank = links.spec.rank_of(links.tokens)
    if target.spec.rank_of(target.tokens) != rank:
      raise ValueError(f"{name}/links: rank {rank} cannot become rank "
                       f"{target.spec.rank_of(target.tokens)}; give the new model "
                       f"Sparsifiner(rank={rank})")
    grids = [_grid(part, links), _grid(parts[name], target)]
    rows = {leaf: resize_rows(params[name]["links"][leaf], links.prefix, *grids)
            for leaf in ("down", "up")}
    rows["down"] *= math.prod(grids[0]) / math.prod(grids[1])
    params[name] = {**params[name], "links": {**params[name]["links"], **rows}}
  for stored, wanted in zip(old.torch_entries(), new.torch_entries(), strict=True):
    if stored.positions is not None:
      name = stored.leaves[0].removeprefix("params/")
      grids = stored.positions.grid, wanted.positions.grid
      params[name] = resize_rows(params[name][0], stored.positions.prefix, *grids)[None]
  return {**variables, "params": params}


def _grid(part, links: TokenLinks) -> tuple[int, ...]:
  return part.attn.key_grid or (links.tokens - links.prefix,)


def resize_rows(rows_mr, prefix: int, grid: tuple[int, ...], new_grid: tuple[int, ...]):
  """Rows of a grid (or of a line) interpolated linearly; the first `prefix` stay."""
  rank = rows_mr.shape[1]
  plane = jax.image.resize(rows_mr[prefix:].reshape(*grid, rank), (*new_grid, rank), "linear",
                           antialias=False)
  return jnp.concatenate([rows_mr[:prefix], plane.reshape(-1, rank)])
