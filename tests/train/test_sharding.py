"""Parameters are split over fsdp and batches over all devices; nothing large is replicated."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vitcompact as vc
from tests.tiny_run import tiny_config
from vitcompact import trees
from vitcompact.run import loop
from vitcompact.train import sharding


def test_mesh_takes_all_devices_and_keeps_axes_automatic():
  mesh = sharding.make_mesh({"data": -1, "fsdp": 4})
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("sizes, words", [
    ({"data": 3, "fsdp": 1}, "does not multiply out to 8 devices"),
    ({"data": -1, "fsdp": 3}, "does not multiply out to 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one may be -1"),
    ({"data": 0, "fsdp": 1}, "sizes must be positive"),
    ({"data": 8, "pipe": 1}, "unknown axes"),
])
def test_impossible_mesh_is_rejected(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(sizes)


@pytest.mark.parametrize("shape, axes, expected", [
    ((96, 384), ("embed", "mlp"), P("fsdp", None)),
    ((384, 96), ("mlp", "embed"), P(None, "fsdp")),
    ((128, 48), ("mlp", "rank"), P("fsdp", None)),
    ((90, 48), ("mlp", "rank"), P(None, "fsdp")),    # mlp is not divisible by 4, rank is
    ((2, 1, 3), (), P(None, None, None)),
    ((10,), ("classes",), P(None)),
    ((90,), ("embed",), P(None)),                    # not divisible, but small
])
def test_first_divisible_axis_is_split(shape, axes, expected):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  assert sharding.partition("leaf", shape, trees.Leaf(axes), mesh) == expected


@pytest.mark.parametrize("shape, axes", [((90, 1000), ("embed", "classes")), ((128, 128), ())])
def test_large_leaf_that_would_be_replicated_is_rejected(shape, axes):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  with pytest.raises(ValueError, match=r"blocks_0/x \(\d+, \d+\).*choose an fsdp"):
    sharding.partition("blocks_0/x", shape, trees.Leaf(axes), mesh)


def test_rule_of_another_rank_is_rejected():
  mesh = sharding.make_mesh({"data": -1})
  with pytest.raises(ValueError, match="2 dimensions"):
    sharding.partition("leaf", (3, 4), trees.Leaf(("embed",)), mesh)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_base_distilled_patch16_224"])
@pytest.mark.parametrize("plan", [vc.Plan(), vc.Plan(heads=vc.HMHSA(rank=2), ffn=vc.CFFN())],
                         ids=["dense", "compact"])
def test_no_large_leaf_of_a_model_is_replicated(name, plan):
  model = vc.create_model(name, plan=plan)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  shardings = trees.named_leaves(sharding.parameters(params, model.parameter_rules(), mesh))
  for leaf_name, leaf in trees.named_leaves(params).items():
    local = shardings[leaf_name].shard_shape(leaf.shape)
    if leaf.size >= sharding.SMALL:
      assert np.prod(local) == leaf.size // 4, leaf_name


def test_state_is_created_sharded_with_moments_and_averages_split_alike(built):
  state = built.init(jax.random.key(0))
  local = {name: leaf.addressable_shards[0].data.shape
           for name, leaf in trees.named_leaves(state).items()}
  kernel = "blocks_0/mlp/fc1/kernel"
  moments = {name for name in local if name.startswith("opt_state") and name.endswith(kernel)}
  assert len(moments) == 2
  for name in {f"params/{kernel}", f"ema_params/{kernel}", *moments}:
    assert local[name] == (16 // 2, 64), name
  assert local["batch_stats/blocks_0/mlp/fc2/a0_norm/mean"] == (8,)
  assert local["step"] == ()


def batch_of(count: int):
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (count, 8, 8, 3), np.uint8),
          "label": rng.integers(0, 10, count, np.int32)}


@pytest.fixture(scope="module")
def tensor_parallel_run():
  """Builds the tiny run on 2 x 2 x 2 devices."""
  config = tiny_config()
  config.mesh.tensor = 2
  return loop.build(loop.resolve(config))


@pytest.mark.parametrize("mesh", ["built", "tensor_parallel_run"])
def test_eight_devices_take_the_same_step_as_one(mesh, built_on_one, request):
  """Gradients (Adam's first moment is a tenth of them), batch statistics, loss agree within 1e-5,
  with mixing, erasing, stochastic depth and batch norm over the global batch."""
  built = request.getfixturevalue(mesh)
  start = built_on_one.init(jax.random.key(1))
  start = jax.tree.map(np.array, start.replace(key=jax.random.key_data(start.key)))
  ends = []
  for run in (built, built_on_one):
    state = start.replace(key=jax.random.wrap_key_data(start.key))
    state = jax.device_put(state, run.shardings)
    state, metrics = run.step_at(0)(state, sharding.put_batch(batch_of(16), run.mesh))
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    ends.append(jax.device_get((moment, state.batch_stats, metrics)))
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(ends[0][0]))
  for eight, one in zip(*(jax.tree.leaves(end) for end in ends), strict=True):
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5 * scale)


def test_tensor_axis_splits_heads_and_hidden_channels(tensor_parallel_run):
  """Devices that share a layer's heads see the same images."""
  run = tensor_parallel_run
  assert dict(run.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  specs = {name: place.spec for name, place in trees.named_leaves(run.shardings.params).items()}
  assert specs["blocks_0/mlp/fc1/kernel"] == P("fsdp", "tensor")
  assert {"tensor", "fsdp"} <= {axis for name, spec in specs.items() if "attn" in name
                                for axis in spec}
  images = sharding.put_batch(batch_of(16), run.mesh)["image"]
  assert {shard.data.shape for shard in images.addressable_shards} == {(4, 8, 8, 3)}


def test_batch_is_split_over_every_device_and_must_be_divisible():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  images = sharding.put_batch(batch_of(16), mesh)["image"]
  assert isinstance(images.sharding, NamedSharding)
  assert {shard.data.shape for shard in images.addressable_shards} == {(2, 8, 8, 3)}
  with pytest.raises(ValueError, match=r"batch_size=12 cannot be split over 8 .* such as 16"):
    sharding.check_batch("batch_size", 12, mesh)


def test_config_chooses_the_mesh(built):
  assert dict(built.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
  assert loop.process_ids() == {"process_index": 0, "process_count": 1}
