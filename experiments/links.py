"""Draws the links that a Sparsifiner keeps: on the image, as matrices, and what mass they hold.

  python -m experiments.links --checkpoint sparse.safetensors --image cat.jpg --out drawings
  python -m experiments.links --checkpoint sparse.safetensors --image cat.jpg --out drawings \\
      --queries 3,5 10,2 --blocks 0 11

The checkpoint is one that `vitcompact.convert.save` wrote, of a DeiT or LV-ViT with links. In the
folder OUT: query_ROW_COLUMN.png for each chosen patch, the patches that it is linked to (others are
dark blue) for each block and head; matrices.png, which query (rows) is linked to which key, class
token first; mass.png, the share of dense attention that links hold at several keep rates, block by
block, over the share of links that a rate really keeps (of few blocks of links it is another), with
the same numbers in mass.csv. Heads are those that are computed. Needs matplotlib.
"""
import argparse
import pathlib

import jax
import numpy as np
from PIL import Image

import vitcompact as vc
from vitcompact import convert

DARK = 0.25     # brightness of a patch without a link,
BLUE = np.array([0.0, 0.0, 0.35])   # and what is added: a black patch without one is seen as well
LEAST = 16      # pixels, a side of a patch that is drawn
KEEPS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def linked_blocks(model) -> list[int]:
  """The blocks that have a predictor; raises ValueError where links cannot be drawn."""
  if not hasattr(model, "grid"):
    raise ValueError(f"{model.variant or 'this model'} is hierarchical: its keys are no patches; "
                     "draw a DeiT or an LV-ViT")
  if model.plan.tokens is not None:
    raise ValueError(f"tokens={model.plan.tokens}: patches are reduced, so links have no fixed "
                     "place; draw a model without a reducer")
  blocks = [i for i in range(model.depth) if model.parts()[f"blocks_{i}"].links is not None]
  if not blocks:
    raise ValueError(f"plan={model.plan.to_json()}: no block has links, nothing to draw")
  return blocks


def links_of(model, variables, image) -> dict[int, np.ndarray]:
  """{block: (heads, N, N) bool}, which query is linked to which key. image: (H, W, C)."""
  maps = jax.jit(lambda v, x: vc.features(model, v, x, maps=True).maps)(variables, image[None])
  parts = model.parts()
  # What is masked has weight 0 exactly; hallucinated maps follow the computed ones.
  return {i: np.asarray(maps[f"blocks_{i}"][0][:parts[f"blocks_{i}"].attn.real_heads]) > 0
          for i in linked_blocks(model)}


def mass_kept(model, variables, image, keeps=KEEPS) -> dict[int, list[tuple[float, float]]]:
  """{block: for each keep rate, the share of links really kept, and the share of the block's own
  dense attention that they hold}.

  Of patch queries; at block granularity, of the attention on patches.
  """
  out = {i: [] for i in linked_blocks(model)}
  for keep in keeps:
    sparse = model.clone(plan=model.plan.with_links(keep=keep))
    _, state = jax.jit(lambda v, x, m=sparse: m.apply(v, x, mutable=["attention"]))(variables,
                                                                                image[None])
    for i, shares in out.items():
      seen = state["attention"][f"blocks_{i}"]["links"]
      target, linked = (np.asarray(seen[name][0]) for name in ("target", "linked"))
      shares.append((float(linked.mean()), float((target * linked).sum() / target.sum())))
  return out


def enlarged(image, grid: tuple[int, int]):
  """The image, its pixels repeated where patches are so small that a frame would cover them."""
  times = max(1, -(-LEAST * grid[0] // image.shape[0]))
  return image.repeat(times, axis=0).repeat(times, axis=1)


def lit(image, kept, query: tuple[int, int]):
  """The image with patches that are not kept dark blue and a red frame around the query's.

  image: (H, W, 3) in [0, 1]; kept: (h, w) bool.
  """
  height, width = image.shape[0] // kept.shape[0], image.shape[1] // kept.shape[1]
  seen = np.kron(kept, np.ones((height, width)))[..., None] > 0
  out = np.where(seen, image, DARK * image + BLUE)
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
      raise ValueError(f"--queries {text}: must be row,column of a patch, up to {grid[0] - 1},"
                       f"{grid[1] - 1}")
    queries.append((int(parts[0]), int(parts[1])))
  return queries


def pyplot():
  try:
    import matplotlib
  except ImportError:
    raise ValueError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
  matplotlib.use("Agg")
  from matplotlib import pyplot
  return pyplot


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
  axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="links at random")
  axis.set_xlabel("share of links kept")
  axis.set_ylabel("share of dense attention on links")
  axis.legend(fontsize=7, ncol=2)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def run(checkpoint, image, out, *, queries=(), blocks=(), force=False) -> str:
  """Writes the drawings into folder `out`, returns a line that tells which."""
  model, variables = convert.load(checkpoint)
  # Of a predictor whose links are not yet used, what it would link.
  model = model.clone(plan=model.plan.with_links(masked=True))
  known = linked_blocks(model)
  for block in blocks:
    if block not in known:
      raise ValueError(f"--blocks {block}: has no links; those that have: {known}")
  places = parse_queries(queries, model.grid)
  out = pathlib.Path(out)
  names = [*(f"query_{row}_{column}.png" for row, column in places), "matrices.png", "mass.png",
           "mass.csv"]
  there = [name for name in names if (out / name).exists()]
  if there and not force:
    raise ValueError(f"{out / there[0]} exists; give another folder or --force")
  out.mkdir(parents=True, exist_ok=True)
  preprocess = vc.preprocess(model)
  pixels = preprocess(Image.open(image))
  plain = np.clip(pixels * np.array(preprocess.std) + np.array(preprocess.mean), 0, 1)
  plain = enlarged(plain, model.grid)
  links = links_of(model, variables, pixels)
  links = {block: links[block] for block in blocks or known}
  prefix = model.parts()["blocks_0"].attn.prefix
  for (row, column), name in zip(places, names, strict=False):
    at = prefix + row * model.grid[1] + column
    draw_rows({f"block {i}": [lit(plain, kept[at, prefix:].reshape(model.grid), (row, column))
                              for kept in heads] for i, heads in links.items()}, out / name)
  draw_rows({f"block {i}": list(heads) for i, heads in links.items()}, out / "matrices.png",
            cmap="gray")
  mass = mass_kept(model, variables, pixels)
  draw_mass(mass, out / "mass.png")
  lines = ["block,keep,links,mass"]
  lines += [f"{i},{keep},{linked:.4f},{share:.4f}" for i, shares in mass.items()
            for keep, (linked, share) in zip(KEEPS, shares, strict=True)]
  (out / "mass.csv").write_text("\n".join(lines) + "\n")
  return f"{out}: {', '.join(names)}"


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", required=True, help="a .safetensors file of ours")
  parser.add_argument("--image", required=True)
  parser.add_argument("--out", required=True, help="a folder")
  parser.add_argument("--queries", nargs="*", default=[], help="patches, as row,column")
  parser.add_argument("--blocks", nargs="*", type=int, default=[], help="default: all with links")
  parser.add_argument("--force", action="store_true", help="overwrite")
  args = parser.parse_args()
  try:
    print(run(args.checkpoint, args.image, args.out, queries=args.queries, blocks=args.blocks,
              force=args.force))
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
  main()
