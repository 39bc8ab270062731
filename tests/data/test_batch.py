"""Mixing and erasing on the device match the published definitions."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.data import batch


def test_normalise_matches_the_textbook_formula():
  images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  got = batch.normalise(images, mean, std)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, (images / 255 - mean) / std, atol=1e-5)


def test_smoothing_at_1000_classes_gives_09001_and_00001():
  y = np.asarray(batch.one_hot_smooth(jnp.array([3, 999]), 1000, 0.1))
  assert y.dtype == np.float32 and y.argmax(1).tolist() == [3, 999]
  np.testing.assert_allclose([y[0, 3], y[0, 4], y[1, 999]], [0.9001, 1e-4, 0.9001], rtol=1e-5)
  np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(("lam", "centre", "box", "kept"), [
    (0.5, (112, 112), (33, 191, 33, 191), 0.502471),
    (0.5, (0, 0), (0, 79, 0, 79), 0.875618),
    (0.3, (223, 10), (130, 224, 0, 103), 0.807039),
    (0.99999, (112, 112), (112, 112, 112, 112), 1.0),
])
def test_cutmix_boxes_match_the_published_ones(lam, centre, box, kept):
  got = [int(edge) for edge in batch.cut_box(jnp.float32(lam), *centre, 224, 224)]
  assert tuple(got) == box
  assert 1 - float(batch.box_mask(*got, 224, 224).mean()) == pytest.approx(kept, abs=1e-6)


def constant_images(b, size=16):
  """Every pixel of image i is i, and its target is class i, so the output shows what was mixed."""
  images = jnp.broadcast_to(jnp.arange(b, dtype=jnp.float32)[:, None, None, None],
                            (b, size, size, 3))
  return images, jnp.eye(b)


GROUPS, BATCH = 8, 32


@pytest.fixture(scope="module")
def mixed_batches():
  """40 batches in 8 groups of 4: (keys, B, H, W, C) and (keys, B, K)."""
  images, targets = constant_images(BATCH)
  run = jax.jit(jax.vmap(lambda key: batch.mix(
      key, images, targets, mixup_alpha=0.8, cutmix_alpha=1.0, groups=GROUPS)))
  return tuple(np.asarray(x) for x in run(jax.random.split(jax.random.key(0), 40)))


def test_targets_equal_each_images_share_of_pixels(mixed_batches):
  images, targets = mixed_batches
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  size = BATCH // GROUPS
  for i in range(BATCH):
    start = i // size * size
    partner = 2 * start + size - 1 - i
    share = (images[:, i].mean((1, 2, 3)) - partner) / (i - partner)
    np.testing.assert_allclose(targets[:, i, i], share, atol=2e-5)
    np.testing.assert_allclose(targets[:, i, partner], 1 - share, atol=2e-5)


def test_draws_are_shared_within_a_group_and_differ_between_groups(mixed_batches):
  targets = mixed_batches[1]
  own = np.diagonal(targets, axis1=1, axis2=2).reshape(40, GROUPS, -1)
  np.testing.assert_allclose(own - own[..., :1], 0, atol=1e-6)
  assert own[:, :, 0].std(axis=1).min() > 0.05 and own[:, :, 0].std(axis=0).min() > 0.05


def test_cutmix_is_as_frequent_as_mixup(mixed_batches):
  """Only cutmix leaves some pixels of the image unchanged."""
  images, _ = mixed_batches
  first = images[:, ::BATCH // GROUPS]  # one image of each group
  own = np.arange(0, BATCH, BATCH // GROUPS).reshape(1, -1, 1, 1, 1)
  cut = np.isin(first - own, (0, BATCH // GROUPS - 1)).all(axis=(2, 3, 4)).mean()
  assert abs(cut - 0.5) < 3 * 0.5 / np.sqrt(40 * GROUPS)


def test_cutmix_keeps_0682_on_average_because_boxes_are_clipped():
  n, size = 200_000, 224
  lam_key, y_key, x_key = jax.random.split(jax.random.key(1), 3)
  top, bottom, left, right = batch.cut_box(
      jax.random.uniform(lam_key, (n,)), jax.random.randint(y_key, (n,), 0, size),
      jax.random.randint(x_key, (n,), 0, size), size, size)
  kept = 1 - (bottom - top) * (right - left) / size**2
  assert float(kept.mean()) == pytest.approx(0.682, abs=0.003)


def test_enabling_only_one_kind_of_mixing_never_applies_the_other():
  images, targets = constant_images(4)
  images /= 3  # scaled to 0..1: a value strictly between was blended from two images
  keys = jax.random.split(jax.random.key(2), 20)
  for alphas, blends in (({"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, True),
                         ({"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, False)):
    run = jax.jit(jax.vmap(lambda k, a=alphas: batch.mix(k, images, targets, **a)[0]))
    out = np.asarray(run(keys))[:, 0]
    assert bool(((out > 0) & (out < 1)).any()) == blends
  same = batch.mix(keys[0], images, targets, mixup_alpha=0.0, cutmix_alpha=0.0)
  assert same[0] is images and same[1] is targets


def test_middle_image_of_an_odd_group_has_no_partner():
  images, targets = constant_images(6)
  for groups in (2, 4):
    with pytest.raises(ValueError, match=rf"batch of 6 in groups={groups}"):
      batch.mix(jax.random.key(0), images, targets, mixup_alpha=0.8, cutmix_alpha=1.0,
                groups=groups)


def test_erasing_fills_a_quarter_of_the_images_with_unit_noise():
  n, size = 4000, 32
  images = jnp.full((n, size, size, 3), 100.0)
  out = np.asarray(jax.jit(batch.erase)(jax.random.key(3), images, 0.25))
  erased = out[..., 0] != 100
  fired = erased.any((1, 2))
  assert abs(fired.mean() - 0.25) < 3 * np.sqrt(0.25 * 0.75 / n)
  assert np.array_equal(erased, out[..., 2] != 100)  # all channels are erased together
  values = out[erased]
  assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
  rows, columns = erased.any(2).sum(1)[fired], erased.any(1).sum(1)[fired]
  log_aspect = np.log(rows / columns)  # uniform in +-ln(1 / 0.3) = +-1.204 up to rounding
  assert abs(log_aspect.mean()) < 0.1 and 1.1 < np.abs(log_aspect).max() < 1.4
  area = erased.sum((1, 2))[fired]
  np.testing.assert_array_equal(area, rows * columns)  # a single box
  assert rows.max() < size and columns.max() < size
  assert area.mean() / size**2 == pytest.approx(0.176, abs=0.01)
  touches = [erased[fired][:, 0].any(1), erased[fired][:, -1].any(1),
             erased[fired][:, :, 0].any(1), erased[fired][:, :, -1].any(1)]
  assert all(edge.any() for edge in touches)  # both ends are included


def test_erasing_with_probability_zero_and_one():
  images = jnp.zeros((64, 16, 16, 3))
  run = jax.jit(batch.erase)
  assert not run(jax.random.key(0), images, 0.0).any()
  assert run(jax.random.key(0), images, 1.0).any((1, 2, 3)).all()


@pytest.mark.parametrize(("count", "groups"), [(1, 8), (2, 8), (4, 8), (8, 8), (4, 1)])
def test_microbatches_consist_of_whole_groups(count, groups):
  """Otherwise images of several replicas would mix. With fewer groups, images are dealt out."""
  parts = batch.microbatches({"x": np.arange(32), "y": np.zeros((32, 3))}, count, groups)
  x = np.asarray(parts["x"])
  assert x.shape == (count, 32 // count) and parts["y"].shape == (count, 32 // count, 3)
  assert sorted(x.flat) == list(range(32))
  if groups % count == 0:
    size = 32 // groups
    runs = x.reshape(-1, size)
    assert (runs == runs[:, :1] + np.arange(size)).all()
    dealt = np.arange(groups).reshape(-1, count).T  # so that each image stays on its device
    np.testing.assert_array_equal(runs[:, 0].reshape(count, -1), dealt * size)
