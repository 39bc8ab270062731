"""A checkpoint is restored bit for bit with the requested shardings, or not at all."""
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vitcompact import trees
from vitcompact.run import checkpoint, processes
from vitcompact.run.checkpoint import Checkpoints
from vitcompact.train import sharding

MESH_SIZES = {"data": 2, "fsdp": 4}


def state_of(scale=1.0, width=8, dtype="float32"):
  return {"step": jnp.array(3), "key": jax.random.key(7), "empty": {},
          "params": {"a": scale * jnp.arange(4 * width, dtype=dtype).reshape(4, width),
                     "b": jnp.ones(5, "bfloat16")}}


def shapes_and_shardings(state):
  mesh = sharding.make_mesh(MESH_SIZES)
  specs = {2: P(None, "fsdp")}
  places = jax.tree.map(lambda leaf: NamedSharding(mesh, specs.get(leaf.ndim, P())), state)
  return jax.eval_shape(lambda: state), places


def bits(tree):
  plain = {name: jax.random.key_data(leaf) if name == "key" else leaf
           for name, leaf in trees.named_leaves(tree).items()}
  return {name: (leaf.dtype, np.asarray(leaf).tobytes()) for name, leaf in plain.items()}


@pytest.fixture
def store(tmp_path):
  with_store = Checkpoints(tmp_path, keep_last=2, clean=True)
  yield with_store
  with_store.close()


def save(store, step, state, accuracy=0.5, progress=None):
  store.save(step, state, progress or {})
  store.score(step, accuracy)


def test_state_and_progress_are_restored_with_the_requested_shardings(store):
  state = state_of()
  save(store, 3, state, progress={"data": {"next_index": 3}})
  shapes, places = shapes_and_shardings(state)
  restored, progress = store.restore(3, shapes, places)
  assert bits(restored) == bits(state)
  assert restored["empty"] == {}
  assert restored["params"]["a"].sharding == places["params"]["a"]
  assert progress == {"data": {"next_index": 3}}


@pytest.mark.parametrize("other, words", [
    (state_of(width=4), r"params/a is float32\[4, 8\], not float32\[4, 4\]"),
    (state_of(dtype="bfloat16"), r"params/a is float32\[4, 8\], not bfloat16\[4, 8\]"),
    ({**state_of(), "more": jnp.zeros(2)}, r"more float32\[2\] is missing"),
    ({"params": {"a": jnp.ones((4, 8))}}, r"step int32\[\] is unknown"),
])
def test_another_shape_dtype_or_leaf_is_refused_by_name(store, other, words):
  """Orbax alone would silently cast a float32 checkpoint to bfloat16."""
  save(store, 3, state_of())
  with pytest.raises(ValueError, match=words):
    store.restore(3, *shapes_and_shardings(other))


def test_a_flipped_bit_is_refused(store):
  state = {"noise": jax.random.bits(jax.random.key(0), (256,)), "zero": jnp.zeros(3)}
  save(store, 3, state)
  needle = np.asarray(state["noise"][100]).tobytes()   # noise is stored uncompressed
  files = [path for path in (store.directory / "3" / "state").rglob("*") if path.is_file()]
  [file] = [path for path in files if needle in path.read_bytes()]
  raw = bytearray(file.read_bytes())
  raw[raw.find(needle)] ^= 1
  file.write_bytes(raw)
  with pytest.raises(checkpoint.Damaged, match=r"is damaged: noise changed since"):
    store.restore(3, *shapes_and_shardings(state))


def test_a_truncated_file_is_refused(store):
  state = {"noise": jax.random.bits(jax.random.key(0), (256,)), "zero": jnp.zeros(3)}
  save(store, 3, state)
  data = [path for path in (store.directory / "3" / "state").rglob("d/*") if path.is_file()]
  assert data
  for path in data:
    path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(checkpoint.Damaged, match=r"checkpoints/3 cannot be read"):
    store.restore(3, *shapes_and_shardings(state))


def test_a_checksum_depends_on_the_bits_and_not_on_the_sharding():
  x = jax.random.normal(jax.random.key(0), (8, 12))
  mesh = sharding.make_mesh(MESH_SIZES)
  spread = jax.device_put(x, NamedSharding(mesh, P("data", "fsdp")))
  assert checkpoint.checksums(x) == checkpoint.checksums(spread)
  bits_of = np.asarray(x).view(np.uint32).astype(np.uint64).ravel()
  weights = 2 * np.arange(bits_of.size, dtype=np.uint64) + 1
  assert int(checkpoint.checksums(x)) == int((bits_of * weights).sum() % 2**32)


def test_the_last_steps_and_the_best_are_kept(store, tmp_path):
  for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.6), (4, 0.7), (10, 0.8)]:
    save(store, step, state_of(), accuracy)
  assert store.steps() == [2, 4, 10]
  assert store.best() == (2, 0.9)
  assert Checkpoints(tmp_path, keep_last=2).best() == (2, 0.9)


def test_a_step_stopped_before_its_evaluation_is_kept_unscored(store):
  save(store, 1, state_of(), 0.5)
  store.save(2, state_of(), {})
  store.wait()
  assert store.steps() == [1, 2]
  assert store.best() == (1, 0.5)


