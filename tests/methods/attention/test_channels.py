"""Channel attention as a method: counts, symmetries, what it composes with."""
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.attention import Core
from vitcompact.methods.attention.channels import Operator

CHANNELS = vc.Plan(attention=vc.ChannelAttention())


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


def arrays(tokens=7):
  return [draw(2, tokens, 3, 4, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("scale", ["width", "tokens"])
def test_output_matches_the_map_of_keys_and_values_written_out(scale):
  query, key, value = (np.asarray(x) for x in arrays())
  got = Core(operator=Operator(scale))(*arrays())
  factor = (4 if scale == "width" else 7) ** -0.5
  for image in range(2):
    for head in range(3):
      scores = factor * key[image, :, head].T @ value[image, :, head]
      maps = np.exp(scores - scores.max(axis=-1, keepdims=True))
      maps /= maps.sum(axis=-1, keepdims=True)
      np.testing.assert_allclose(got[image, :, head], query[image, :, head] @ maps.T, rtol=1e-4,
                                 atol=1e-5)


@pytest.mark.parametrize("name,every,half", [
    ("deit_small_patch16_224", 4.3574, 4.4781),
    pytest.param("deit_tiny_patch16_224", 1.1329, 1.1933, marks=pytest.mark.slow),
    pytest.param("deit_base_patch16_224", 17.0809, 17.3224, marks=pytest.mark.slow)])
def test_counts_match_the_specification(name, every, half):
  alternating = vc.Plan(attention=vc.ChannelAttention(),
                        blocks={block: {"attention": None} for block in range(0, 12, 2)})
  for plan, macs in ((CHANNELS, every), (alternating, half)):
    got = vc.count(vc.create_model(name, plan=plan))
    assert got.macs / 1e9 == pytest.approx(macs, abs=5e-5)
    assert got.params == vc.count(vc.create_model(name)).params


def test_doubling_the_tokens_doubles_the_scores_unless_scaled_by_tokens():
  query, key, value = arrays()
  twice = [jnp.concatenate([x, x], axis=1) for x in (query, key, value)]
  for scale, factor in (("width", 2.0), ("tokens", 2.0 ** 0.5)):
    operator = Operator(scale)
    got = Core(operator=operator)(*twice)[:, :7]
    np.testing.assert_allclose(got, Core(operator=operator)(query, factor * key, value), rtol=1e-4,
                               atol=1e-5)


def test_token_of_size_2_counts_twice_and_a_masked_token_not_at_all():
  query, key, value = arrays()
  size = jnp.ones((2, 7)).at[:, 2].set(2)
  core = Core(operator=Operator("width"))
  np.testing.assert_allclose(
      core._replace(size=size)(query, key, value),
      core(query, *(jnp.concatenate([x, x[:, 2:3]], axis=1) for x in (key, value))), rtol=1e-4,
      atol=1e-5)
  keep = jnp.ones((2, 7)).at[:, 3:].set(0)
  np.testing.assert_allclose(core._replace(keep_mask=keep)(query, key, value),
                             core(query, key[:, :3], value[:, :3]), rtol=1e-4, atol=1e-5)


def test_it_composes_with_mixtures_of_heads_including_from_images():
  dense = tiny.deit()
  plan = vc.Plan(attention=vc.ChannelAttention(), heads=vc.MoH())
  model, variables = vc.compact(dense, tiny.init(dense), plan,
                                images=np.asarray(tiny.images(dense, 8)))
  assert np.isfinite(tiny.apply(model, variables, tiny.images(model))).all()


@pytest.mark.parametrize("plan,message", [
    ({"heads": vc.HMHSA()}, "needs attention maps over tokens, which ChannelAttention"),
    ({"heads": vc.HeadPruning()}, "needs attention maps over tokens, which ChannelAttention"),
    ({"tokens": vc.EViT(blocks=(0,))}, "use ToMe there"),
    ({"tokens": vc.MCTF(r=2)}, "use ToMe there")])
def test_incompatible_methods_are_rejected(plan, message):
  with pytest.raises(ValueError, match=message):
    tiny.deit(vc.Plan(attention=vc.ChannelAttention(), **plan))
  with pytest.raises(ValueError, match="scale='rows'"):
    vc.ChannelAttention(scale="rows")


def test_reduced_keys_are_rejected():
  with pytest.raises(ValueError, match="3136 queries and 49 keys"):
    vc.create_model("pvt_tiny", plan=CHANNELS)
