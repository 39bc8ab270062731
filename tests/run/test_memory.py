"""--mode=memory says what a device would hold, without allocating it."""
import jax

from vitcompact.run import memory
from vitcompact.train import build


def test_the_predicted_state_of_a_device_matches_a_real_state(config):
  """Exactly: it is the bytes of the shards on device 0 of a real state."""
  config.plan, config.model.depth = "", 1
  built = build.build(build.resolve(config))
  state = built.init(jax.random.key(0))
  state = state.replace(key=jax.random.key_data(state.key))
  def on_first(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  sizes = memory.measure(built)
  assert sizes["parameters"] == on_first(state.params)
  assert sizes["optimiser"] == on_first(state.opt_state)
  assert sizes["averages"] == on_first(state.ema_params)
  assert sum(size for what, size in sizes.items() if what not in (
      "batch", "working memory", "total")) == on_first(state)
  assert sizes["batch"] == 16 // 8 * (8 * 8 * 3 + 4)
  assert sizes["working memory"] > sizes["parameters"]    # gradients at least
  assert sizes["total"] == sum(sizes.values()) - sizes["total"]


def test_each_of_eight_devices_computes_an_eighth(config, monkeypatch):
  """Of attention too: a CPU's loop over images that are spread over eight devices would run in full
  on each of them, in eight times the memory."""
  config.plan, config.mesh.fsdp, config.ema_half_life = "", 1, 0.0
  config.model.update(depth=1, image_size=48)    # 145 tokens: one device goes image by image
  config.batch_size = 64
  eight = memory.measure(build.build(build.resolve(config)))
  config.batch_size = 8
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: first)
  one = memory.measure(build.build(build.resolve(config)))
  assert one["batch"] == eight["batch"]
  assert eight["working memory"] < 3 * one["working memory"]


def test_activations_grow_with_images_per_device_and_shrink_by_remat(config):
  def kept(**changes):
    copy = config.copy_and_resolve_references()
    copy.update(changes)
    return memory.activations(build.build(build.resolve(copy)))

  config.plan = ""
  one, two = kept(batch_size=16), kept(batch_size=32)
  assert two == 2 * one
  config.model.remat = True
  assert kept(batch_size=32) < 0.5 * two


def test_the_memory_table_needs_no_data(config, monkeypatch):
  monkeypatch.setattr(memory, "measure", lambda run: {"parameters": 3 * 2**20})
  config.data.name, config.data.augment = "folder:/not/here", "randaugment"
  text = memory.table(config)
  assert "on 8 devices (data 4 x fsdp 2 x tensor 1)" in text
  assert "parameters                         3.0 MiB" in text
  assert "folder:/not/here is not available here: 1000 classes are assumed." in text
