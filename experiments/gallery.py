"""Draws what the methods do to real images, and writes docs/gallery.md.

  python -m experiments.gallery             # everything, into docs/; a few minutes on one core
  python -m experiments.gallery --only pairs --only merging
  python -m experiments.gallery page        # rewrites docs/gallery.md from results/gallery.json

The garments are test images of Fashion-MNIST, and the network is the dense one in results/.
DynamicViT and FastPath need trained predictors: they are trained from it for --steps steps. The
photographs are the two of scikit-learn. There are no weights trained on photographs here: they are
shown to the garments' network, enlarged, or to random weights if nothing learned is to be seen. The
captions, in gallery.md beside this file, say which; their numbers are in results/gallery.json.
"""
import argparse
import functools
import json
import pathlib
import tempfile
import textwrap
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import vitcompact as vc
from configs import fashion_mnist
from vitcompact import hub
from vitcompact.data import pipeline
from vitcompact.draw import attention, tokens
from vitcompact.run import loop

ROOT = pathlib.Path(__file__).parent.parent
WEIGHTS, DATA = ROOT / "results/fashion_mnist_dense.safetensors", "fashion_mnist"
RESULTS, PAGE = ROOT / "results/gallery.json", ROOT / "docs/gallery.md"
PICTURES, CAPTIONS = ROOT / "docs/pictures", ROOT / "experiments/gallery.md"
GARMENTS = ("T-shirt/top", "Dress", "Sneaker", "Bag")
CALIBRATION = 512       # training images for compact
CROPS = 16              # crops of the photographs for compact
COUNTED = 256           # test images from which the numbers in captions are computed
BRIGHT = 0.1            # a patch with a larger mean (of 1) counts as garment
STAGES = (1, 3, 4)      # blocks of six that reduce; in the papers at each quarter of the depth
PHOTOGRAPHS = 84        # pixels of photographs for the garments' network: 21 x 21 patches
RANDOM = "deit_tiny_patch16_224"
DPI, FONT, QUALITY = 55, 14, 80


class Scene(NamedTuple):
  """A network and its images. images: {name: normalised image}; calibration: images for compact."""
  model: Any
  variables: Any
  prepare: Any
  images: dict[str, np.ndarray]
  calibration: np.ndarray | None = None

  def pixels(self, name: str) -> np.ndarray:
    """Returns the image for display, in [0, 1]."""
    return attention.enlarge(self.prepare.pixels(self.images[name]), self.model.grid)


class Picture(NamedTuple):
  """Panels (title, picture) in rows of `columns`, and numbers for the caption."""
  panels: list[tuple[str, np.ndarray]]
  columns: int
  numbers: dict[str, float]


def garments(weights=WEIGHTS, data=DATA, names=GARMENTS) -> Scene:
  """Returns a scene with the first test image of each of these classes."""
  model, variables = vc.load(weights)
  prepare = vc.preprocess(weights)
  test = pipeline.source(data, "test", image_size=model.image_size)
  first = {}
  for example in map(test.__getitem__, range(len(test))):
    first.setdefault(test.class_names[example["label"]], example["image"])
    if set(names) <= first.keys():
      break
  train = pipeline.source(data, "train", image_size=model.image_size)
  return Scene(model, variables, prepare, {name: prepare(first[name]) for name in names},
               np.stack([prepare(train[i]["image"]) for i in range(min(CALIBRATION, len(train)))]))


def counted_images(scene: Scene, data=DATA) -> np.ndarray:
  test = pipeline.source(data, "test", image_size=scene.model.image_size)
  return np.stack([scene.prepare(test[i]["image"]) for i in range(min(COUNTED, len(test)))])


def photographs() -> dict[str, Image.Image]:
  from sklearn.datasets import load_sample_images

  return {name: Image.fromarray(image) for name, image in
          zip(("temple", "flower"), load_sample_images().images, strict=True)}


def enlarged_scene(weights=WEIGHTS, size=PHOTOGRAPHS, crops=CROPS) -> Scene:
  """Returns the garments' network with the photographs, and crops of them for calibration."""
  found, rng = hub.fetch(weights, image_size=size), np.random.default_rng(0)
  pictures, calibration = photographs(), []
  for i in range(crops):
    picture, side = list(pictures.values())[i % 2], int(rng.integers(200, 420))
    left, top = (int(rng.integers(0, length - side)) for length in picture.size)
    calibration.append(found.preprocess(picture.crop((left, top, left + side, top + side))))
  return Scene(found.model, found.variables, found.preprocess,
               {name: found.preprocess(image) for name, image in pictures.items()},
               np.stack(calibration))


