"""What is restored is what was saved: every bit, on the shardings asked for, or an error."""
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vitcompact import trees
from vitcompact.data.batches import Batches
from vitcompact.train import checkpoint, sharding
from vitcompact.train.checkpoint import Checkpoints

MESH_SIZES = {"data": 2, "fsdp": 4}


def state_of(scale=1.0, width=8, dtype="float32"):
  return {"step": jnp.array(3), "key": jax.random.key(7), "empty": {},
          "params": {"a": scale * jnp.arange(4 * width, dtype=dtype).reshape(4, width),
                     "b": jnp.ones(5, "bfloat16")}}


def shapes_and_places(state):
  mesh = sharding.make_mesh(MESH_SIZES)
  specs = {2: P(None, "fsdp")}
  places = jax.tree.map(lambda leaf: NamedSharding(mesh, specs.get(leaf.ndim, P())), state)
  return jax.eval_shape(lambda: state), places


def bits(tree):
  plain = {name: jax.random.key_data(leaf) if name == "key" else leaf
           for name, leaf in trees.named_leaves(tree).items()}
  return {name: (leaf.dtype, np.asarray(leaf).tobytes()) for name, leaf in plain.items()}


def numbers():
  return Batches(grain.MapDataset.range(100), workers=0)


@pytest.fixture
def store(tmp_path):
  with_store = Checkpoints(tmp_path, keep_last=2)
  yield with_store
  with_store.close()


def save(store, step, state, accuracy=0.5, data=None):
  store.save(step, state, data or numbers(), accuracy)
  store.wait()


def test_a_state_and_the_place_in_the_data_come_back_on_the_shardings_asked_for(store):
  state, data = state_of(), numbers()
  assert [next(data) for _ in range(3)] == [0, 1, 2]
  save(store, 3, state, data=data)
  shapes, places = shapes_and_places(state)
  again = numbers()
  restored = store.restore(3, shapes, places, again)
  assert bits(restored) == bits(state)
  assert restored["empty"] == {}
  assert restored["params"]["a"].sharding == places["params"]["a"]
  assert next(again) == 3


@pytest.mark.parametrize("other, words", [
    (state_of(width=4), r"params/a is float32\[4, 8\], not float32\[4, 4\]"),
    (state_of(dtype="bfloat16"), r"params/a is float32\[4, 8\], not bfloat16\[4, 8\]"),
    ({**state_of(), "more": jnp.zeros(2)}, r"more float32\[2\] is missing"),
    ({"params": {"a": jnp.ones((4, 8))}}, r"step int32\[\] is unknown"),
])
def test_another_shape_dtype_or_leaf_is_refused_by_name(store, other, words):
  """Orbax alone casts a float32 checkpoint to bfloat16 without a word."""
  save(store, 3, state_of())
  with pytest.raises(ValueError, match=words):
    store.restore(3, *shapes_and_places(other))


def test_a_flipped_bit_is_refused(store):
  state = {"noise": jax.random.bits(jax.random.key(0), (256,)), "zero": jnp.zeros(3)}
  save(store, 3, state)
  needle = np.asarray(state["noise"][100]).tobytes()   # noise does not compress: it lies as it is
  files = [path for path in (store.directory / "3" / "state").rglob("*") if path.is_file()]
  [file] = [path for path in files if needle in path.read_bytes()]
  raw = bytearray(file.read_bytes())
  raw[raw.find(needle)] ^= 1
  file.write_bytes(raw)
  with pytest.raises(ValueError, match=r"is damaged: noise changed .* remove that directory"):
    store.restore(3, *shapes_and_places(state))


def test_a_file_that_was_cut_off_is_refused(store):
  state = {"noise": jax.random.bits(jax.random.key(0), (256,)), "zero": jnp.zeros(3)}
  save(store, 3, state)
  data = [path for path in (store.directory / "3" / "state").rglob("d/*") if path.is_file()]
  assert data
  for path in data:
    path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(ValueError, match=r"checkpoints/3 cannot be read.* remove that directory"):
    store.restore(3, *shapes_and_places(state))


def test_a_checksum_is_of_the_bits_and_not_of_where_they_lie():
  x = jax.random.normal(jax.random.key(0), (8, 12))
  mesh = sharding.make_mesh(MESH_SIZES)
  spread = jax.device_put(x, NamedSharding(mesh, P("data", "fsdp")))
  assert checkpoint.checksums(x) == checkpoint.checksums(spread)
  bits_of = np.asarray(x).view(np.uint32).astype(np.uint64).ravel()
  weights = 2 * np.arange(bits_of.size, dtype=np.uint64) + 1
  assert int(checkpoint.checksums(x)) == int((bits_of * weights).sum() % 2**32)


def test_the_last_ones_and_the_best_are_kept(store):
  for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.6), (4, 0.7), (5, 0.8)]:
    save(store, step, state_of(), accuracy)
  assert store.steps() == [2, 4, 5]
  assert store.best() == (2, 0.9)


def test_a_step_that_a_killed_clean_up_left_half_deleted_does_no_harm(store, tmp_path):
  for step in (1, 2):
    save(store, step, state_of(step), 0.1 * step)
  shutil.rmtree(store.directory / "1" / "state")
  shutil.rmtree(store.directory / "1" / "metrics")
  (store.directory / "9.orbax-checkpoint-tmp").mkdir()   # and a save that was killed
  again = Checkpoints(tmp_path, keep_last=2)
  assert again.steps() == [2]
  assert bits(again.restore(2, *shapes_and_places(state_of()))) == bits(state_of(2))
  save(again, 3, state_of(3), 0.0)
  assert again.steps() == [2, 3]
  again.close()
