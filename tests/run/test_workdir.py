"""A workdir belongs to one run at a time, of one config; an unusable one is refused at once."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from tests.tiny_run import contents, lines
from vitcompact import compare
from vitcompact.data import pipeline, prepare, records
from vitcompact.run import checkpoint, config_file, loop, workdir
from vitcompact.train import config as configs


def test_a_workdir_is_created_with_its_parents_and_claimed_once(config, tmp_path):
  directory = tmp_path / "runs" / "one"
  workdir.claim(directory, config)
  text = (directory / "config.json").read_text()
  workdir.claim(directory, config)
  assert {path.name for path in directory.iterdir()} == {"config.json", "classes.json"}
  config.seed = 1
  with pytest.raises(ValueError, match=r"seed was 0 and is now 1.*Use another --workdir"):
    workdir.claim(directory, config)
  assert (directory / "config.json").read_text() == text


def test_a_workdir_that_is_a_file_is_refused(config, tmp_path):
  (tmp_path / "file").write_text("precious")
  with pytest.raises(ValueError, match="is a file"):
    workdir.claim(tmp_path / "file", config)


@pytest.mark.parametrize("text", [
    "{", "[]", "null", "3", "[" * 10_000 + "]" * 10_000, '{"plan": "[[1"}', '{"plan": 3}',
    '{"a": ' * 3000 + "1" + "}" * 3000])
def test_an_invalid_config_json_is_refused_in_one_line(config, tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config.json is not the config of a run \(") as error:
    workdir.claim(tmp_path, config)
  assert "\n" not in str(error.value) and len(str(error.value)) < 1000


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["{", "3", "[1, 2]", '{"a": 1}', DEEP])
def test_an_invalid_classes_json_is_refused_in_one_line(config, tmp_path, text):
  workdir.claim(tmp_path, config)
  (tmp_path / "classes.json").write_text(text)
  with pytest.raises(ValueError, match=r"classes.json holds no names of classes \(") as error:
    workdir.check_claim(tmp_path, config)
  assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def manifest(path):
  (path / records.MANIFEST).write_text(DEEP)
  return records.read_manifest(str(path))


def prepared(path):
  (path / records.MANIFEST).write_text(DEEP)
  return prepare.begin(path, "", [])


def log(path):
  (path / "metrics.jsonl").write_text(DEEP)
  return compare.read(path)


def sealed(path):
  (path / "scores.json").write_text(DEEP)
  return checkpoint.read_with_digest(path / "scores.json")


def plan(path):
  (path / "plan.json").write_text(DEEP)
  return vc.Plan.parse(str(path / "plan.json"))


def override(path):
  (path / "plan.json").write_text(DEEP)
  return config_file.plan_from(str(path / "plan.json"))


@pytest.mark.parametrize("read", [
    manifest, prepared, log, sealed, plan, override, lambda path: vc.Plan.parse(DEEP),
    lambda path: vc.Execution.from_json(DEEP), lambda path: configs.from_text(DEEP)])
def test_deeply_nested_json_is_refused_in_one_line_everywhere(tmp_path, read):
  with pytest.raises(ValueError) as error:
    read(tmp_path)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["3", "[]", '{"loss": 1}'])
def test_the_error_for_a_foreign_log_names_the_line(tmp_path, text):
  (tmp_path / "metrics.jsonl").write_text(text)
  with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is no JSON object with a step"):
    compare.read(tmp_path)


@pytest.mark.parametrize("start", [loop.train, loop.evaluate])
def test_a_bucket_is_refused_as_workdir_and_no_folder_is_made(config, tmp_path, monkeypatch,
                                                                  start):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="--workdir=gs://bucket/run: must be a path on a mounted"):
    start(config, "gs://bucket/run")
  assert not list(tmp_path.iterdir())


def test_changes_of_a_run_are_allowed_by_name_and_become_its_config(config, tmp_path):
  workdir.claim(tmp_path, config)
  config.total_steps, config.optim.b1 = 60, 0.8
  with pytest.raises(ValueError, match=r"optim.b1 was 0.9 and is now 0.8. Use .*; or, to "
                                       r"resume it anyway, --allow=optim.b1,total_steps$"):
    workdir.check_claim(tmp_path, config, allow=["total_steps"])
  assert workdir.claim(tmp_path, config, ["total_steps", "optim.b1"]) == [
      "optim.b1 was 0.9 and is now 0.8", "total_steps was 40 and is now 60"]
  assert workdir.claim(tmp_path, config) == []
  with pytest.raises(ValueError, match=r"--allow=totl_steps is not a key .* mean total_steps"):
    workdir.check_claim(tmp_path, config, allow=["totl_steps"])


@pytest.mark.usefixtures("shared")
def test_a_run_whose_first_step_is_refused_leaves_no_trace(config, tmp_path, monkeypatch):
  def refuse(*_):
    raise ValueError("mixing needs an even number of images")

  monkeypatch.setattr(loop, "check_first_step", refuse)
  with pytest.raises(ValueError, match="even number"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_odd_batch_for_mixing_is_refused_before_claiming_the_workdir(config, tmp_path):
  """Tracing the first step detects it, without running it."""
  config.update(batch_size=24, data={"replicas": 8})   # each replica has 3 images to mix
  with pytest.raises(ValueError, match=r"even|pairs|mix"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def folder_of_images(path, seed=0):
  rng = np.random.default_rng(seed)
  for split in ("train", "val", "test"):
    for label in ("cat", "dog"):
      (path / split / label).mkdir(parents=True)
      for i in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path / split / label / f"{i}.png")


def test_the_same_images_may_move_but_not_be_replaced(config, tmp_path):
  folder_of_images(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  folder_of_images(tmp_path / "c", seed=1)
  config.data.name = f"folder:{tmp_path / 'a'}"
  workdir.claim(tmp_path / "run", config)
  before = contents(tmp_path / "run")
  config.data.name = f"folder:{tmp_path / 'b'}"
  assert workdir.claim(tmp_path / "run", config) == []
  config.data.name = f"folder:{tmp_path / 'c'}"
  with pytest.raises(ValueError, match=r"data.name was .*/a' and is now .*/c' \(the images differ"):
    workdir.check_claim(tmp_path / "run", config)
  assert contents(tmp_path / "run") == before
  assert len(workdir.check_claim(tmp_path / "run", config, allow=["data.name"])) == 1
  (tmp_path / "run" / "data.json").unlink()      # a run that older code began
  config.data.name = f"folder:{tmp_path / 'b'}"
  with pytest.raises(ValueError, match=r"no data.json to say which .*--allow=data.name"):
    workdir.check_claim(tmp_path / "run", config)
  config.data.name = f"folder:{tmp_path / 'a'}"
  workdir.claim(tmp_path / "run", config)
  assert contents(tmp_path / "run") == before


def test_a_run_may_be_lengthened_but_not_shortened_below_its_step(
    config, uninterrupted, tmp_path, monkeypatch):
  """No step is taken: a longer schedule would be another program to compile."""
  directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
  config.total_steps, seen = 60, []
  monkeypatch.setattr(loop, "fit", lambda run_state, state, stop: seen.append(
      (int(state.step), stop)) or state)
  monkeypatch.setattr(loop, "finish", lambda run, state, *_: None)
  with pytest.raises(ValueError, match=r"total_steps was 40 and is now 60.*--allow=total_steps"):
    loop.train(config, directory)
  loop.train(config, directory, allow=["total_steps"])
  loop.train(config, directory)
  assert seen == [(40, 60), (40, 60)]
  assert lines(directory)[-1]["changed"] == "total_steps was 40 and is now 60"
  assert json.loads((directory / "config.json").read_text())["total_steps"] == 60
  config.total_steps = 30
  with pytest.raises(ValueError, match=r"is at step 40 already, after config.total_steps=30"):
    loop.train(config, directory, allow=["total_steps"])


def test_checkpoints_without_a_config_are_refused_and_left_alone(config, tmp_path):
  (tmp_path / "checkpoints" / "20").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"holds checkpoints but no config.json, which says whose"):
    loop.train(config, tmp_path)
  assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", "20"]


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
  words = r"is being written by another run, process \d+ of"
  with workdir.locked(tmp_path), pytest.raises(ValueError, match=words), workdir.locked(tmp_path):
    pass
  with workdir.locked(tmp_path):   # released
    pass


@pytest.mark.parametrize("path", ["/dev/null/run", "/proc/run"])
def test_an_unwritable_workdir_is_refused(config, path):
  with pytest.raises(ValueError, match=f"--workdir={path} "):
    workdir.check_writable(workdir.pathlib.Path(path))
    workdir.claim(workdir.pathlib.Path(path), loop.resolve(config))


def test_val_classes_missing_in_train_are_found_before_any_computation(
    config, tmp_path, monkeypatch):
  """Not only after the first steps, when the first evaluation reads them."""
  for name in ("train/cat", "val/fish"):
    (tmp_path / "images" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
  config.data.name = f"folder:{tmp_path / 'images'}"
  monkeypatch.setattr(loop, "build", lambda config: pytest.fail("built already"))
  with pytest.raises(ValueError, match=r"val/fish is a class that .*/train does not have"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_missing_permissions_are_found_before_any_computation(config, tmp_path, monkeypatch):
  """A mock refuses access, since root is permitted everything."""
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: path != tmp_path)
  monkeypatch.setattr(loop, "build", lambda config: pytest.fail("built already"))
  with pytest.raises(ValueError, match=f"cannot be written: no write permission in {tmp_path}"):
    loop.train(config, tmp_path / "new" / "run")


def test_a_workdir_records_its_classes_and_refuses_other_ones(tmp_path, config, monkeypatch):
  """The same number of names in another order would change the meaning of every output."""
  workdir.claim(tmp_path, config)
  names = json.loads((tmp_path / "classes.json").read_text())
  assert names == [str(digit) for digit in range(10)]
  workdir.check_claim(tmp_path, config)
  monkeypatch.setattr(pipeline, "class_names", lambda name: (*names[1:], names[0]))
  with pytest.raises(ValueError, match="output 0 is '0' there and '1' in the data"):
    workdir.check_claim(tmp_path, config)