def enlarge(scene: Scene) -> Scene:
  """Returns the same for a network that was compacted on garments."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "small.safetensors"
    vc.save(path, scene.model, scene.variables)
    return enlarged_scene(path)


def random_scene(seed: int, name=RANDOM, **fields) -> Scene:
  model = vc.create_model(name, **fields)
  shape = (1, *np.broadcast_to(model.image_size, 2), model.in_chans)
  prepare = vc.preprocess(model)
  return Scene(model, jax.jit(model.init)(jax.random.key(seed), np.zeros(shape, np.float32)),
               prepare, {name: prepare(image) for name, image in photographs().items()})


def compacted(scene: Scene, plan: vc.Plan) -> Scene:
  """Returns the scene with its network compacted, fitted to the calibration images if any."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")       # about too few images
    small, variables = vc.compact(scene.model, scene.variables, plan, images=scene.calibration)
  return scene._replace(model=small, variables=variables)


def maps_of(scene: Scene, images) -> dict[int, np.ndarray]:
  """Returns {block: attention maps (B, heads, N, N)}."""
  found = jax.jit(lambda v, x: vc.features(scene.model, v, x, maps=True).maps)(
      scene.variables, np.asarray(images))
  return {int(name.removeprefix("blocks_")): np.asarray(map_bhnm) for name, map_bhnm in
          found.items()}


def heat(values, share: float = 1.0) -> np.ndarray:
  """Maps values (h, w) to colours; values above the quantile `share` all get the brightest."""
  import matplotlib

  most = np.quantile(values, share)
  return matplotlib.colormaps["viridis"](np.clip(values / most, 0, 1))[..., :3]


def on_garment(scene: Scene, images) -> np.ndarray:
  """Returns (B, patches) bool: which patches show more than the black background."""
  grid, pixels = scene.model.grid, np.stack([scene.prepare.pixels(image) for image in images])
  (height, width), batch = pixels.shape[1:3], len(pixels)
  means = pixels.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], -1)
  return means.mean(axis=(2, 4, 5)).reshape(batch, -1) > BRIGHT


# The pictures


def class_token(scene: Scene, images=None, share: float = 1.0) -> Picture:
  """Draws where the class token looks. images: those for the numbers. share: see `heat`."""
  prefix, grid = scene.model.sites()[0].prefix, scene.model.grid
  maps = maps_of(scene, list(scene.images.values()))
  panels = []
  for row, name in enumerate(scene.images):
    panels += [(name, scene.pixels(name))]
    panels += [(f"block {block}", heat(map_bhnm[row, :, 0, prefix:].mean(axis=0).reshape(grid),
                                       share)) for block, map_bhnm in maps.items()]
  numbers = {}
  if images is None:
    return Picture(panels, 1 + len(maps), numbers)
  mask = on_garment(scene, images)
  for block, map_bhnm in maps_of(scene, images).items():
    weight_bp = map_bhnm[:, :, 0, prefix:].mean(axis=1)
    share = (weight_bp * mask).sum() / weight_bp.sum()
    numbers[f"on_garment_{block}"] = float(share / mask.mean())
    centred = weight_bp - weight_bp.mean(axis=1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    correlation = unit @ unit.T
    numbers[f"alike_{block}"] = float(correlation[~np.eye(len(unit), dtype=bool)].mean())
  return Picture(panels, 1 + len(maps), numbers)


def hallucinated(small: Scene, name: str, block: int, query=None) -> Picture:
  """Draws computed maps and, below them, the maps hallucinated from them: all queries, or one query
  (row, column) laid out on the grid. small: a scene compacted with hMHSA."""
  site = small.model.sites()[block]
  real = small.model.plan.heads.scored_heads(site)
  map_hnm, = maps_of(small, [small.images[name]])[block]
  panels, likeness = [], []
  for head in range(real, len(map_hnm)):
    source = (head - real) % real
    both = [map_hnm[i][site.prefix:, site.prefix:] for i in (source, head)]
    drawn_maps = both if query is None else [
        map_nm[query[0] * small.model.grid[1] + query[1]].reshape(small.model.grid)
        for map_nm in both]
    # Square roots make small entries visible; filters may give negative ones, shown as 0.
    panels += [(f"head {source}, computed", heat(np.sqrt(drawn_maps[0]))),
               (f"head {head}, hallucinated", heat(np.sqrt(np.maximum(drawn_maps[1], 0))))]
    likeness.append(np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1])
  order = [*range(0, len(panels), 2), *range(1, len(panels), 2)]   # sources above their copies
  return Picture([panels[i] for i in order], len(order) // 2,
                 {"least_likeness": float(min(likeness)), "most_likeness": float(max(likeness))})


