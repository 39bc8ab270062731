"""A run can start from a file: unchanged, or compacted for the run's plan."""
import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import convert, trees
from vitcompact.data import pipeline
from vitcompact.run import loop
from vitcompact.train import build, start


@pytest.fixture
def dense(built, tmp_path):
  """Returns (path, variables) of a random dense model of the tiny run's size."""
  model = built.model.clone(plan=vc.Plan())
  variables = tiny.init(model)
  convert.save(tmp_path / "dense.safetensors", model, variables)
  return str(tmp_path / "dense.safetensors"), model, variables


def test_dense_file_is_compacted_with_training_images(built, dense):
  path, model, variables = dense
  images = start.calibration_images(built.config, built.preprocess)
  assert images.shape == (128, 8, 8, 3)
  got = start.load_variables(path, built.model, lambda: images)
  _, expected = vc.compact(model, variables, built.model.plan, images=images)
  assert trees.digest(got) == trees.digest(expected)
  state = start.state_with_variables(built.init(jax.random.key(0)), got, built.shardings)
  for tree in (state.params, state.ema_params):
    assert trees.digest(tree) == trees.digest(expected["params"])
  assert trees.digest(state.ema_batch_stats) == trees.digest(expected["batch_stats"])
  placed = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, built.shardings)
  assert all(jax.tree.leaves(placed)) and int(state.step) == 0


def test_calibration_uses_images_of_every_class(built):
  """The train split is ordered by class: its first images show a single digit."""
  pre = built.preprocess
  images = np.asarray(start.calibration_images(built.config, pre))
  digits = pipeline.source("digits", "train", image_size=pre.image_size)
  pixels = np.round((images * pre.std + pre.mean) * 255).astype(np.uint8)
  shown = {image.tobytes() for image in pixels}
  labels = {example["label"] for example in (digits[i] for i in range(len(digits)))
            if example["image"].tobytes() in shown}
  assert labels == set(range(10))


@pytest.mark.parametrize("fit, share, crop", [
    ("crop", 0.0, 0.9), ("crop", 0.875, 0.875), ("warp", 0.875, None)])
def test_run_evaluates_with_the_crop_of_its_config_or_by_warping(config, fit, share, crop):
  config.data.update(name="folder:images", eval_fit=fit, eval_crop=share)
  assert build.preprocess_of(config, tiny.deit()).crop == crop
  config.data.name = "digits"    # generated at the model's size
  assert build.preprocess_of(config, tiny.deit()).crop == 1


def test_run_starts_from_its_file(dense, config):
  config.init_from = dense[0]
  run = loop.build(loop.resolve(config))
  state = loop.fresh_state(run)
  got, old = (params["blocks_0"]["attn"]["query"]["kernel"]
              for params in (state.params, dense[2]["params"]))
  assert any(np.array_equal(got, old[:, [head]]) for head in range(old.shape[1]))


def test_state_contains_no_buffer_twice(built, dense):
  """A step donates its state: on one device, a repeated buffer would end the run."""
  images = start.calibration_images(built.config, built.preprocess)
  variables = start.load_variables(dense[0], built.model, lambda: images)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: one, built.shardings)
  state = jax.device_put(built.init(jax.random.key(0)), places)
  state = start.state_with_variables(state, variables, places)
  leaves = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
  assert len(set(pointers)) == len(pointers)


def test_file_with_the_same_plan_is_used_unchanged(built, tmp_path):
  variables = tiny.init(built.model)
  convert.save(tmp_path / "small.safetensors", built.model, variables)
  got = start.load_variables(str(tmp_path / "small.safetensors"), built.model, None)
  assert trees.digest(got) == trees.digest(variables)


def test_file_with_other_classes_is_rejected_as_start_and_as_teacher(built, tmp_path):
  path, names = str(tmp_path / "named.safetensors"), list("0123456789")
  convert.save(path, built.model, tiny.init(built.model), classes=names)
  start.load_variables(path, built.model, None, names)
  start.load_teacher(path, built.model, names)
  for load in (lambda: start.load_variables(path, built.model, None, names[::-1]),
               lambda: start.load_teacher(path, built.model, names[::-1])):
    with pytest.raises(ValueError, match=r"output 0 is '0' there and '9' in the data.*reset-head"):
      load()


def test_incompatible_file_is_named_in_one_line(built, tmp_path):
  other = tiny.deit()
  convert.save(tmp_path / "other.safetensors", other, tiny.init(other))
  with pytest.raises(ValueError, match=r"init_from=.*other.safetensors.*key/bias is") as error:
    start.load_variables(str(tmp_path / "other.safetensors"), built.model, None)
  assert "\n" not in str(error.value)
  with pytest.raises((ValueError, OSError), match="nowhere"):
    start.load_variables("nowhere.safetensors", built.model, None)


def test_other_programs_weights_are_read_for_the_runs_model(built, tmp_path):
  """A file, or a directory containing one; as a start and as a teacher."""
  model = built.model.clone(plan=vc.Plan())
  variables = tiny.init(model)
  state = {f"model.{name}": value for name, value in vc.to_torch(model, variables).items()}
  path = tmp_path / "pytorch.npz"
  np.savez(path, **state)
  images = start.calibration_images(built.config, built.preprocess)
  for name in (str(path), str(tmp_path)):
    assert start.is_dense(name)
    assert trees.digest(start.load_teacher(name, model)) == trees.digest(variables)
  got = start.load_variables(str(path), built.model, lambda: images)
  _, expected = vc.compact(model, variables, built.model.plan, images=images)
  assert trees.digest(got) == trees.digest(expected)
  np.savez(path, **{name: value for name, value in state.items() if "norm1" not in name})
  with pytest.raises(ValueError, match=r"init_from=.*npz': the state dict does not fit") as error:
    start.load_variables(str(path), built.model, None)
  assert "\n" not in str(error.value)
