"""LV-ViT's label maps follow their image: flipped, shifted and cropped with it."""
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from vitcompact.data import batch, labels, pipeline, randaugment
from vitcompact.data.decode import Example

WIDTH, HEIGHT = 180, 90


def constant_map(logit, label=0):
  """A map with the same logit of the same class everywhere."""
  out = np.zeros(labels.SHAPE, np.float16)
  out[0], out[1] = logit, label
  return out


def map_of(colours):
  """The label map of an image: cell (i, j) has the image's colour there as its logit."""
  out = np.zeros(labels.SHAPE, np.float16)
  out[0, 0] = np.asarray(colours.resize((18, 18), Image.Resampling.NEAREST))[..., 0]
  return out


@pytest.fixture
def example():
  """Smooth, different everywhere, and brighter than the padding everywhere."""
  x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
  pixels = np.repeat((60 + 100 * x + 60 * y**2)[..., None], 3, -1).astype(np.uint8)
  image = Image.fromarray(pixels)
  return Example(image, 0, map_of(image))


@pytest.mark.parametrize(("name", "argument"), [
    ("rotate", 27), ("rotate", -30), ("shear_x", 0.27), ("shear_x", -0.3), ("shear_y", 0.27),
    ("translate_x", 0.405), ("translate_x", -0.405), ("translate_y", 0.45)])
def test_label_map_moves_with_its_image(example, name, argument, monkeypatch):
  monkeypatch.setattr(randaugment, "FILL", (0, 0, 0))
  moved = randaugment.apply(name, argument, example.image, Image.Resampling.NEAREST)
  got = labels.move_map(example.label_map, randaugment.OPS[name].matrix(argument, WIDTH, HEIGHT),
                        WIDTH, HEIGHT)
  assert got.dtype == np.float16 and got.shape == labels.SHAPE
  expected = map_of(moved)
  close = np.abs(got - expected)[0, 0] < 14  # colours within a cell differ by up to 12
  borders = (got[0, 0] == 0) != (expected[0, 0] == 0)
  assert close[~borders].mean() > 0.99 and borders.mean() < 0.05
  assert (np.abs(expected - example.label_map)[0, 0] >= 14).mean() > 0.05  # the map really moved


def test_label_box_matches_the_flips_and_crops_of_the_image(example):
  """The part of the map inside the box shows the colours of the augmented image."""
  for seed in range(60):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(randaugment, "draw", lambda _: [])
      fields = labels.augment_both(example, rng, (18, 18))
    left, top, right, bottom = fields["label_box"]
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    i, j = (np.floor((a + (np.arange(18) + 0.5) / 18 * (b - a)) * 18).astype(int)
            for a, b in ((top, bottom), (left, right)))
    shown = fields["label_map"][0, 0][np.ix_(i, j)]
    assert np.abs(shown - np.asarray(fields["image"])[..., 0]).max() < 16


def test_images_keep_their_full_size_until_the_crop(example, monkeypatch):
  sizes = []
  monkeypatch.setattr(randaugment, "draw", lambda _: [("shear_x", 9.0), ("invert", 9.0)])
  apply = randaugment.apply

  def apply_and_record(name, argument, image, resample):
    sizes.append((image.size, resample))
    return apply(name, argument, image, resample)

  monkeypatch.setattr(randaugment, "apply", apply_and_record)
  for seed in range(20):
    fields = labels.augment_both(example, np.random.default_rng(seed), (16, 16))
  assert fields["image"].size == (16, 16)
  assert {size for size, _ in sizes} == {(WIDTH, HEIGHT)}
  assert {resample for _, resample in sizes} == set(labels.RESAMPLE)


# On the device.

def reference_roi(cells_hw, window, bins):
  """RoIAlign of one window from its definition (unaligned, adaptive number of points), by loops."""
  h, w = cells_hw.shape
  x1, y1, x2, y2 = window
  roi_h, roi_w = max(y2 - y1, 1), max(x2 - x1, 1)
  out = np.zeros((bins, bins))

  def value(y, x):
    if y < -1 or y > h or x < -1 or x > w:
      return 0
    y, x = max(y, 0), max(x, 0)
    i, j = min(int(y), h - 1), min(int(x), w - 1)
    i2, j2 = min(i + 1, h - 1), min(j + 1, w - 1)
    fy, fx = (y - i if i < h - 1 else 0), (x - j if j < w - 1 else 0)
    return ((1 - fy) * (1 - fx) * cells_hw[i, j] + (1 - fy) * fx * cells_hw[i, j2] +
            fy * (1 - fx) * cells_hw[i2, j] + fy * fx * cells_hw[i2, j2])

  n_y, n_x = int(np.ceil(roi_h / bins)), int(np.ceil(roi_w / bins))
  for i in range(bins):
    for j in range(bins):
      out[i, j] = np.mean([value(y1 + (i + (a + 0.5) / n_y) * roi_h / bins,
                                 x1 + (j + (b + 0.5) / n_x) * roi_w / bins)
                           for a in range(n_y) for b in range(n_x)])
  return out


