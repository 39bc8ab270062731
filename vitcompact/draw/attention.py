"""Draws which tokens attend to which in a model with attention sparsity, and how much that keeps.

`run` writes into a folder: query_ROW_COLUMN.png for each chosen patch, with the patches that it
attends to (others are dark blue) in each block and head; matrices.png, with which query (rows)
attends to which key (columns), class token first; mass.png, with the share of dense attention that
the kept pairs hold, for each block, over the share of pairs kept at several keep rates (with few
blocks of tokens that share differs from the rate); and the same numbers in mass.csv. Only heads
that are computed are drawn.
"""
import functools
import pathlib

import jax
import numpy as np

import vitcompact as vc
from vitcompact import convert
from vitcompact.draw import pyplot
from vitcompact.methods import protocol
from vitcompact.models.backbone import Isotropic

# A patch that is not attended to is darkened, and made bluish so that a black patch differs too.
DIMMED = 0.25
BLUE = np.array([0.0, 0.0, 0.35])
MIN_PATCH_SIDE = 16      # pixels of a side of a drawn patch
KEEP_RATES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def sparse_blocks(model) -> list[int]:
  """The blocks that have a mask predictor; raises ValueError if there are none to draw."""
  if not isinstance(model, Isotropic):
    raise ValueError(f"{model.variant or 'this model'} is hierarchical: its keys are not patches; "
                     "draw a DeiT or an LV-ViT")
  if model.plan.tokens is not None:
    raise ValueError(f"tokens={model.plan.tokens}: patches are reduced, so a token has no "
                     "fixed place; draw a model without a token reducer")
  blocks = [site.block for site in model.sites() if is_sparse(model.plan.at(site).attention)]
  if not blocks:
    raise ValueError(f"plan={model.plan.to_json()}: no block has sparse attention, nothing to "
                     "draw")
  return blocks


def pairs_of(model, variables, image) -> dict[int, np.ndarray]:
  """{block: (heads, N, N) bool}: which query attends to which key. image: (H, W, C)."""
  maps = jax.jit(lambda v, x: vc.features(model, v, x, maps=True).maps)(variables, image[None])
  sites = model.sites()
  # Masked pairs have a weight of exactly 0; hallucinated maps come after the computed ones.
  scored = {i: sites[i].heads if (heads := model.plan.at(sites[i]).heads) is None else
            protocol.scored_heads(heads, sites[i]) for i in sparse_blocks(model)}
  return {i: np.asarray(maps[f"blocks_{i}"][0][:count]) > 0 for i, count in scored.items()}


def mass_kept(model, variables, image, keeps=KEEP_RATES) -> dict[int, list[tuple[float, float]]]:
  """{block: [(share of pairs kept, share of the block's own dense attention that they hold)]}, one
  pair for each keep rate.

  Only queries of patches count; at block granularity, also only the attention on patches.
  """
  out = {i: [] for i in sparse_blocks(model)}
  for keep in keeps:
    sparse = model.clone(plan=model.plan.map(functools.partial(at_keep, keep=keep)))
    _, state = jax.jit(lambda v, x, m=sparse: m.apply(v, x, mutable=["attention"]))(
        variables, image[None])
    for i, shares in out.items():
      scope = protocol.scope_of(model.plan.planned(i).attention)
      sown = state["attention"][f"blocks_{i}"][scope]
      target, kept = (np.asarray(sown[name][0]) for name in ("target", "kept"))
      shares.append((float(kept.mean()), float((target * kept).sum() / target.sum())))
  return out


def is_sparse(method) -> bool:
  return method is not None and method.axis == "attention" and bool(protocol.at_keep(method))


def at_keep(method, keep: float | None = None):
  """A method of attention sparsity that masks, at a keep rate; other methods unchanged."""
  return protocol.at_keep(method)(keep) if is_sparse(method) else method


