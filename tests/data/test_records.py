"""Prepared images equal their sources: tars and folders go to ArrayRecord and back."""
import io
import json
import tarfile

import ml_collections
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vitcompact.data import labels, pipeline, prepare, records

TRUTH = (0, 1, 2, 2, 1, 0, 0)  # labels of the validation images
CLASSES = ("n01440764", "n01443537", "n02088364")
silent = {"say": lambda text: None}


@pytest.fixture(autouse=True)
def clear_manifest_cache():
  """Clears the cached manifests: they are read once per process, but change during these tests."""
  records.read_manifest.cache_clear()
  yield
  records.read_manifest.cache_clear()


def jpeg(*key):
  pixels = np.random.default_rng(key).integers(0, 255, (12, 16, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG")
  return file.getvalue()


def add(tar, name, data):
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


def tar_of(files):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as tar:
    for name, data in files.items():
      add(tar, name, data)
  return out.getvalue()


def write_tars(path):
  """Three classes of 4, 5 and 6 images, 7 validation images; numbers do not follow sorted names."""
  inner = {f"{name}.tar": tar_of({f"{name}_{i}.JPEG": jpeg(label, i) for i in range(4 + label)})
           for label, name in reversed(list(enumerate(CLASSES)))}
  (path / prepare.TRAIN).write_bytes(tar_of(inner))
  (path / prepare.VAL).write_bytes(tar_of(
      {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(9, i) for i in reversed(range(7))}))
  numbers = {CLASSES[0]: 3, CLASSES[1]: 1, CLASSES[2]: 2}  # ILSVRC's own numbers, from 1
  synsets = np.array([(number, name) for name, number in numbers.items()],
                     dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
  mat = io.BytesIO()
  savemat(mat, {"synsets": synsets})
  truth = "".join(f"{numbers[CLASSES[label]]}\n" for label in TRUTH)
  kit = "ILSVRC2012_devkit_t12/data/"
  with tarfile.open(path / prepare.DEVKIT, "w:gz") as tar:
    add(tar, kit + "meta.mat", mat.getvalue())
    add(tar, kit + "ILSVRC2012_validation_ground_truth.txt", truth.encode())


@pytest.fixture
def tars(tmp_path):
  path = tmp_path / "tars"
  path.mkdir()
  write_tars(path)
  return path


@pytest.fixture
def small_files(monkeypatch):
  """Two classes, or three images, per file."""
  monkeypatch.setattr(prepare, "CLASSES_PER_FILE", 2)
  monkeypatch.setattr(prepare, "IMAGES_PER_FILE", 3)


def imagenet(tars, out):
  return prepare.prepare_imagenet(tars, out, official=False, **silent)


def test_imagenet_tars_become_records_with_the_right_labels(tars, tmp_path, small_files):
  out = tmp_path / "out"
  manifest = imagenet(tars, out)
  assert [line["records"] for line in manifest["splits"]["train"]] == [9, 6]
  assert [line["records"] for line in manifest["splits"]["val"]] == [3, 3, 1]
  name = f"arrayrecord:{out}"
  assert pipeline.num_classes(name) == 3
  assert [pipeline.num_examples(name, split) for split in pipeline.SPLITS] == [15, 7, 7]
  train = pipeline.source(name, "train", image_size=8)
  assert train.class_names == CLASSES
  assert [train.read(i)[:3] for i in range(15)] == [
      (jpeg(label, i), label, f"{CLASSES[label]}_{i}.JPEG")
      for label in range(3) for i in range(4 + label)]
  val = pipeline.source(name, "val", image_size=8)
  assert [val.read(i)[:2] for i in range(7)] == [
      (jpeg(9, i), TRUTH[i]) for i in range(7)]
  assert prepare.verify(out, whole_images=True, **silent) == 0


def test_interrupted_preparation_resumes(tars, tmp_path, small_files, monkeypatch):
  """Stopped in its third file: complete files are not rewritten, and the result is the same."""
  complete, out = tmp_path / "whole", tmp_path / "out"
  imagenet(tars, complete)
  write_shard, written = records.write_shard, []

  def stop_in_third_file(path, lines):
    written.append(path.name)
    if len(written) == 3:
      write_shard(path.with_name("torn"), lines)
      (path.with_name("torn")).rename(path.with_name(path.name + ".partial"))
      raise KeyboardInterrupt
    return write_shard(path, lines)

  monkeypatch.setattr(records, "write_shard", stop_in_third_file)
  with pytest.raises(KeyboardInterrupt):
    imagenet(tars, out)
  with pytest.raises(ValueError, match=r"is not complete: run the same .* again"):
    pipeline.num_classes(f"arrayrecord:{out}")
  imagenet(tars, out)
  assert written == ["train-000.arrayrecord", "train-001.arrayrecord", "val-000.arrayrecord",
                     "val-000.arrayrecord", "val-001.arrayrecord", "val-002.arrayrecord"]
  assert json.loads((out / "manifest.json").read_text()) == json.loads(
      (complete / "manifest.json").read_text())
  assert prepare.verify(out, **silent) == 0
  imagenet(tars, out)
  assert len(written) == 6  # nothing left to do


def test_official_tars_are_recognised_by_their_checksums(tars, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"img_train\.tar has the md5 sum .*--unofficial"):
    prepare.prepare_imagenet(tars, tmp_path / "out", **silent)
  import hashlib
  sums = {name: hashlib.md5((tars / name).read_bytes()).hexdigest() for name in prepare.MD5}
  monkeypatch.setattr(prepare, "MD5", sums)
  with pytest.raises(ValueError, match=r"has \{'train': 15, 'val': 7\} images and should have"):
    prepare.prepare_imagenet(tars, tmp_path / "out", **silent)
  with pytest.raises(ValueError, match="is not complete"):
    pipeline.num_classes(f"arrayrecord:{tmp_path / 'out'}")


@pytest.mark.parametrize(("name", "keep", "message"), [
    (prepare.TRAIN, 0.6, r"train\.tar.* is damaged|truncated"),
    (prepare.VAL, 0.3, r"has 4 files, and .* has labels for 7"),
    (prepare.DEVKIT, 0.6, r"devkit.* is damaged"), (prepare.VAL, None, r"no file .*val\.tar")])
def test_truncated_or_missing_tars_are_named(tars, tmp_path, name, keep, message):
  content = (tars / name).read_bytes()
  (tars / name).unlink()
  if keep:
    (tars / name).write_bytes(content[:int(keep * len(content))])
  with pytest.raises(ValueError, match=message):
    imagenet(tars, tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
  """Two classes with label maps, 4 and 3 training images, one of which is in both classes."""
  root = tmp_path / "images"
  for split, counts in (("train", (4, 3)), ("test", (1, 1))):
    for label, count in enumerate(counts):
      for i in range(count):
        path = root / split / "ab"[label] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(label if i else 0, i))
        if split == "train":
          path = root / "label_maps" / "train" / "ab"[label] / f"{i}.npy"
          path.parent.mkdir(parents=True, exist_ok=True)
          label_map = np.full(labels.SHAPE, label, np.float16)
          label_map[0] = 10 * label + i
          np.save(path, label_map)
  return root


def test_folder_and_its_records_give_the_same_batches(folder, tmp_path, small_files, capsys):
  out = tmp_path / "out"
  prepare.prepare_folder(folder, out, **silent)
  assert prepare.verify(out) == 1
  assert "1 images have more than one label" in capsys.readouterr().out
  streams = []
  for name, workers in ((f"folder:{folder}", 0), (f"arrayrecord:{out}", 0),
                        (f"arrayrecord:{out}", 2)):
    data = ml_collections.ConfigDict({
        "name": name, "augment": "token_labels", "workers": workers, "replicas": 1, "repeats": 1,
        "on_bad": "stop", "max_bad": 0})
    assert pipeline.num_examples(name, "val") == 2  # test also serves as val
    stream = pipeline.train_batches(data, image_size=8, batch_size=3, seed=0)
    streams.append([next(stream) for _ in range(4)])
    stream.close()
  for other in streams[1:]:
    for a, b in zip(streams[0], other, strict=True):
      assert a.keys() == b.keys() == {"image", "label", "label_map", "label_box"}
      assert all(np.array_equal(a[name], b[name]) for name in a)


def test_prepared_records_are_not_mixed_with_other_data(folder, tmp_path):
  prepare.prepare_folder(folder, tmp_path / "out", **silent)
  (folder / "train" / "a" / "9.jpg").write_bytes(jpeg(5))
  np.save(folder / "label_maps" / "train" / "a" / "9.npy", np.zeros(labels.SHAPE, np.float16))
  from vitcompact.data.folder import list_files
  list_files.cache_clear()
  with pytest.raises(ValueError, match=r"has \{'train': 7, 'test': 2\} images and should have"):
    prepare.prepare_folder(folder, tmp_path / "out", **silent)
  with pytest.raises(ValueError, match="prepared from other data"):
    prepare.write(tmp_path / "out", "imagenet", ["a", "b"], [], **silent)
  (folder / "train" / "a" / "9.jpg").write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"a/9\.jpg \(7 bytes\) is not an image"):
    prepare.prepare_folder(folder, tmp_path / "new", **silent)


def test_records_changed_on_disk_are_detected(folder, tmp_path):
  out = tmp_path / "out"
  prepare.prepare_folder(folder, out, **silent)
  path = out / "train-000.arrayrecord"
  data = bytearray(path.read_bytes())
  where = data.find(b"label_map") + 3000
  data[where] ^= 4
  path.write_bytes(data)
  with pytest.raises(ValueError, match="does not have the sha256"):
    prepare.verify(out, **silent)
  train = pipeline.source(f"arrayrecord:{out}", "train", image_size=8)
  with pytest.raises(ValueError, match=r"cannot read record \d of train in .*'skip'"):
    for i in range(len(train)):
      train[i]
  path.write_bytes(data[:-10])
  records.read_manifest.cache_clear()
  with pytest.raises(ValueError, match=r"train-000\.arrayrecord has \d+ bytes, not the \d+"):
    pipeline.source(f"arrayrecord:{out}", "train", image_size=8)


def test_record_with_a_label_out_of_range_is_named(tmp_path):
  shards = [prepare.Shard(split, f"{split}.arrayrecord", lambda: iter(
      [records.pack(jpeg(0), 0, "good"), records.pack(jpeg(1), 2, "wrong")]))
      for split in ("train", "val")]
  prepare.write(tmp_path / "out", "test", ["a", "b"], shards, **silent)
  name = f"arrayrecord:{tmp_path / 'out'}"
  source = pipeline.source(name, "train", image_size=8)
  assert source[0]["label"] == 0
  with pytest.raises(ValueError, match=r"cannot use image 1 of train.* wrong: its label 2 is not"):
    source[1]
  with pytest.raises(ValueError, match="its label 2 is not"):
    prepare.verify(tmp_path / "out", **silent)