@pytest.mark.parametrize("bins", [1, 14])
def test_window_pooling_matches_the_definition_of_roi_align(bins):
  rng = np.random.default_rng(0)
  cells = rng.normal(size=(18, 18))
  corner = rng.uniform(0, 0.6, (12, 2))
  far = corner + rng.uniform(0.03, 0.4, (12, 2))
  boxes = np.concatenate([np.c_[corner, far], [[0, 0, 1, 1], [0.97, 0.97, 1, 1]]])
  for left, top, right, bottom in boxes * 18 - 0.5:
    rows, columns = (np.asarray(batch.roi_weights(jnp.float32(a), jnp.float32(b), 18, bins))
                     for a, b in ((top, bottom), (left, right)))
    np.testing.assert_allclose(rows @ cells @ columns.T,
                               reference_roi(cells, (left, top, right, bottom), bins), atol=1e-4)


K = 12
targets = jax.jit(lambda m, b: batch.label_targets(m, b, K, 0.1, (14, 14)))


def test_crop_of_the_left_half_has_only_the_labels_of_the_left_half():
  """The left half is class 3, the right half class 7. A transposed window would contain both."""
  label_map = np.zeros((3, *labels.SHAPE), np.float16)
  label_map[:, 0, 0] = 20
  label_map[:, 1, 0, :, :9], label_map[:, 1, 0, :, 9:] = 3, 7
  label_map[:, 1, 1:] = np.arange(8, 12)[:, None, None]  # classes with a logit of 0
  boxes = np.float32([[0, 0, 0.47, 1], [0, 0.5, 1, 1], [0.53, 0.2, 1, 0.4]])
  whole, places = (np.asarray(t) for t in targets(label_map, boxes))
  assert whole.shape == (3, K) and places.shape == (3, 196, K) and places.dtype == np.float32
  on, off = 1 - 0.1 + 0.1 / K, 0.1 / K
  np.testing.assert_allclose(places[0, :, 3], on + off, atol=1e-4)
  np.testing.assert_allclose(places[0, :, 7], off, atol=1e-4)
  np.testing.assert_allclose(whole[2, 7], on + off, atol=1e-4)
  grid = places[1].reshape(14, 14, K)
  np.testing.assert_allclose(grid[:, :6, 3], on + off, atol=1e-3)
  np.testing.assert_allclose(grid[:, 8:, 7], on + off, atol=1e-3)
  np.testing.assert_allclose(whole[1, 3], whole[1, 7], atol=1e-5)
  np.testing.assert_allclose(places.sum(-1), 1 + 0.1 / K, atol=1e-4)  # as published, not 1


def test_logits_outside_the_top_five_are_zero():
  label_map = np.zeros((1, *labels.SHAPE), np.float16)
  label_map[:, 0] = np.float16([3, 2, 1, -1, -2])[:, None, None]
  label_map[:, 1] = np.float16([4, 0, 9, 1, 2])[:, None, None]
  whole, _ = targets(label_map, np.float32([[0, 0, 1, 1]]))
  z = np.zeros(K)
  z[[4, 0, 9, 1, 2]] = 3, 2, 1, -1, -2
  t = np.exp(z) / np.exp(z).sum()
  np.testing.assert_allclose(whole[0], t * (0.9 + 0.1 / K) + 0.1 / K, rtol=1e-5)


# Stored next to the images.

def test_label_maps_of_a_folder_arrive_with_its_batches(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(4):
    for path in (tmp_path / "train" / "a", tmp_path / "val" / "a",
                 tmp_path / "label_maps" / "train" / "a"):
      path.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
        tmp_path / "train" / "a" / f"{i}.png")
    np.save(tmp_path / "label_maps" / "train" / "a" / f"{i}.npy", constant_map(i))
  Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a" / "0.png")
  data = ml_collections.ConfigDict({
      "name": f"folder:{tmp_path}", "augment": "token_labels", "workers": 0, "replicas": 1,
      "repeats": 1, "on_bad": "stop", "max_bad": 0})

  def first():
    return next(pipeline.train_batches(data, image_size=16, batch_size=4, seed=0))

  got = first()
  assert got["image"].shape == (4, 16, 16, 3) and got["label_box"].shape == (4, 4)
  assert got["label_map"].shape == (4, *labels.SHAPE) and got["label_map"].dtype == np.float16
  assert sorted(got["label_map"].max(axis=(1, 2, 3, 4))) == [0, 1, 2, 3]
  np.save(tmp_path / "label_maps" / "train" / "a" / "2.npy", np.zeros((2, 5, 18), "f2"))
  with pytest.raises(ValueError, match=r"map of image 2, .*2\.npy: it is float16 \(2, 5, 18\)"):
    first()
  data.name = "shapes:8"
  with pytest.raises(ValueError, match="'token_labels' would change the meaning of shapes"):
    first()


