"""Which output means which class: every data set says so, and mismatches are named."""
import json

import ml_collections
import pytest
from PIL import Image

from vitcompact.data import pipeline, prepare
from vitcompact.data.classes import check_classes, describe, digest, imagenet_1k


def write_images(root, classes, splits=("train", "val")):
  for split in splits:
    for name in classes:
      (root / split / name).mkdir(parents=True)
      Image.new("RGB", (8, 8), (len(name), 0, 0)).save(root / split / name / "0.png")
  return root


def test_output_k_has_the_name_of_label_k_in_every_data_set(tmp_path):
  months = [str(month) for month in range(1, 13)]
  write_images(tmp_path / "images", months)
  prepare.prepare_folder(tmp_path / "images", tmp_path / "records", say=lambda text: None)
  expected = ("1", "10", "11", "12", "2", "3", "4", "5", "6", "7", "8", "9")
  for name in (f"folder:{tmp_path}/images", f"arrayrecord:{tmp_path}/records"):
    assert pipeline.class_names(name) == expected
    for split in pipeline.SPLITS:
      source = pipeline.source(name, split, image_size=8)
      assert [source.class_names[source[i]["label"]] for i in range(12)] == list(expected)
  assert pipeline.class_names("digits:3") == tuple("0123456789")
  assert pipeline.class_names("shapes:9")[:2] == ("right-different", "right-same")
  assert pipeline.class_names("directions") == ("right", "below", "left", "above")


def test_numeric_class_names_sorted_as_text_are_reported(tmp_path, caplog):
  name = f"folder:{write_images(tmp_path / 'a', ['8', '9', '10'])}"
  assert pipeline.class_names(name) == ("10", "8", "9")
  assert "are numbers, and are sorted as text: output 0 is the class '10'" in caplog.text
  caplog.clear()
  pipeline.class_names(f"folder:{write_images(tmp_path / 'b', ['08', '09', '10'])}")
  assert not caplog.text


@pytest.mark.parametrize(("expected", "got", "message"), [
    (("a", "b", "c"), ("a", "c", "b"),
     r"output 1 is 'b' there and 'c' in the data \(the same names in another order\)"),
    (("a", "b"), (".ipynb_checkpoints", "a", "b"),
     r"output 0 is 'a' there and '\.ipynb_checkpoints' in the data \(2 classes there, 3 here; 1 "
     r"only in the data, the first '\.ipynb_checkpoints'\)"),
    (("a", "b"), ("a",), r"output 1 is 'b' there and no class in the data \(2 classes there, 1 "
                         r"here; 1 not in the data, the first 'b'\)"),
    (("cat",), ("dog",), r"output 0 is 'cat' there and 'dog' in the data")])
def test_first_class_mismatch_is_named_with_a_way_out(expected, got, message):
  message = rf"^runs/a has other classes than the data: {message}.*\. Use the data that it was made"
  with pytest.raises(ValueError, match=message) as error:
    check_classes("runs/a", expected, got)
  assert "\n" not in str(error.value)
  assert digest(expected) != digest(got)


def test_equal_class_names_and_files_without_names_are_accepted():
  check_classes("runs/a", ["a", "b"], ("a", "b"))
  check_classes("runs/a", None, ("a",))
  check_classes("runs/a", ("a",), None)


def test_imagenet_class_names_follow_the_order_of_its_synsets():
  names = imagenet_1k()
  assert len(names) == len(set(names)) == 1000
  assert [names[i] for i in (0, 134, 207, 281, 517, 999)] == [
      "tench", "crane (bird)", "golden retriever", "tabby", "crane (machine)", "toilet tissue"]


def test_many_classes_are_summarised_by_first_last_and_digest():
  assert describe(("cat", "dog")) == "2 classes: 0 cat, 1 dog"
  names = [f"n{i:04d}" for i in range(1000)]
  assert describe(names).startswith("1000 classes: 0 n0000, 1 n0001, ")
  assert describe(names).endswith(f"..., 999 n0999; sha256 of the names {digest(names)[:12]}")


def test_preparing_does_not_resume_into_records_of_other_classes(tmp_path):
  images, out = tmp_path / "images", tmp_path / "out"
  write_images(images, ["a", "b"])
  prepare.prepare_folder(images, out, say=lambda text: None)
  (images / "train" / "b").rename(images / "train" / "c")
  (images / "val" / "b").rename(images / "val" / "c")
  from vitcompact.data import folder
  folder.list_classes.cache_clear(), folder.list_files.cache_clear()
  with pytest.raises(ValueError, match=r"output 1 is 'b' there and 'c' .* Choose another --out"):
    prepare.prepare_folder(images, out, say=lambda text: None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"class_names": None}, "does not name its classes"), ({"class_names": []}, "does not name"),
    ({"class_names": [1, 2]}, "does not name"), ({"format": "other"}, "is not of vitcompact")])
def test_manifest_without_class_names_is_rejected(tmp_path, changes, message):
  write_images(tmp_path / "images", ["a", "b"])
  prepare.prepare_folder(tmp_path / "images", tmp_path / "out", say=lambda text: None)
  path = tmp_path / "out" / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    pipeline.class_names(f"arrayrecord:{tmp_path}/out")
  path.write_text("[]")
  with pytest.raises(ValueError, match="is not of vitcompact-records-1"):
    pipeline.class_names(f"arrayrecord:{tmp_path}/out")
  with pytest.raises(ValueError, match="prepared from other data"):
    prepare.prepare_folder(tmp_path / "images", tmp_path / "out", say=lambda text: None)


def config(name):
  return ml_collections.ConfigDict({
      "name": name, "augment": "none", "workers": 0, "replicas": 1, "repeats": 1,
      "on_bad": "stop", "max_bad": 0})


def test_hidden_folders_are_not_classes(tmp_path, caplog):
  """A notebook's .ipynb_checkpoints would become class 0 and shift all the others by one."""
  write_images(tmp_path, ["cat", "dog"])
  for name in (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "__pycache__"):
    for split in ("train", "val"):
      (tmp_path / split / name).mkdir()
      Image.new("RGB", (8, 8)).save(tmp_path / split / name / "x.png")
  name = f"folder:{tmp_path}"
  assert pipeline.class_names(name) == ("cat", "dog")
  batch = next(pipeline.train_batches(config(name), image_size=8, batch_size=2, seed=0))
  assert sorted(batch["label"]) == [0, 1]
  assert pipeline.num_examples(name, "val") == 2
  assert f"{tmp_path}/train: 2 images; left out: 5 hidden (.git, ...)" in caplog.text
