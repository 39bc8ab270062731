"""Hugging Face data sets are read from parquet files only, local or on the hub; no code is run."""
import io
import json
import pickle
import sys

import ml_collections
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vitcompact.data import hf, pipeline
from vitcompact.data.decode import BadRecord

NAMES = ("cat", "dog", "fish")
TRAIN = "data/train-00000-of-00001.parquet"


def png(red, green=0) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (6, 4), (red, green, 0)).save(file, "PNG")
  return file.getvalue()


def table(count, *, first=0, green=0, names=NAMES, image="image", label="label", labels=None,
          columns=()):
  """Builds a table where image i has red value `first` + i, and label that value modulo 3."""
  reds = range(first, first + count)
  values = [red % 3 for red in reds] if labels is None else labels
  data = pa.table({image: pa.array([{"bytes": png(red, green), "path": f"{red}.png"}
                                    for red in reds]),
                   label: pa.array(values), **{name: pa.array(found) for name, found in columns}})
  if names is None:
    return data
  features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
  return data.replace_schema_metadata({
      b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def parquet_bytes(data, rows=4) -> bytes:
  """Returns the bytes of a parquet file with few rows per row group."""
  file = io.BytesIO()
  parquet.write_table(data, file, row_group_size=rows)
  return file.getvalue()


def write(folder, files):
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else parquet_bytes(data))
  return f"hf:{folder}"


def reds(name, split):
  source = pipeline.source(name, split, image_size=8)
  examples = [source[i] for i in range(len(source))]
  assert all(e["image"].shape == (4, 6, 3) and e["image"].dtype == np.uint8 for e in examples)
  assert all(e["label"] == e["image"][0, 0, 0] % 3 for e in examples)
  return [int(e["image"][0, 0, 0]) for e in examples]


def one_line(error) -> str:
  assert "\n" not in str(error.value)
  return str(error.value)


# Splits


def test_splits_are_inferred_from_file_names(tmp_path):
  name = write(tmp_path, {
      "data/train-00000-of-00002.parquet": table(9),
      "data/train-00001-of-00002-0b6b0d1e8e6a3f4c.parquet": table(6, first=9),
      "data/validation-00000-of-00001.parquet": table(5, first=60),
      "data/test-00000-of-00001.parquet": table(7, first=90),
      "data/extra-00000-of-00001.parquet": table(3, first=120)})
  assert [reds(name, split) for split in pipeline.SPLITS] == [
      list(range(15)), list(range(60, 65)), list(range(90, 97))]
  assert [pipeline.num_examples(name, split) for split in pipeline.SPLITS] == [15, 5, 7]
  assert pipeline.class_names(name) == NAMES
  with pytest.raises(ValueError, match="split='extra' is not one of"):
    pipeline.source(name, "extra", image_size=8)


def test_folder_name_may_name_the_split(tmp_path):
  """SUBSET/SPLIT/0000.parquet, as in the hub's own conversions."""
  name = write(tmp_path, {"plain/train/0000.parquet": table(4),
                          "plain/train/0001.parquet": table(4, first=4),
                          "plain/test/0000.parquet": table(3, first=90)})
  assert reds(f"{name}@all", "train") == list(range(8)) and reds(name, "test") == [90, 91, 92]


def test_without_a_validation_split_a_tenth_of_train_is_held_out(tmp_path, caplog):
  name = write(tmp_path, {TRAIN: table(30), "data/test-00000-of-00001.parquet": table(4, first=90)})
  train, val, test = (reds(name, split) for split in pipeline.SPLITS)
  assert val == [9, 19, 29] and sorted(train + val) == list(range(30)) and test[0] == 90
  assert not caplog.text
  everything = [reds(f"{name}@all", split) for split in pipeline.SPLITS]
  assert everything == [list(range(30)), test, test]
  assert "test serves as both val and test" in caplog.text


def test_test_split_with_hidden_labels_is_replaced(tmp_path, caplog):
  name = write(tmp_path, {
      TRAIN: table(6), "data/validation-00000-of-00001.parquet": table(3, first=60),
      "data/test-00000-of-00001.parquet": table(3, first=90, labels=[-1] * 3)})
  assert reds(name, "test") == reds(name, "val") == [60, 61, 62]
  assert "has no test: val serves as both val and test" in caplog.text


def test_one_of_several_subsets_must_be_named(tmp_path):
  name = write(tmp_path, {"a/train-00000-of-00001.parquet": table(4),
                          "b/train-00000-of-00001.parquet": table(4, first=30)})
  with pytest.raises(ValueError, match=rf"several subsets; name one, as in '{name}/a': a, b") as e:
    pipeline.source(name, "train", image_size=8)
  one_line(e)
  assert reds(f"{name}/b", "train") == list(range(30, 34))


# Columns


def test_without_metadata_classes_are_named_by_their_numbers(tmp_path):
  name = write(tmp_path, {"train.parquet": table(12, names=None)})
  assert pipeline.class_names(name) == ("0", "1", "2") and len(reds(name, "train")) == 11


@pytest.mark.parametrize(("image", "label"), [("img", "labels"), ("photo", "fine_label")])
def test_image_and_label_columns_are_found_under_other_names(tmp_path, image, label):
  """CIFAR-100 names them img and fine_label, and also has a coarse label."""
  rows = table(6, image=image, label=label, columns=[("coarse_label", [0] * 6), ("id", [0] * 6)])
  features = {image: {"_type": "Image"}, "coarse_label": {"names": ["all"], "_type": "ClassLabel"},
              label: {"names": list(NAMES), "_type": "ClassLabel"}}
  rows = rows.replace_schema_metadata({
      b"huggingface": json.dumps({"info": {"features": features}}).encode()})
  name = write(tmp_path, {TRAIN: rows})
  assert hf.columns(str(tmp_path))[:2] == (image, label)
  assert reds(name, "train") == list(range(6))


# Reading


def test_random_access_gives_the_same_images_however_little_is_cached(tmp_path, monkeypatch):
  name = write(tmp_path, {TRAIN: table(20), "data/test-00000-of-00001.parquet": table(3)})
  order = np.random.default_rng(0).permutation(18)
  all_rows = pipeline.source(name, "train", image_size=8)
  assert all_rows.rows.group.cache_info().maxsize is None
  monkeypatch.setattr(hf, "IN_MEMORY", 0)
  monkeypatch.setattr(hf, "ROW_GROUPS", 1)
  cached_rows = pipeline.source(name, "train", image_size=8)
  for i in order:
    np.testing.assert_array_equal(all_rows[i]["image"], cached_rows[i]["image"])
  assert cached_rows.rows.group.cache_info().currsize == 1   # of five row groups
  again = pickle.loads(pickle.dumps(cached_rows))    # a worker process opens the files again
  np.testing.assert_array_equal(again[5]["image"], all_rows[5]["image"])


def test_batches_can_come_from_worker_processes(tmp_path):
  name = write(tmp_path, {TRAIN: table(20)})

  def first(workers):
    data = ml_collections.ConfigDict({
        "name": name, "augment": "flip_crop", "workers": workers, "replicas": 2, "repeats": 1,
        "on_bad": "stop", "max_bad": 0})
    stream = pipeline.train_batches(data, image_size=8, batch_size=4, seed=0)
    batch = next(stream)
    stream.close()
    return batch
  np.testing.assert_array_equal(first(0)["image"], first(1)["image"])


# Errors


def test_bad_image_is_named(tmp_path):
  columns = table(4).to_pydict()
  columns["image"][1] = {"bytes": None, "path": "/elsewhere/1.png"}
  columns["image"][2]["bytes"] = columns["image"][2]["bytes"][:40]
  columns["label"][3] = 3
  source = pipeline.source(write(tmp_path, {TRAIN: pa.table(columns).replace_schema_metadata(
      table(1).schema.metadata)}), "train", image_size=8)
  for index, words in ((1, "only a path to it is stored"), (2, "image 2 of train in hf:"),
                       (3, r"its label 3 is not in 0\.\.2")):
    with pytest.raises(BadRecord, match=words) as error:
      source[index]
    assert f"image {index} of train in hf:{tmp_path}" in one_line(error)


@pytest.mark.parametrize(("files", "message"), [
    ({"readme.txt": b""}, r"has no parquet files$"),
    ({"photos.py": b""}, r"no parquet files but a script, photos\.py, which is not run: .*'hf:org/"
                         r"name@refs/convert/parquet'"),
    ({"data/test-00000-of-00001.parquet": table(2), "data/more-00000-of-00001.parquet": table(1)},
     r"has the splits more, test; 'train' is needed"),
    ({"data/train-00001-of-00003.parquet": table(2), "data/train-00002-of-00003.parquet": table(2)},
     r"there are 2 files like data/train-00001.*, which says there are 3; download"),
    ({TRAIN: pa.table({"text": ["a"], "label": [0]})},
     r"has no column that is an image, .* its columns are text \(string\), label \(int64\)"),
    ({TRAIN: table(2, label="number", names=None)},
     r"has no column that is a label, .* image \(struct\), number \(int64\)"),
    ({TRAIN: table(2, labels=["cat", "dog"])}, r"no column that is a label.* label \(string\)"),
    ({TRAIN: table(2, labels=[0.0, 1.0])}, r"no column that is a label.* label \(double\)"),
    ({TRAIN: table(2, labels=[0, None])}, r"parquet: 1 of its labels are missing"),
    ({TRAIN: b"PAR1 but no more"}, r"cannot read .*train-00000-of-00001\.parquet: "),
    ({TRAIN: table(2), "data/test-00000-of-00001.parquet": table(2, names=("dog", "cat", "fish"))},
     r"test-00000-of-00001\.parquet has other classes than train's"),
    ({TRAIN: table(2), "data/test-00000-of-00001.parquet": table(2, label="y")},
     r"test-00000-of-00001\.parquet has no column 'label', unlike train's")])
def test_unreadable_data_raises_one_line_errors(tmp_path, files, message):
  with pytest.raises(ValueError, match=message) as error:
    pipeline.source(write(tmp_path, files), "train", image_size=8)
  assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize(("name", "message"), [
    ("hf", r"data\.name='hf' needs a name or a folder: 'hf:org/name', 'hf:PATH'"),
    ("hf:/no/such/folder", r"'hf:/no/such/folder': no such folder$"),
    ("hf:mnist", r"'hf:mnist': no such folder, and not a hub name: org/name"),
    ("hf:a/b/c/d", r"not a hub name: org/name, or org/name/SUBSET")])
def test_invalid_name_is_rejected(name, message):
  with pytest.raises(ValueError, match=message) as error:
    pipeline.source(name, "train", image_size=8)
  one_line(error)


def test_using_all_of_a_train_only_set_is_rejected(tmp_path):
  name = write(tmp_path, {TRAIN: table(20)})
  assert len(reds(name, "train")) == 18
  with pytest.raises(ValueError, match="without @all"):
    pipeline.num_examples(f"{name}@all", "train")


@pytest.mark.parametrize("module", ["pyarrow", "huggingface_hub"])
def test_missing_extra_raises_an_error_that_says_what_to_install(tmp_path, monkeypatch, module):
  name = write(tmp_path, {TRAIN: table(2)}) if module == "pyarrow" else "hf:org/extra"
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=rf"needs {module}, .*pip install 'vitcompact\[hf\]'") as e:
    pipeline.source(name, "train", image_size=8)
  one_line(e)