@pytest.mark.parametrize("part", ["meta/metadata", "../scores.json"])
def test_json_with_a_changed_digit_is_refused(store, tmp_path, part):
  save(store, 3, state_of(), 0.25, {"data": {"next_index": 37}})
  path = store.directory / "3" / part
  text = path.read_text()
  path.write_text(text.replace("37", "36") if "37" in text else text.replace("0.25", "0.35"))
  assert path.read_text() != text
  with pytest.raises(checkpoint.Damaged, match="is damaged: its sha256 does not match"):
    Checkpoints(tmp_path, keep_last=2).restore(3, *shapes_and_shardings(state_of()))


@pytest.mark.parametrize("text", [
    "[]", "null", "[" * 10_000, '{"a": ' * 10_000 + "1" + "}" * 10_000])
def test_metadata_that_is_not_a_valid_description_counts_as_damaged(store, text):
  save(store, 3, state_of())
  (store.directory / "3" / "meta" / "metadata").write_text(text)
  with pytest.raises(checkpoint.Damaged, match="metadata is damaged"):
    store.restore(3, *shapes_and_shardings(state_of()))


def leave_rubbish(directory):
  """Leaves what kills during a save, a removal, and another program's removal would leave."""
  shutil.rmtree(directory / "1" / "state")
  (directory / "9.orbax-checkpoint-tmp").mkdir()
  (directory / "removed.0" / "state").mkdir(parents=True)
  (directory / "5" / "state").mkdir(parents=True)


def test_leftovers_of_kills_are_skipped_and_cleaned_up(store, tmp_path):
  for step in (1, 2):
    save(store, step, state_of(step), 0.1 * step)
  leave_rubbish(store.directory)
  before = sorted(os.listdir(store.directory))
  reader = Checkpoints(tmp_path, keep_last=2)
  assert reader.steps() == [2]
  assert sorted(os.listdir(store.directory)) == before       # a reader removes nothing
  again = Checkpoints(tmp_path, keep_last=2, clean=True)
  assert sorted(os.listdir(store.directory)) == ["2", "damaged.5", "scores.json"]
  assert bits(again.restore(2, *shapes_and_shardings(state_of()))[0]) == bits(state_of(2))
  save(again, 5, state_of(3), 0.0)
  assert again.steps() == [2, 5]
  again.close()


def test_a_killed_removal_leaves_no_partial_step(store, tmp_path, monkeypatch):
  for step in (1, 2, 3):
    with monkeypatch.context() as patch:   # killed before anything is deleted
      patch.setattr(shutil, "rmtree", lambda path: None)
      save(store, step, state_of(), 0.1 * step)
  assert store.steps() == [2, 3]
  assert (store.directory / "removed.1").is_dir()
  Checkpoints(tmp_path, keep_last=2, clean=True)
  assert not (store.directory / "removed.1").exists()


def test_a_failed_save_names_the_last_intact_step(store, tmp_path, monkeypatch):
  """On a full disk, the writer's own error, here from /dev/full, is one line with a remedy."""
  save(store, 1, state_of(), 0.1)

  def full(self, directory, *arguments, **keywords):
    with open("/dev/full", "w") as file:
      file.write("x")

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "async_save", full)
  with pytest.raises(OSError, match=r"step 2 in .*No space left on device; step 1 is intact"):
    save(store, 2, state_of(), 0.2)
  monkeypatch.undo()
  store.close()   # its thread may still write into the directory removed next
  again = Checkpoints(tmp_path, keep_last=2, clean=True)
  assert again.steps() == [1]
  assert bits(again.restore(1, *shapes_and_shardings(state_of()))[0]) == bits(state_of())
  save(again, 2, state_of(), 0.2)
  assert again.steps() == [1, 2]


def test_a_disk_too_full_for_the_scores_is_reported_and_the_step_kept(store, tmp_path):
  save(store, 1, state_of(), 0.1)
  (store.directory / "scores.tmp").symlink_to("/dev/full")
  with pytest.raises(OSError, match=r"scores.json cannot be written: No space .*step 2 is intact"):
    save(store, 2, state_of(), 0.2)
  again = Checkpoints(tmp_path, keep_last=2)
  assert again.steps() == [1, 2] and again.scores == {1: 0.1}


def test_tensorstores_messages_after_a_failed_read_are_not_shown():
  seen = []
  hook = checkpoint.without_closed_loop_errors(lambda *error: seen.append(error))
  for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
    hook(RuntimeError, error, None)
  assert [str(error) for _, error, _ in seen] == ["another"]


def test_a_damaged_step_can_be_set_aside_repeatedly(store):
  for expected in ("damaged.1", "damaged.1.1"):
    save(store, 1, state_of(), 0.1)
    assert store.set_aside(1).name == expected
  assert store.steps() == []
  assert store.best() is None
  assert json.loads((store.directory / "scores.json").read_text())["scores"] == {"1": 0.1}


@pytest.mark.parametrize("several,raised", [(True, processes.PeerLost), (False, OSError)])
def test_a_save_that_waits_for_a_dead_process_says_so(store, monkeypatch, several, raised):
  """The error does not blame the disk, and says that the run can be restarted."""
  def save(*_, **__):
    raise TimeoutError("Timed out while waiting for async_commit_complete barrier.")
  monkeypatch.setattr(store.writer, "save", save)
  monkeypatch.setattr(processes, "is_multiprocess", lambda: several)
  with pytest.raises(raised, match=r"step 7.*async_commit_complete barrier"):
    store.save(7, state_of(), {})
