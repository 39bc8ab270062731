"""IDX files are read in the layout of the MNIST family; damaged or mismatched files are named."""
import gzip
import pickle
import struct

import numpy as np
import pytest

from vitcompact.data import idx, pipeline


def idx_bytes(values: np.ndarray) -> bytes:
  """Returns the content of an IDX file of bytes."""
  return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + (
      values.astype(np.uint8).tobytes())


def write(folder, split, count, *, first="", gz=True, value=0, classes=10, labels=None):
  """Writes a split's files: image i is uniformly grey, `value` + i; its label is i % classes."""
  folder.mkdir(parents=True, exist_ok=True)
  images = np.broadcast_to(np.arange(count)[:, None, None] + value, (count, 6, 5))
  found = np.arange(count) % classes if labels is None else np.asarray(labels)
  for what, values in (("images-idx3", images), ("labels-idx1", found)):
    raw, name = idx_bytes(values), f"{first}{split}-{what}-ubyte"
    (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(raw) if gz else raw)
  return folder


def greys(name, split):
  source = pipeline.source(name, split, image_size=28)
  examples = [source[i] for i in range(len(source))]
  assert all(e["image"].shape == (6, 5, 3) and e["image"].dtype == np.uint8 for e in examples)
  return [int(e["image"][0, 0, 2]) for e in examples], [e["label"] for e in examples]


@pytest.mark.parametrize("gz", [True, False])
def test_a_tenth_of_train_is_held_out_and_the_test_files_are_the_test_split(tmp_path, gz):
  write(write(tmp_path, "train", 40, gz=gz), "t10k", 7, gz=gz, value=100)
  train, val, test = (greys(f"idx:{tmp_path}", split) for split in pipeline.SPLITS)
  assert val[0] == [9, 19, 29, 39] and test[0] == list(range(100, 107))
  assert sorted(train[0] + val[0]) == list(range(40))
  assert train[1] == [grey % 10 for grey in train[0]] and test[1] == list(range(7))
  assert [pipeline.num_examples(f"idx:{tmp_path}", s) for s in pipeline.SPLITS] == [36, 4, 7]
  assert pipeline.class_names(f"idx:{tmp_path}") == tuple("0123456789")


def test_val_files_are_used_and_also_serve_as_test_if_there_is_none(tmp_path, caplog):
  write(write(tmp_path, "train", 20), "val", 5, value=50)
  train, val, test = (greys(f"idx:{tmp_path}", split)[0] for split in pipeline.SPLITS)
  assert train == list(range(20)) and val == test == list(range(50, 55))
  assert "has no test: val serves as both val and test" in caplog.text


def test_one_of_several_sets_in_a_folder_must_be_named(tmp_path):
  for first, value in (("emnist-digits-", 0), ("emnist-letters-", 60)):
    write(write(tmp_path, "train", 10, first=first, value=value), "test", 3, first=first)
  with pytest.raises(ValueError, match=r"data sets; name one, as in 'idx:.*/emnist-letters': "
                                       r"emnist-digits, emnist-letters"):
    pipeline.source(f"idx:{tmp_path}", "train", image_size=28)
  assert greys(f"idx:{tmp_path}/emnist-letters", "train")[0] == list(range(60, 69))
  with pytest.raises(ValueError, match=r"no such folder, and no files kmnist-train-images"):
    pipeline.source(f"idx:{tmp_path}/kmnist", "train", image_size=28)


def test_file_names_with_a_dot_before_idx_are_recognised(tmp_path):
  write(tmp_path, "train", 10, gz=False)
  for path in tmp_path.iterdir():
    path.rename(path.with_name(path.name.replace("-idx", ".idx")))
  assert len(greys(f"idx:{tmp_path}", "train")[0]) == 9


def change(path, edit):
  path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(("file", "edit", "message"), [
    ("train-images-idx3-ubyte", lambda raw: raw[:-1],
     r"train-images-idx3-ubyte should have 10 x 6 x 5 bytes of data, and has 299: it is truncated"),
    ("train-labels-idx1-ubyte", lambda raw: raw + b"\0",
     r"train-labels-idx1-ubyte should have 10 bytes of data, and has 11"),
    ("train-images-idx3-ubyte", lambda raw: b"\x89PNG" + raw,
     r"is not an IDX file of images: it begins with 89504e47, not 00000803"),
    ("train-labels-idx1-ubyte", lambda raw: b"", r"of labels: it begins with nothing"),
    ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.arange(9)),
     r"has 10 images, and train-labels-idx1-ubyte 9 labels"),
    ("train-images-idx3-ubyte", lambda raw: idx_bytes(np.zeros((10, 0, 5))), r"has no pixels"),
    ("t10k-labels-idx1-ubyte", lambda raw: idx_bytes(np.array([0, 1, 12])),
     r"t10k-labels-idx1-ubyte has the label 12, and there are 10 classes \(train's are 0..9\)")])
