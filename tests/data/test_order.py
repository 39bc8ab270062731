"""The training order matches the published samplers, whatever the hardware."""
import importlib
import pathlib

import ml_collections
import numpy as np
import pytest

from vitcompact.data import order, pipeline
from vitcompact.data.order import Order


def epoch_of(line, epoch=0):
  """Returns the sampler positions of one epoch, as (replica, k) over all its steps."""
  share = line.batch_size // line.replicas
  batches = []
  for step in range(epoch * line.steps_per_epoch, (epoch + 1) * line.steps_per_epoch):
    places = [line.position(step, slot) for slot in range(line.batch_size)]
    assert {e for e, _ in places} == {epoch}
    batches.append(np.reshape([p for _, p in places], (line.replicas, share)))
  return np.concatenate(batches, axis=1)


# The published sampler, unshuffled, for 612 images repeated three times.
@pytest.mark.parametrize(("replicas", "per_replica", "start"), [
    (4, 128, [0, 1, 2, 4, 5, 6]), (8, 64, [0, 2, 5, 8, 10, 13]), (2, 256, [0, 0, 1, 2, 2, 3])])
def test_repeated_augmentation_deals_out_the_published_positions(replicas, per_replica, start):
  line = Order(count=612, batch_size=32, replicas=replicas, repeats=3, seed=0)
  positions = epoch_of(line)
  assert positions.shape == (replicas, per_replica)
  assert (positions[0] // 3)[:6].tolist() == start
  assert sorted(positions.flat) == list(range(512))  # first 512 entries of the repeated line
  images = positions // 3
  assert len(np.unique(images)) == 171
  if replicas >= 3:
    assert all(len(np.unique(row)) == per_replica for row in images)
  np.testing.assert_array_equal(positions, epoch_of(line, epoch=7))


@pytest.mark.parametrize(("count", "batch_size", "replicas", "repeats", "steps"), [
    (1_281_167, 1024, 4, 3, 1251), (1_281_167, 1024, 8, 3, 1251), (1_281_167, 1024, 16, 3, 1251),
    (50_000, 768, 4, 3, 65), (1_281_167, 2048, 8, 1, 625), (1_281_167, 1344, 8, 1, 953)])
def test_epoch_has_the_published_number_of_steps(count, batch_size, replicas, repeats, steps):
  assert Order(count, batch_size, replicas, repeats, seed=0).steps_per_epoch == steps


ROOT = pathlib.Path(__file__).parents[2]
TRAIN_IMAGES = {"folder:imagenet": 1_281_167, "tfds:cifar10": 45_000, "tfds:cifar10@all": 50_000}
COUNTED = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))
           if "STEPS_PER_EPOCH = " in path.read_text()]


@pytest.mark.parametrize("name", COUNTED)
def test_configs_count_epochs_as_the_sampler_does(name):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config()
  data = config.data
  line = Order(TRAIN_IMAGES[data.name], config.batch_size, data.replicas, data.repeats, seed=0)
  assert line.steps_per_epoch == module.STEPS_PER_EPOCH
  assert config.batch_size % (2 * data.replicas) == 0  # otherwise nothing could be mixed


def test_steps_per_epoch_reads_a_config():
  data = ml_collections.ConfigDict({"name": "shapes:1000", "replicas": 2, "repeats": 3})
  assert pipeline.steps_per_epoch(data, 64) == 768 // 64


def test_without_repeats_replicas_share_each_epoch_and_drop_its_tail():
  line = Order(count=103, batch_size=12, replicas=3, repeats=1, seed=0)
  positions = epoch_of(line)
  assert sorted(positions.flat) == list(range(96))
  assert positions[1].tolist() == list(range(1, 96, 3))


def test_single_replica_without_repeats_skips_no_image_and_has_no_gap():
  line = Order(count=103, batch_size=12, replicas=1, repeats=1, seed=0)
  places = [line.place(step, slot) for step in range(20) for slot in range(12)]
  for epoch in (0, 1):
    part = places[103 * epoch:103 * (epoch + 1)]
    assert {p.epoch for p in part} == {epoch}
    assert sorted(p.index for p in part) == list(range(103))


def test_published_order_depends_on_the_epoch_and_plain_shuffle_also_on_the_seed():
  def indices(seed, epoch, repeats):
    line = Order(count=600, batch_size=50, replicas=1, repeats=repeats, seed=seed)
    steps = 12 if repeats == 1 else line.steps_per_epoch
    return [line.place(step, slot).index for step in range(epoch * steps, (epoch + 1) * steps)
            for slot in range(50)]
  assert indices(0, 2, 3) == indices(1, 2, 3) != indices(0, 1, 3)
  assert indices(0, 2, 1) != indices(1, 2, 1) and indices(0, 2, 1) != indices(0, 1, 1)


def test_each_repetition_of_an_image_has_its_own_random_numbers():
  line = Order(count=600, batch_size=50, replicas=1, repeats=3, seed=3)
  place = order.Place(epoch=1, index=5, copy=0)
  others = [place, place._replace(epoch=2), place._replace(index=6), place._replace(copy=1)]
  draws = [line.generator(p).random() for p in others]
  draws += [Order(600, 50, 1, 3, seed=4).generator(place).random()]
  assert len(set(draws)) == 5
  assert line.generator(place).random() == draws[0]