# The hub


@pytest.fixture
def repo(server):
  clear_caches()
  server.add("datasets/org/name", **{TRAIN: parquet_bytes(table(20)), "README__md": b"# A set"})
  return server


def clear_caches():
  for cached in (hf.place, hf.columns, hf.labels, hf.choose):
    cached.cache_clear()


def test_hub_data_set_is_downloaded_once(repo, monkeypatch):
  from huggingface_hub import constants

  assert reds("hf:org/name", "val") == [9, 19]
  assert repo.gets("README") == 0 and repo.gets("/large/") == 1
  clear_caches()
  assert len(reds("hf:org/name", "train")) == 18 and repo.gets("/large/") == 1
  clear_caches()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  requests = len(repo.asked)
  assert reds("hf:org/name", "val") == [9, 19] and len(repo.asked) == requests
  with pytest.raises(FileNotFoundError, match=r"hf download org/other --repo-type dataset") as e:
    pipeline.num_examples("hf:org/other", "train")
  one_line(e)


def test_cache_is_used_when_the_hub_does_not_answer(repo):
  assert reds("hf:org/name", "val") == [9, 19]
  clear_caches()
  repo.close()
  assert reds("hf:org/name", "val") == [9, 19]


def test_revision_is_pinned(repo):
  first = repo.commit("datasets/org/name", 0)
  repo.add("datasets/org/name", **{TRAIN: parquet_bytes(table(10, first=60))})
  assert reds("hf:org/name", "val") == [69] and reds(f"hf:org/name@{first}", "val") == [9, 19]
  assert reds(f"hf:org/name@{first}", "test") == [9, 19]
  with pytest.raises(ValueError, match=r"the data set has no revision 'v9'; leave it out"):
    pipeline.num_examples("hf:org/name@v9", "train")


