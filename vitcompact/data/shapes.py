"""Scenes whose label needs two distant objects: drawn, of any size, as many as asked for.

A scene is a dark ground with five objects in a 4 x 4 grid of cells: a ring, a cross, and three of
a disc, a square and a triangle. The label says where the cross lies as seen from the ring (right,
below, left, above) and whether the two have the same colour: 8 classes, all equally frequent.

Ring and cross are two cells apart, so no square window of a quarter of the side sees both. Each
cell holds the ring, and the cross, equally often in all classes; all kinds of objects cover the
same area; and in every scene exactly two of the five share a colour. So coarse statistics and
counts say nothing. One object alone says nothing of the colours, and of the directions only that
two are left: at best it is right in 1/4 of all scenes, where guessing is right in 1/8.
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


class Thing(NamedTuple):
  """An object: its cell (column, row); centre and radius in units of a cell."""
  kind: str
  cell: tuple[int, int]
  centre: tuple[float, float]
  radius: float
  colour: int


def place_keys(direction: int, rng: np.random.Generator) -> tuple[tuple, tuple]:
  """Cells of ring and cross, each uniform on the half of the grid that the direction leaves it."""
  along, across = rng.integers(GRID // 2), rng.integers(GRID)
  # A step sideways that stops at the border keeps the other object uniform too.
  sideways = np.clip(across + rng.integers(-1, 2), 0, GRID - 1)
  near, far = (int(along), int(across)), (int(along) + GRID // 2, int(sideways))
  if DIRECTIONS[direction] in ("left", "above"):
    near, far = far, near
  if DIRECTIONS[direction] in ("below", "above"):
    near, far = near[::-1], far[::-1]
  return near, far


def scene(label: int, rng: np.random.Generator) -> list[Thing]:
  """The five objects of a scene with this label, ring and cross first."""
  direction, same = divmod(label, 2)
  ring, cross = place_keys(direction, rng)
  free = [(x, y) for x in range(GRID) for y in range(GRID) if (x, y) not in (ring, cross)]
  cells = [ring, cross, *(free[i] for i in rng.permutation(len(free))[:3])]
  a, b, c, d = (int(colour) for colour in rng.permutation(len(COLOURS))[:4])
  colours = [a, a, b, c, d] if same else [a, b, (a, b)[rng.integers(2)], c, d]
  kinds = ("ring", "cross", *rng.permutation(("disc", "square", "triangle")))
  things = []
  for kind, cell, colour in zip(kinds, cells, colours, strict=True):
    radius = rng.uniform(0.34, 0.42)
    x, y = np.add(cell, 0.5) + rng.uniform(-1, 1, size=2) * (0.47 - radius)
    things.append(Thing(str(kind), cell, (float(x), float(y)), float(radius), colour))
  return things


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, cell: tuple[float, float]) -> None:
  """cell: the width and height of a cell in pixels. All kinds cover about 2.2 radius^2."""
  colour = COLOURS[thing.colour]
  x, y = np.multiply(thing.centre, cell)
  w, h = np.multiply(thing.radius, cell)

  def box(dx, dy):  # PIL's boxes include their last pixel
    return x - dx * w, y - dy * h, x + dx * w - 1, y + dy * h - 1

  if thing.kind == "ring":
    draw.ellipse(box(1, 1), outline=colour, width=round(0.45 * min(w, h)))
  elif thing.kind == "cross":
    draw.rectangle(box(1, 0.33), fill=colour)
    draw.rectangle(box(0.33, 1), fill=colour)
  elif thing.kind == "disc":
    draw.ellipse(box(0.84, 0.84), fill=colour)
  elif thing.kind == "square":
    draw.rectangle(box(0.74, 0.74), fill=colour)
  else:
    left, top, right, bottom = box(1.04, 1.04)
    draw.polygon(((x, top), (right, bottom), (left, bottom)), fill=colour)


def render(things: list[Thing], ground: tuple, image_size: tuple[int, int]) -> np.ndarray:
  """uint8 (height, width, 3), drawn large and averaged, so that small sizes have true areas."""
  height, width = image_size
  factor = max(2, -(-128 // min(image_size)))
  image = Image.new("RGB", (factor * width, factor * height), ground)
  draw = ImageDraw.Draw(image)
  for thing in things:
    draw_thing(draw, thing, (factor * width / GRID, factor * height / GRID))
  return np.asarray(image.reduce(factor))


class Shapes:
  """Random access to a split: shapes[i] -> {"image": uint8 (height, width, 3), "label": i % 8}.

  A scene depends on (seed, split, index) alone and is drawn anew whenever asked for. Splits are
  separate streams of random numbers; count, if given, is the number of training scenes.
  """
  class_names = tuple(f"{d}-{c}" for d in DIRECTIONS for c in ("different", "same"))
  num_classes = len(class_names)

  def __init__(self, split: str, image_size: tuple[int, int], count: int, seed: int):
    self.split, self.image_size, self.count, self.seed = split, image_size, count, seed

  def __len__(self) -> int:
    return self.count

  def _generator(self, index: int) -> np.random.Generator:
    return np.random.default_rng((self.seed, list(SIZES).index(self.split), index))

  def describe(self, index: int) -> list[Thing]:
    """The objects of scene `index`, from which the label can be worked out again."""
    return scene(index % self.num_classes, self._generator(index))

  def open(self, index: int) -> Example:
    rng = self._generator(index)
    label = int(index) % self.num_classes
    things = scene(label, rng)
    ground = tuple(int(v) for v in rng.integers(0, 50, size=3))
    return Example(Image.fromarray(render(things, ground, self.image_size)), label)

  def __getitem__(self, index: int) -> dict:
    return as_arrays(self.open(index))


class Directions(Shapes):
  """The same scenes, labelled by where the cross lies alone, whatever the colours: 4 classes.

  A small model learns these in a tenth of the steps that the comparison of colours takes.
  """
  class_names = DIRECTIONS
  num_classes = len(class_names)

  def describe(self, index: int) -> list[Thing]:
    return scene(index % Shapes.num_classes, self._generator(index))

  def open(self, index: int) -> Example:
    whole = Shapes(self.split, self.image_size, self.count, self.seed).open(index)
    return Example(whole.image, whole.label // 2)
