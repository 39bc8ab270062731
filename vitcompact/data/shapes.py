"""Generated scenes whose label depends on two distant objects, of any size and number.

A scene has a dark background and five objects in a 4 x 4 grid of cells: a ring, a cross, a disc, a
square and a triangle. The label says where the cross is as seen from the ring (right, below, left,
above) and whether the two have the same colour: 8 classes, all equally frequent.

Ring and cross are two cells apart, so no square window with a quarter of the side contains both.
In each class every cell contains the ring, and the cross, equally often; all kinds of objects cover
the same area; and in every scene exactly two of the five share a colour. Coarse statistics and
counts therefore carry no information about the label. A single object leaves the colours open and
two of the directions possible: from it alone, at most 1/4 of the scenes can be classified, against
1/8 by guessing.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vitcompact.data.decode import Example, as_arrays

DIRECTIONS = ("right", "below", "left", "above")
SIZES = {"train": 20_000, "val": 1_000, "test": 2_000}
GRID = 4
COLOURS = ((230, 60, 50), (70, 190, 80), (70, 110, 240), (240, 210, 60), (200, 80, 220),
           (70, 210, 220))


class SceneObject(NamedTuple):
  """An object: its cell (column, row); centre and radius in units of a cell."""
  kind: str
  cell: tuple[int, int]
  centre: tuple[float, float]
  radius: float
  colour: int


def ring_and_cross_cells(direction: int, rng: np.random.Generator) -> tuple[tuple, tuple]:
  """Cells of ring and cross, each uniform on the half of the grid that the direction allows."""
  along, across = rng.integers(GRID // 2), rng.integers(GRID)
  # A sideways step that is clipped at the border keeps the other object uniform too.
  sideways = np.clip(across + rng.integers(-1, 2), 0, GRID - 1)
  near, far = (int(along), int(across)), (int(along) + GRID // 2, int(sideways))
  if DIRECTIONS[direction] in ("left", "above"):
    near, far = far, near
  if DIRECTIONS[direction] in ("below", "above"):
    near, far = near[::-1], far[::-1]
  return near, far


def scene(label: int, rng: np.random.Generator) -> list[SceneObject]:
  """The five objects of a scene with this label, ring and cross first."""
  direction, same = divmod(label, 2)
  ring, cross = ring_and_cross_cells(direction, rng)
  free = [(x, y) for x in range(GRID) for y in range(GRID) if (x, y) not in (ring, cross)]
  cells = [ring, cross, *(free[i] for i in rng.permutation(len(free))[:3])]
  a, b, c, d = (int(colour) for colour in rng.permutation(len(COLOURS))[:4])
  colours = [a, a, b, c, d] if same else [a, b, (a, b)[rng.integers(2)], c, d]
  kinds = ("ring", "cross", *rng.permutation(("disc", "square", "triangle")))
  objects = []
  for kind, cell, colour in zip(kinds, cells, colours, strict=True):
    radius = rng.uniform(0.34, 0.42)
    x, y = np.add(cell, 0.5) + rng.uniform(-1, 1, size=2) * (0.47 - radius)
    objects.append(SceneObject(str(kind), cell, (float(x), float(y)), float(radius), colour))
  return objects


def draw_object(draw: ImageDraw.ImageDraw, obj: SceneObject, cell: tuple[float, float]) -> None:
  """Draws an object; cell: (width, height) in pixels. All kinds cover about 2.2 radius^2."""
  colour = COLOURS[obj.colour]
  x, y = np.multiply(obj.centre, cell)
  w, h = np.multiply(obj.radius, cell)

  def box(dx, dy):  # PIL's boxes include their last pixel
    return x - dx * w, y - dy * h, x + dx * w - 1, y + dy * h - 1

  if obj.kind == "ring":
    draw.ellipse(box(1, 1), outline=colour, width=round(0.45 * min(w, h)))
  elif obj.kind == "cross":
    draw.rectangle(box(1, 0.33), fill=colour)
    draw.rectangle(box(0.33, 1), fill=colour)
  elif obj.kind == "disc":
    draw.ellipse(box(0.84, 0.84), fill=colour)
  elif obj.kind == "square":
    draw.rectangle(box(0.74, 0.74), fill=colour)
  else:
    left, top, right, bottom = box(1.04, 1.04)
    draw.polygon(((x, top), (right, bottom), (left, bottom)), fill=colour)


def render(objects: list[SceneObject], background: tuple,
           image_size: tuple[int, int]) -> np.ndarray:
  """uint8 (height, width, 3), drawn larger and averaged, so that areas are exact at small sizes."""
  height, width = image_size
  factor = max(2, -(-128 // min(image_size)))
  image = Image.new("RGB", (factor * width, factor * height), background)
  draw = ImageDraw.Draw(image)
  for obj in objects:
    draw_object(draw, obj, (factor * width / GRID, factor * height / GRID))
  return np.asarray(image.reduce(factor))


class Shapes:
  """Random access to a split: shapes[i] -> {"image": uint8 (height, width, 3), "label": i % 8}.

  A scene depends only on (seed, split, index) and is generated on each access. Splits have separate
  streams of random numbers. count: the number of scenes in the split.
  """
  class_names = tuple(f"{d}-{c}" for d in DIRECTIONS for c in ("different", "same"))
  num_classes = len(class_names)

  def __init__(self, split: str, image_size: tuple[int, int], count: int, seed: int):
    self.split, self.image_size, self.count, self.seed = split, image_size, count, seed

  def __len__(self) -> int:
    return self.count

  def _generator(self, index: int) -> np.random.Generator:
    return np.random.default_rng((self.seed, list(SIZES).index(self.split), index))

  def describe(self, index: int) -> list[SceneObject]:
    """The objects of scene `index`, from which the label can be derived."""
    return scene(index % self.num_classes, self._generator(index))

  def open(self, index: int) -> Example:
    rng = self._generator(index)
    label = int(index) % self.num_classes
    objects = scene(label, rng)
    return Example(self._draw(objects, rng), label)

  def _draw(self, objects: list[SceneObject], rng: np.random.Generator) -> Image.Image:
    background = tuple(int(v) for v in rng.integers(0, 50, size=3))
    return Image.fromarray(render(objects, background, self.image_size))

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))


class Directions(Shapes):
  """The same scenes, labelled only by the direction from ring to cross: 4 classes.

  The ring always has the first colour and the cross the second. This makes the two easy to find,
  so that a small model learns to relate them in a fraction of the steps.
  """
  class_names = DIRECTIONS
  num_classes = len(class_names)

  def describe(self, index: int) -> list[SceneObject]:
    return self._scene(index, self._generator(index))

  def _scene(self, index: int, rng: np.random.Generator) -> list[SceneObject]:
    objects = scene(index % Shapes.num_classes, rng)
    others = 2 + rng.permutation(len(COLOURS) - 2)[:3]
    return [obj._replace(colour=int(colour)) for obj, colour in
            zip(objects, (0, 1, *others), strict=True)]

  def open(self, index: int) -> Example:
    rng = self._generator(index)
    return Example(self._draw(self._scene(index, rng), rng), index % Shapes.num_classes // 2)
