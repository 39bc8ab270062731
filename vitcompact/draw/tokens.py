"""Draws which patches of an image survive a token reducer or are merged, stage by stage.

Patches that were dropped, or fused into the remainder, are white, and so are those on a fast path;
patches that were merged into one token have their mean colour and an outline.
"""
import dataclasses
import pathlib

import jax
import numpy as np

import vitcompact as vc
from vitcompact import convert
from vitcompact.draw import pyplot
from vitcompact.token_state import NOTHING

DROPPED = -1
OUTLINE = 0.15   # grey level of the outlines


def stages(model, variables, image) -> list[tuple[str, np.ndarray]]:
  """[(title, (h, w) int)] after each block that reduces: the index of the token of each patch.

  It is DROPPED for a patch that was dropped or fused into the remainder. If the reducer has a fast
  path instead, the stages are the blocks that choose it, and its patches are DROPPED. image: (H, W,
  C), normalised.
  """
  sites = [site for site in model.sites() if model.plan.at(site).tokens is not None]
  steps = {site.block: model.plan.at(site).reduction(site) for site in sites}
  deciding = {site.block: site.query_grid for site in sites
              if steps[site.block].ffn and steps[site.block].predict}
  blocks = list(deciding) or [block for block, step in steps.items() if step != NOTHING]
  if not blocks:
    raise ValueError(f"plan={model.plan.to_json()}: no block reduces tokens, nothing to draw; "
                     "give --plan")
  _, state = jax.jit(lambda v, x: model.apply(v, x, mutable=["tokens"]))(variables, image[None])
  sown = state["tokens"]
  out = []
  for i, grid in deciding.items():
    mask = np.asarray(sown[f"blocks_{i}"]["predict_tokens"]["keep_mask"][0])[0]
    holder = np.where(mask, np.arange(mask.size), DROPPED).reshape(grid)
    out.append((f"block {i}: FFN for {int(mask.sum())} of {mask.size}", holder))
  for i in () if deciding else blocks:
    source = np.asarray(sown[f"source_{i}"][0])[0]
    keep_mask = np.asarray(sown[f"keep_mask_{i}"][0])[0]
    holder = np.where(keep_mask, source[-keep_mask.size:], DROPPED).reshape(model.grid)
    tokens = len(np.unique(holder[holder != DROPPED]))
    out.append((f"block {i}: {tokens} of {keep_mask.size}", holder))
  return out


def coloured_by_token(image, holder):
  """The image with each token's patches in their mean colour: (H, W, 3) in [0, 1].

  image: (H, W, 3) in [0, 1]; holder: (h, w) int, as `stages` returns. A token of one patch is
  unchanged, tokens of several have an outline; DROPPED patches are white.
  """
  height, width = image.shape[0] // holder.shape[0], image.shape[1] // holder.shape[1]
  ids = np.kron(holder, np.ones((height, width), int))
  out, merged = image.copy(), np.zeros(ids.shape, bool)
  out[ids == DROPPED] = 1
  for token in np.unique(holder[holder != DROPPED]):
    if (holder == token).sum() > 1:
      merged |= ids == token
      out[ids == token] = image[ids == token].mean(axis=0)
  out[1:][(ids[1:] != ids[:-1]) & (merged[1:] | merged[:-1])] = OUTLINE
  out[:, 1:][(ids[:, 1:] != ids[:, :-1]) & (merged[:, 1:] | merged[:, :-1])] = OUTLINE
  return out


def write_row(panels, path, columns: int = 4, fontsize: int = 9, **options):
  """Writes (title, (H, W, 3) or (H, W)) panels in rows. options: of matplotlib's savefig."""
  plt, columns = pyplot(), min(len(panels), columns)
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.3 * rows), squeeze=False)
  for axis in axes.flat:
    axis.set_axis_off()
  for axis, (title, picture) in zip(axes.flat, panels, strict=False):
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=fontsize)
  figure.tight_layout()
  figure.savefig(path, **{"dpi": 150, **options})
  plt.close(figure)


def load(checkpoint, plan: str | None = None):
  """(model, variables) of one of our files.

  plan: JSON or a path to it; its tokens axis replaces the model's. Only for reducers without
    parameters (EViT, ToMe, MCTF).
  """
  model, variables = convert.load(checkpoint)
  if plan is None:
    return model, variables
  tokens = vc.Plan.parse(plan).tokens
  for reducer in (tokens, model.plan.tokens):
    blocks = {*range(depth := len(model.sites())), *(getattr(reducer, "blocks", None) or ())}
    if reducer is not None and any(reducer.reduction(block, depth).predict for block in blocks):
      raise ValueError(f"--plan: {type(reducer).__name__}'s predictors are trained with the model; "
                       "draw a checkpoint that has them, without --plan")
  model = model.clone(plan=dataclasses.replace(model.plan, tokens=tokens))
  model.check()
  return model, variables


def run(checkpoint, image, out, *, plan=None, force=False) -> str:
  """Writes `out`, and returns a line that says what was drawn."""
  out = pathlib.Path(out)
  if out.suffix != ".png":
    raise ValueError(f"--out={out}: must end in .png")
  if out.exists() and not force:
    raise ValueError(f"{out} exists; give another name or --force")
  model, variables = load(checkpoint, plan)
  preprocess = vc.preprocess(checkpoint)
  normalised = preprocess(image)
  drawn = stages(model, variables, normalised)
  plain = preprocess.pixels(normalised)
  panels = [(title, coloured_by_token(plain, holder)) for title, holder in drawn]
  write_row([("image", plain), *panels], out)
  return f"{out}: " + "; ".join(title for title, _ in drawn)