def enlarge(image, grid: tuple[int, int]):
  """The image, with pixels repeated if patches are so small that a frame would cover them."""
  times = max(1, -(-MIN_PATCH_SIDE * grid[0] // image.shape[0]))
  return image.repeat(times, axis=0).repeat(times, axis=1)


def highlight(image, kept, query: tuple[int, int]):
  """The image with patches that are not kept in dark blue, and a red frame around the query's.

  image: (H, W, 3) in [0, 1]; kept: (h, w) bool.
  """
  height, width = image.shape[0] // kept.shape[0], image.shape[1] // kept.shape[1]
  mask = np.kron(kept, np.ones((height, width)))[..., None] > 0
  out = np.where(mask, image, DIMMED * image + BLUE)
  y, x = query[0] * height, query[1] * width
  red = np.array([1.0, 0.0, 0.0])
  for edge in (np.s_[y, x:x + width], np.s_[y + height - 1, x:x + width],
               np.s_[y:y + height, x], np.s_[y:y + height, x + width - 1]):
    out[edge] = red
  return out


def parse_queries(texts, grid: tuple[int, int]) -> list[tuple[int, int]]:
  """[(row, column)] of patches from "row,column"; the middle and a corner if there are none."""
  if not texts:
    return [(grid[0] // 2, grid[1] // 2), (0, 0)]
  queries = []
  for text in texts:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts) or not all(
        int(part) < n for part, n in zip(parts, grid, strict=True)):
      raise ValueError(f"--query {text}: must be row,column of a patch, up to {grid[0] - 1},"
                       f"{grid[1] - 1}")
    queries.append((int(parts[0]), int(parts[1])))
  return queries


def draw_rows(rows, path, cmap=None):
  """Writes pictures: {title of a row: [picture, ...]}, a column for each head."""
  plt, columns = pyplot(), max(map(len, rows.values()))
  figure, axes = plt.subplots(len(rows), columns, figsize=(2 * columns, 2.2 * len(rows)),
                              squeeze=False)
  for line, (title, pictures) in zip(axes, rows.items(), strict=True):
    for axis in line:
      axis.set_axis_off()
    for head, (axis, picture) in enumerate(zip(line, pictures, strict=False)):
      axis.imshow(picture, interpolation="nearest", cmap=cmap)
      axis.set_title(f"{title}, head {head}", fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def draw_mass(mass, path):
  plt = pyplot()
  figure, axis = plt.subplots(figsize=(5, 4))
  for block, shares in mass.items():
    axis.plot(*zip(*shares, strict=True), marker=".", label=f"block {block}")
  axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="random pairs")
  axis.set_xlabel("share of pairs kept")
  axis.set_ylabel("share of dense attention that they hold")
  axis.legend(fontsize=7, ncol=2)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def run(checkpoint, image, out, *, queries=(), blocks=(), force=False) -> str:
  """Writes the drawings into folder `out`, and returns a line that names them."""
  model, variables = convert.load(checkpoint)
  # After the first training phase masks are not applied yet: draws what they would keep.
  model = model.clone(plan=model.plan.map(at_keep))
  known = sparse_blocks(model)
  for block in blocks:
    if block not in known:
      raise ValueError(f"--block {block} has no sparse attention; blocks that have: {known}")
  places = parse_queries(queries, model.grid)
  out = pathlib.Path(out)
  names = [*(f"query_{row}_{column}.png" for row, column in places), "matrices.png", "mass.png",
           "mass.csv"]
  existing = [name for name in names if (out / name).exists()]
  if existing and not force:
    raise ValueError(f"{out / existing[0]} exists; give another folder or --force")
  out.mkdir(parents=True, exist_ok=True)
  preprocess = vc.preprocess(checkpoint)
  normalised = preprocess(image)
  picture = enlarge(preprocess.pixels(normalised), model.grid)
  pairs = pairs_of(model, variables, normalised)
  pairs = {block: pairs[block] for block in blocks or known}
  prefix = model.sites()[0].prefix
  for (row, column), name in zip(places, names, strict=False):
    at = prefix + row * model.grid[1] + column
    draw_rows({f"block {i}": [
        highlight(picture, kept[at, prefix:].reshape(model.grid), (row, column))
        for kept in heads] for i, heads in pairs.items()}, out / name)
  draw_rows({f"block {i}": list(heads) for i, heads in pairs.items()}, out / "matrices.png",
            cmap="gray")
  mass = mass_kept(model, variables, normalised)
  draw_mass(mass, out / "mass.png")
  lines = ["block,keep,kept,mass"]
  lines += [f"{i},{keep},{kept:.4f},{share:.4f}" for i, shares in mass.items()
            for keep, (kept, share) in zip(KEEP_RATES, shares, strict=True)]
  (out / "mass.csv").write_text("\n".join(lines) + "\n")
  return f"{out}: {', '.join(names)}"