@pytest.mark.parametrize(("label", "text"), [(500, "the class 500"), (2, "the class 2"),
                                            (-1, "the class -1"), (0.5, r"the class 0\.5")])
@pytest.mark.parametrize("kind", ["folder", "arrayrecord"])
def test_label_maps_for_other_classes_are_rejected(tmp_path, kind, label, text):
  """Their targets would be flat, because no class of the data has a logit."""
  for path in ("train/a", "train/b", "val/a", "label_maps/train/a", "label_maps/train/b"):
    (tmp_path / path).mkdir(parents=True)
  for name in ("train/a/0.png", "train/b/0.png", "val/a/0.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
  np.save(tmp_path / "label_maps" / "train" / "a" / "0.npy", constant_map(9, 0))
  np.save(tmp_path / "label_maps" / "train" / "b" / "0.npy", constant_map(9, 1))
  name = f"folder:{tmp_path}"
  if kind == "arrayrecord":
    name = f"arrayrecord:{tmp_path}/out"
    from vitcompact.data import prepare
    with pytest.MonkeyPatch.context() as patch:   # as an earlier version wrote them
      patch.setattr(labels, "checked", lambda label_map, *_: label_map)
      np.save(tmp_path / "label_maps" / "train" / "b" / "0.npy", constant_map(9, label))
      prepare.prepare_folder(tmp_path, tmp_path / "out", say=lambda text: None)
    with pytest.raises(ValueError, match=text):
      prepare.verify(tmp_path / "out", say=lambda text: None)
  else:
    np.save(tmp_path / "label_maps" / "train" / "b" / "0.npy", constant_map(9, label))
  data = ml_collections.ConfigDict({
      "name": name, "augment": "token_labels", "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0})
  with pytest.raises(ValueError, match=rf"{text}, and the data have 0\.\.1: it was made for other"):
    next(pipeline.train_batches(data, image_size=16, batch_size=2, seed=0))
  data.augment = "flip_crop"   # label maps are not read then
  next(pipeline.train_batches(data, image_size=16, batch_size=2, seed=0))


@pytest.mark.parametrize("moved", [0, 1])
def test_label_maps_with_another_class_numbering_are_pointed_out(tmp_path, caplog, moved):
  """All classes exist, but the maps' labels are not those of the images."""
  for label in range(4):
    for path in ("train", "val", "label_maps/train"):
      (tmp_path / path / str(label)).mkdir(parents=True)
    for split in ("train", "val"):
      Image.new("RGB", (8, 8)).save(tmp_path / split / str(label) / "0.png")
    np.save(tmp_path / "label_maps" / "train" / str(label) / "0.npy",
            constant_map(9, (label + moved) % 4))
  data = ml_collections.ConfigDict({
      "name": f"folder:{tmp_path}", "augment": "token_labels", "workers": 0, "replicas": 1,
      "repeats": 1, "on_bad": "stop", "max_bad": 0})
  pipeline.train_batches(data, image_size=16, batch_size=2, seed=0)
  message = "contain the class of their image in only 0 of 4 images: were they made for classes"
  assert (message in caplog.text) == bool(moved)


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no map"),
    lambda path: path.unlink(), lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    lambda path: np.save(path, np.full(labels.SHAPE, np.nan, np.float16))],
    ids=["empty", "text", "missing", "objects", "archive", "nan"])
def test_damaged_label_map_is_named_in_one_line(tmp_path, write):
  for path in ("train/a", "val/a", "label_maps/train/a"):
    (tmp_path / path).mkdir(parents=True)
  for path in ("train/a", "val/a"):
    Image.new("RGB", (8, 8)).save(tmp_path / path / "0.png")
  path = tmp_path / "label_maps" / "train" / "a" / "0.npy"
  np.save(path, constant_map(1))
  write(path)
  with pytest.raises(ValueError, match=r"label map of image 0, .*a/0\.npy: .*'skip'") as error:
    pipeline.source(f"folder:{tmp_path}", "train", image_size=16)[0]
  assert "\n" not in str(error.value)