def pairs(scene: Scene, names, blocks, keep: float = 0.25) -> Picture:
  """Draws which patches a patch attends to under Sparsifiner by token, in the first head."""
  small = compacted(scene, vc.Plan(attention=vc.Sparsifiner(keep=keep)))
  row, column = (side // 2 for side in scene.model.grid)
  prefix, panels, held = scene.model.sites()[0].prefix, [], {}
  for name in names:
    found = attention.pairs_of(small.model, small.variables, small.images[name])
    panels += [(name, scene.pixels(name))]
    panels += [(f"block {block}, head 0", attention.highlight(
        scene.pixels(name), found[block][0, prefix + row * scene.model.grid[1] + column,
                                         prefix:].reshape(scene.model.grid), (row, column)))
               for block in blocks]
    for block, shares in attention.mass_kept(small.model, small.variables, small.images[name],
                                             keeps=(keep,)).items():
      held.setdefault(block, []).append(shares[0])
  numbers = {f"held_{block}": float(np.mean([mass for _, mass in held[block]])) for block in held}
  kept = [share for shares in held.values() for share, _ in shares]
  return Picture(panels, 1 + len(blocks), {**numbers, "kept": float(np.mean(kept))})


def granularities(scene: Scene, name: str, blocks, keep: float = 0.25) -> Picture:
  """Draws the same query under three methods of the attention axis."""
  side = scene.model.grid[0] // 3
  plans = {"by token": vc.Sparsifiner(keep=keep),
           "by block": vc.Sparsifiner(
               keep=keep, granularity="block", window=side, min_tokens=0),
           "by region": vc.BiFormer(keep=keep, min_tokens=0)}
  (height, width), prefix = scene.model.grid, scene.model.sites()[0].prefix
  row, column, rows, numbers = height // 2, width // 2, [], {}
  for title, method in plans.items():
    small = compacted(scene, vc.Plan(attention=method))
    found = attention.pairs_of(small.model, small.variables, small.images[name])
    rows += [[(f"{title}; block {block}", attention.highlight(
        scene.pixels(name), found[block][0, prefix + row * width + column, prefix:].reshape(
            height, width), (row, column))) for block in blocks]]
    kept = [found[block][:, prefix:, prefix:].mean() for block in found]
    numbers[f"kept_{type(method).__name__}_{getattr(method, 'granularity', 'region')}"] = float(
        np.mean(kept))
  return Picture([panel for line in zip(*rows, strict=True) for panel in line], len(plans), numbers)


def survivors(scene: Scene, name: str, trained) -> Picture:
  """Draws a row for each reducer. trained: {title: (model, variables, accuracy)} of those with
  predictors."""
  plain = {"EViT": vc.EViT(keep=0.7, blocks=STAGES), "ToMe": vc.ToMe(r=6),
           "MCTF": vc.MCTF(r=7)}
  networks = {title: (scene.model.clone(plan=vc.Plan(tokens=reducer)), scene.variables)
              for title, reducer in plain.items()}
  networks |= {title: found[:2] for title, found in trained.items()}
  panels, mask, numbers = [], on_garment(scene, [scene.images[name]])[0], {}
  for title, (model, variables) in networks.items():
    found = tokens.stages(model, variables, scene.images[name])
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, 3).round().astype(int)]
    panels += [(title, scene.pixels(name))]
    panels += [(stage, tokens.coloured_by_token(scene.pixels(name), holder))
               for stage, holder in chosen]
    left = chosen[-1][1].ravel() != tokens.DROPPED
    if not left.all():
      numbers[title] = float(mask[left].mean() / mask.mean())
  numbers |= {f"{title}_accuracy": found[2] for title, found in trained.items()}
  return Picture(panels, 4, numbers)


def merging(scenes) -> Picture:
  """Draws the merged patches of photographs after the last block."""
  panels = []
  for title, scene in scenes.items():
    for name, image in scene.images.items():
      stage, holder = tokens.stages(scene.model, scene.variables, image)[-1]
      panels += [(f"{title}, {stage}", tokens.coloured_by_token(scene.pixels(name), holder))]
  return Picture(panels, 4, {})


def untrained(scenes) -> Picture:
  """Draws what EViT keeps with untrained weights."""
  panels = []
  for seed, scene in scenes.items():
    for name, image in scene.images.items():
      stage, holder = tokens.stages(scene.model, scene.variables, image)[-1]
      panels += [(f"seed {seed}, {stage}", tokens.coloured_by_token(scene.pixels(name), holder))]
  return Picture(panels, 4, {})