def test_only_the_named_subset_is_downloaded(repo):
  repo.add("datasets/org/sets", **{f"{name}/train-00000-of-00001.parquet": parquet_bytes(
      table(10, first=10 * i)) for i, name in enumerate("ab")})
  with pytest.raises(ValueError, match=r"name one, as in 'hf:org/sets/a': a, b"):
    pipeline.num_examples("hf:org/sets", "train")
  assert repo.gets("/large/") == 0
  assert reds("hf:org/sets/b", "val") == [19] and repo.gets("/large/") == 1
  with pytest.raises(ValueError, match=r"has no subset 'c'; it has a, b"):
    pipeline.num_examples("hf:org/sets/c", "train")


def test_different_kinds_of_missing_hub_data_give_different_errors(repo):
  repo.add("datasets/org/script", **{"script.py": b"raise SystemExit", "README__md": b""})
  repo.add("datasets/org/gated", **{TRAIN: parquet_bytes(table(2))})
  repo.gated.add("datasets/org/gated")
  for name, words in (("hf:org/script", r"a script, script\.py, which is not run"),
                      ("hf:org/gated", "requires accepting its licence"),
                      ("hf:org/none", "no such data set on the hub, or a private one")):
    with pytest.raises(ValueError, match=words) as error:
      pipeline.num_examples(name, "train")
    one_line(error)