def test_damaged_file_is_named_in_one_line(tmp_path, file, edit, message):
  write(write(tmp_path, "train", 10, gz=False), "t10k", 3, gz=False)
  change(tmp_path / file, edit)
  with pytest.raises(ValueError, match=message) as error:
    pipeline.source(f"idx:{tmp_path}", "test" if "t10k" in file else "train", image_size=28)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("edit", [lambda raw: raw[:-9], lambda raw: raw[:40] + b"xy" + raw[42:],
                                  lambda raw: b"no gzip"])
def test_damaged_gz_is_named(tmp_path, edit):
  write(tmp_path, "train", 10)
  change(tmp_path / "train-images-idx3-ubyte.gz", edit)
  with pytest.raises(ValueError, match=r"cannot read .*train-images.*gz: .*; download it again"):
    pipeline.source(f"idx:{tmp_path}", "train", image_size=28)


@pytest.mark.parametrize(("missing", "message"), [
    ("train-labels-idx1-ubyte", r"no file of train's labels: train-labels-idx1-ubyte, or the same"),
    ("t10k-images-idx3-ubyte", r"no file of test's images: t10k-images-idx3-ubyte, or the same")])
def test_missing_file_is_named(tmp_path, missing, message):
  write(write(tmp_path, "train", 10, gz=False), "t10k", 3, gz=False)
  (tmp_path / missing).unlink()
  with pytest.raises(ValueError, match=message):
    pipeline.num_examples(f"idx:{tmp_path}", "train")


def test_worker_process_reads_the_same_images(tmp_path):
  write(tmp_path, "train", 20)
  source = pipeline.source(f"idx:{tmp_path}", "val", image_size=28)
  raw = pickle.dumps(source)
  assert len(raw) < 500   # pickled without the data
  np.testing.assert_array_equal(pickle.loads(raw)[1]["image"], source[1]["image"])


def test_fashion_mnist_is_found_in_debians_folder_or_by_the_variable(tmp_path, monkeypatch):
  write(write(tmp_path / "given", "train", 20), "t10k", 3)
  write(write(tmp_path / "debian", "train", 30), "t10k", 3)
  monkeypatch.delenv(idx.FASHION_VARIABLE, raising=False)
  monkeypatch.setattr(idx, "FASHION_FOLDERS", (str(tmp_path / "no"), str(tmp_path / "debian")))
  assert pipeline.num_examples("fashion_mnist", "train") == 27
  monkeypatch.setenv(idx.FASHION_VARIABLE, str(tmp_path / "given"))
  assert pipeline.num_examples("fashion_mnist", "train") == 18
  source = pipeline.source("fashion_mnist", "test", image_size=28)
  assert source.class_names[source[1]["label"]] == "Trouser" and source.num_classes == 10


def test_missing_fashion_mnist_error_says_how_to_get_it(tmp_path, monkeypatch):
  """Its class names are known even so."""
  monkeypatch.delenv(idx.FASHION_VARIABLE, raising=False)
  monkeypatch.setattr(idx, "FASHION_FOLDERS", (str(tmp_path / "no"),))
  assert len(pipeline.class_names("fashion_mnist")) == 10
  hint = r"`apt install dataset-fashion-mnist`, .* four files .* set FASHION_MNIST_DIR to it"
  with pytest.raises(ValueError, match=hint):
    pipeline.num_examples("fashion_mnist", "train")
  monkeypatch.setenv(idx.FASHION_VARIABLE, str(tmp_path / "typo"))
  with pytest.raises(ValueError, match=r"no folder FASHION_MNIST_DIR=.*typo"):
    pipeline.source("fashion_mnist", "train", image_size=28)


def test_fashion_mnist_with_other_labels_is_rejected(tmp_path, monkeypatch):
  write(tmp_path, "train", 24, classes=12)
  monkeypatch.setenv(idx.FASHION_VARIABLE, str(tmp_path))
  with pytest.raises(ValueError, match=r"has the label 11, and there are 10 classes \(T-shirt"):
    pipeline.source("fashion_mnist", "train", image_size=28)


def test_names_without_a_path_or_with_a_typo_are_rejected():
  with pytest.raises(ValueError, match=r"data.name='idx:' needs a path: 'idx:PATH'"):
    pipeline.parse("idx:")
  with pytest.raises(ValueError, match=r"'fashion_mnst' is not one of fashion_mnist"):
    pipeline.parse("fashion_mnst")