def with_predictors(reducer, steps: int):
  """Returns (model, variables, test accuracy) of the garments' network after further training with
  a reducer's predictors."""
  config = fashion_mnist.get_config()
  config.init_from, config.total_steps, config.checkpoint_every = str(WEIGHTS), steps, steps
  config.optim.warmup_steps, config.optim.learning_rate = steps // 10, 5e-4
  config.plan = json.loads(vc.Plan(tokens=reducer).to_json())
  config.loss.kept_ratio = 2.0      # as in configs/dynamicvit_deit_s.py
  with tempfile.TemporaryDirectory() as folder:
    result = loop.train(config, folder)
  return result.model, jax.device_get(result.variables), float(result.metrics["test_accuracy"])


def drawings(steps: int):
  """Returns {name: function that draws}; scenes are built once, when a picture first needs them."""
  garment_scene, photo_scene = functools.cache(garments), functools.cache(enlarged_scene)
  halved = functools.cache(lambda: compacted(garment_scene(), vc.Plan(heads=vc.HMHSA())))
  return {
      "class_token": lambda: class_token(garment_scene(), counted_images(garment_scene())),
      "hallucinated": lambda: hallucinated(halved(), "Bag", 0),
      "pairs": lambda: pairs(garment_scene(), GARMENTS, (0, 1, 3, 5)),
      "survivors": lambda: survivors(garment_scene(), "Dress", {
          "DynamicViT": with_predictors(vc.DynamicViT(keep=0.7, blocks=STAGES), steps),
          "FastPath": with_predictors(vc.FastPath(keep=0.7, blocks=STAGES), steps)}),
      "photo_attention": lambda: class_token(photo_scene(), share=0.99),
      "photo_hallucinated": lambda: hallucinated(enlarge(halved()), "flower", 0, (10, 10)),
      "granularities": lambda: granularities(photo_scene(), "flower", (0, 3)),
      "merging": lambda: merging({
          "ToMe": random_scene(0, plan=vc.Plan(tokens=vc.ToMe(r=13))),
          "MCTF": random_scene(0, plan=vc.Plan(tokens=vc.MCTF(r=16)))}),
      "untrained": lambda: untrained({
          seed: random_scene(seed, plan=vc.Plan(tokens=vc.EViT())) for seed in (0, 1)}),
  }


# The page

def page(results: dict) -> str:
  """Returns docs/gallery.md: the captions of experiments/gallery.md with their numbers."""
  accuracy = json.loads(WEIGHTS.with_suffix(".json").read_text())["models"][0]["test_accuracy"]
  text = CAPTIONS.read_text().format(accuracy=accuracy, settings=results["settings"],
                                     **results["pictures"])
  return "\n\n".join(_wrapped(part) for part in text.rstrip("\n").split("\n\n")) + "\n"


def _wrapped(part: str) -> str:
  return part if part.startswith(("#", "!", "`" * 3)) else textwrap.fill(
      part, 100, break_long_words=False, break_on_hyphens=False)


def summed_up(numbers: dict) -> dict:
  """Returns the numbers with the minimum and maximum over blocks, for captions."""
  held = [value for key, value in numbers.items() if key.startswith("held_")]
  alike = [value for key, value in numbers.items() if key.startswith("alike_") and key[-1] != "2"]
  return {**numbers, **({"least_held": min(held), "most_held": max(held)} if held else {}),
          **({"alike_least": min(alike), "alike_most": max(alike)} if alike else {})}


def write(picture: Picture, path: pathlib.Path):
  tokens.write_row(picture.panels, path, columns=picture.columns, dpi=DPI, fontsize=FONT,
                   bbox_inches="tight", pil_kwargs={"quality": QUALITY})


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("what", nargs="?", choices=["page"])
  parser.add_argument("--only", action="append", help="a picture; may be repeated")
  parser.add_argument("--steps", type=int, default=400, help="training steps for predictors")
  options = parser.parse_args()
  pictures = drawings(options.steps)
  if unknown := set(options.only or ()) - pictures.keys():
    parser.error(f"no picture {unknown.pop()!r}; there are {', '.join(pictures)}")
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"pictures": {}}
  if not options.what:
    results |= {"command": "python -m experiments.gallery", "settings": {
        "calibration": CALIBRATION, "images": COUNTED, "crops": CROPS, "steps": options.steps}}
  for name in () if options.what else options.only or pictures:
    picture = pictures[name]()
    write(picture, PICTURES / f"gallery_{name}.webp")
    results["pictures"][name] = {key: round(value, 4) for key, value in
                                 summed_up(picture.numbers).items()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(name, flush=True)
  PAGE.write_text(page(results))


if __name__ == "__main__":
  main()
