"""Scenes: the label follows from the description, needs both objects, and leaks nowhere else."""
import collections

import ml_collections
import numpy as np
import pytest

from vitcompact.data import pipeline, shapes


def label_of(things):
  """Recomputes the label from the positions and colours of the drawn ring and cross."""
  ring, cross = ({t.kind: t for t in things}[kind] for kind in ("ring", "cross"))
  dx, dy = np.subtract(cross.centre, ring.centre)
  if abs(dx) > abs(dy):
    direction = "right" if dx > 0 else "left"
  else:
    direction = "below" if dy > 0 else "above"
  same = "same" if ring.colour == cross.colour else "different"
  return shapes.Shapes.class_names.index(f"{direction}-{same}")


@pytest.fixture(scope="module")
def train():
  return pipeline.source("shapes:4800", "train", image_size=16)


@pytest.fixture(scope="module")
def scenes(train):
  return [train.describe(i) for i in range(len(train))]


def test_label_follows_from_the_description(train, scenes):
  assert [label_of(things) for things in scenes] == [i % 8 for i in range(len(train))]
  assert [train[i]["label"] for i in range(20)] == [i % 8 for i in range(20)]


def test_image_shows_the_description():
  train = pipeline.source("shapes", "train", image_size=192)
  for i in range(40):
    image = train[i]["image"].astype(int)
    for thing in train.describe(i):
      x, y = (round(48 * c) for c in thing.centre)
      if thing.kind == "ring":  # hollow: check its stroke
        x -= round(48 * 0.77 * thing.radius)
      assert np.abs(image[y, x] - shapes.COLOURS[thing.colour]).max() < 40, (i, thing)


def test_scene_has_five_objects_in_five_cells_with_one_pair_of_equal_colour(scenes):
  for things in scenes:
    assert {t.kind for t in things} == {"ring", "cross", "disc", "square", "triangle"}
    assert len({t.cell for t in things}) == 5
    assert sorted(collections.Counter(t.colour for t in things).values()) == [1, 1, 1, 2]
    for t in things:
      assert tuple(int(c) for c in t.centre) == t.cell
      assert np.abs(np.subtract(t.centre, t.cell) - 0.5).max() + t.radius <= 0.47 + 1e-9


def test_all_kinds_cover_the_same_area():
  """Otherwise the average colour of a region would distinguish a ring from a cross."""
  rng, areas = np.random.default_rng(0), collections.defaultdict(list)
  for _ in range(100):
    for thing in shapes.scene(0, rng):
      image = shapes.render([thing._replace(colour=3)], (0, 0, 0), (48, 48))
      areas[thing.kind].append(image[..., 0].sum() / 240 / (12 * thing.radius) ** 2)
  mean = np.array([np.mean(area) for area in areas.values()])
  assert np.abs(mean / mean.mean() - 1).max() < 0.03, dict(zip(areas, mean, strict=True))


def test_no_window_of_a_quarter_of_the_side_contains_ring_and_cross(scenes):
  for ring, cross, *_ in scenes:
    gap = np.abs(np.subtract(ring.centre, cross.centre)) - ring.radius - cross.radius
    assert gap.max() > 1  # in cells, four per side


def test_single_object_leaves_two_directions_and_no_information_on_colour(scenes):
  """So the best guess from only the ring, or only the cross, is right in 1/4 of all scenes."""
  for which in (0, 1):
    table = np.zeros((16, 4))
    colour = np.zeros((6, 2))
    for label, things in enumerate(scenes):
      x, y = things[which].cell
      table[4 * y + x, label % 8 // 2] += 1
      colour[things[which].colour, label % 2] += 1
    expected = len(scenes) / 32  # each cell occurs with two of the four directions
    assert ((table > 0).sum(1) == 2).all()
    assert np.abs(table[table > 0] - expected).max() < 4.5 * np.sqrt(expected)
    assert np.abs(colour - len(scenes) / 12).max() < 4 * np.sqrt(len(scenes) / 12)


def probe(features, labels):
  """Test accuracy of a least-squares fit to one-hot labels on the first 3/4."""
  features = np.concatenate([features, np.ones((len(features), 1))], 1)
  n = len(labels) * 3 // 4
  weights = np.linalg.lstsq(features[:n], np.eye(8)[labels[:n]], rcond=None)[0]
  return np.mean((features[n:] @ weights).argmax(1) == labels[n:]), len(labels) - n


def test_linear_probes_on_colours_and_quadrants_are_at_chance(train):
  images = np.stack([train[i]["image"] for i in range(len(train))]) / 255.0
  labels = np.arange(len(train)) % 8
  quadrants = images.reshape(-1, 2, 8, 2, 8, 3)
  statistics = {
      "mean and spread of colour": np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1),
      "means of the quadrants": quadrants.mean((2, 4)).reshape(len(images), -1),
      "all of one quadrant": images[:, :8, :8].reshape(len(images), -1)}
  for name, features in statistics.items():
    accuracy, n = probe(features, labels)
    limit = 1 / 8 + 3 * np.sqrt(1 / 8 * 7 / 8 / n)
    if name == "all of one quadrant":  # half of the scenes have ring or cross there: 1/4, not 1/8
      limit += 1 / 16
    assert accuracy < limit, (name, accuracy)


def test_scenes_are_equal_at_any_size_and_differ_between_splits_and_seeds():
  def first(split="train", size=16, seed=0):
    return pipeline.source("shapes", split, image_size=size, seed=seed)
  assert first().describe(5) == first(size=(32, 48)).describe(5)
  assert first(size=(32, 48))[5]["image"].shape == (32, 48, 3)
  np.testing.assert_array_equal(first()[5]["image"], first()[5]["image"])
  others = [first(split="val"), first(split="test"), first(seed=1)]
  assert len({str(s.describe(5)) for s in [first(), *others]}) == 4
  images = {split: {first(split)[i]["image"].tobytes() for i in range(300)}
            for split in pipeline.SPLITS}
  assert all(len(images[split]) == 300 for split in pipeline.SPLITS)
  assert len(set.union(*images.values())) == 900


def test_shapes_arrive_in_batches():
  data = ml_collections.ConfigDict({
      "name": "shapes:64", "augment": "none", "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0})
  assert pipeline.num_classes("shapes:64") == 8
  assert [pipeline.num_examples("shapes:64", s) for s in pipeline.SPLITS] == [64, 1000, 2000]
  batch = next(pipeline.train_batches(data, image_size=16, batch_size=64, seed=0))
  assert np.bincount(batch["label"]).tolist() == [8] * 8  # one epoch has every scene once


def test_directions_data_set_has_the_same_scenes_with_colours_set_by_direction():
  scenes, directions = (kind("train", (48, 48), 16, 3)
                        for kind in (shapes.Shapes, shapes.Directions))
  for i in range(16):
    assert scenes.class_names[scenes[i]["label"]].startswith(
        directions.class_names[directions[i]["label"]])
    ones, others = scenes.describe(i), directions.describe(i)
    assert [thing._replace(colour=0) for thing in ones] == \
        [thing._replace(colour=0) for thing in others]
    assert [(thing.kind, thing.colour) for thing in others[:2]] == [("ring", 0), ("cross", 1)]
    assert not {0, 1} & {thing.colour for thing in others[2:]}
  assert np.bincount([directions[i]["label"] for i in range(16)]).tolist() == [4] * 4
