"""InLine: the weights written out, the local term by loops, and what it composes with."""
import flax.linen as nn
import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.attention import Core
from vitcompact.methods.attention.inline import Injective

INLINE = vc.Plan(attention=vc.InLine())
LINEAR = vc.Plan(attention=vc.InLine(local=False))


def draw(*shape, seed=0):
  return tiny.normal(*shape, seed=(seed, *shape))


def arrays(queries=6, keys=5):
  return draw(2, queries, 3, 4), draw(2, keys, 3, 4, seed=1), draw(2, keys, 3, 7, seed=2)


@jax.jit
def run(query, key, value, **fields):
  """Returns the output and the maps."""
  core = Core(operator=Injective(), **fields)
  return core(query, key, value), core.maps(query, key)


def attend(*arrays, **fields):
  return np.asarray(run(*arrays, **fields)[0])


@pytest.mark.parametrize("fields", [
    {}, {"size": np.float32([[1, 3, 1, 2, 1], [1, 1, 1, 1, 5]])},
    {"keep_mask": np.float32([[1, 0, 1, 1, 1]] * 2)}])
def test_explicit_weights_give_the_output_and_sum_to_one(fields):
  query, key, value = arrays()
  out, maps = map(np.asarray, run(query, key, value, **fields))
  np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(out, np.einsum("bhnm,bmhe->bnhe", maps, value), rtol=1e-4, atol=1e-5)
  if not fields:
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) * 4 ** -0.5 / 5
    np.testing.assert_allclose(maps, scores - scores.mean(-1, keepdims=True) + 1 / 5, rtol=1e-4,
                               atol=1e-5)


def test_key_of_size_three_equals_three_equal_keys():
  query, key, value = arrays()
  size = np.float32([[1, 3, 1, 1, 1]] * 2)
  repeated = [np.concatenate([x, x[:, 1:2], x[:, 1:2]], axis=1) for x in (key, value)]
  np.testing.assert_allclose(attend(query, key, value, size=size), attend(query, *repeated),
                             rtol=1e-4, atol=1e-5)


def test_different_queries_have_different_outputs():
  """Even parallel ones, which normalised linear attention cannot distinguish."""
  query, key, value = arrays()
  assert np.abs(attend(query, key, value) - attend(2 * query, key, value)).max() > 0.1


def test_without_the_local_term_the_order_of_tokens_does_not_matter():
  query, key, value = arrays(5, 5)
  order = np.array([3, 1, 4, 0, 2])
  np.testing.assert_allclose(attend(*(x[:, order] for x in (query, key, value))),
                             attend(query, key, value)[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_local_term_convolves_each_image_with_its_own_kernel(prefix):
  height, width, heads, head_width = 2, 3, 2, 4
  channels, tokens = heads * head_width, prefix + height * width
  site = tiny.site(width=channels, heads=heads, prefix=prefix, tokens=tokens,
                   query_grid=(height, width), key_grid=(height, width))
  module = vc.InLine().make(site, parent=None)
  value, x = draw(2, tokens, heads, head_width), draw(2, tokens, channels, seed=3)
  params = tiny.randomised(jax.eval_shape(
      lambda: module.init(jax.random.key(0), Core(), value, value)))
  got = jax.jit(lambda *args: module.apply(*args, method="local_term"))(params, value, x)
  own = {name: np.asarray(leaf) for name, leaf in params["params"].items()}
  expected = np.zeros((2, tokens, channels))
  for image in range(2):
    mean = x[image].mean(axis=0)
    hidden, kernels = np.zeros(channels), np.zeros((channels, 3, 3))
    for g in range(heads):
      at = slice(g * head_width, (g + 1) * head_width)
      hidden[at] = mean[at] @ own["kernel1"][0][:, at] + own["bias1"][at]
      hidden[at] = np.asarray(jax.nn.gelu(hidden[at], approximate=False))
      taps = slice(g * head_width * 9, (g + 1) * head_width * 9)
      kernels[at] = (hidden[at] @ own["kernel2"][0][:, taps] + own["bias2"][taps]).reshape(-1, 3, 3)
    plane = np.pad(value[image, prefix:].reshape(height, width, channels),
                   [(1, 1), (1, 1), (0, 0)])
    for row in range(height):
      for column in range(width):
        window = plane[row:row + 3, column:column + 3]
        expected[image, prefix + row * width + column] = np.einsum("stc,cst->c", window, kernels)
  np.testing.assert_allclose(np.reshape(got, expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads,image_size,width,params,macs", [
    (6, 224, 384, 25_045_864, 4.3694), (12, 224, 384, 23_571_304, 4.3098)])
def test_counts_match_the_specification(heads, image_size, width, params, macs):
  got = vc.count(vc.create_model("deit_small_patch16_224", heads=heads, width=width,
                                 image_size=image_size, plan=INLINE))
  assert got.params == params
  assert got.macs / 1e9 == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("plan", [INLINE, LINEAR], ids=["local", "linear"])
def test_queries_keys_and_values_are_taken_from_a_dense_model(plan):
  dense = tiny.deit()
  variables = tiny.init(dense)
  for images in (None, np.asarray(tiny.images(dense, 8))):
    model, got = vc.compact(dense, variables, plan, images=images)
    for name in ("query", "key", "value", "out"):
      np.testing.assert_array_equal(got["params"]["blocks_1"]["attn"][name]["kernel"],
                                    variables["params"]["blocks_1"]["attn"][name]["kernel"])
    assert np.isfinite(tiny.apply(model, got, tiny.images(model))).all()


def test_hallucinated_maps_are_filtered_weights():
  """Filtering values and outputs gives what the filtered maps give, as with a softmax."""
  model = tiny.deit(vc.Plan(attention=vc.InLine(local=False), heads=vc.HMHSA()), depth=1)
  variables = tiny.init(model)

  @jax.jit
  def run(variables, x):
    seen = {}

    def watch(next_fun, args, kwargs, context):
      out = next_fun(*args, **kwargs)
      if context.module.name == "hallucinate" and context.method_name == "__call__":
        seen.update(value=args[2], out=out)
      return out

    with nn.intercept_methods(watch):
      _, sown = model.apply(variables, x, mutable=["maps"])
    return sown["maps"]["blocks_0"]["attn"]["hallucinate"]["maps"][0], seen

  maps, seen = run(variables, tiny.images(model))
  np.testing.assert_allclose(np.einsum("bhnm,bmhd->bnhd", maps, seen["value"]), seen["out"],
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan,message", [
    ({"tokens": vc.ToMe(r=2)}, "use local=False"),
    ({"tokens": vc.EViT(blocks=(0,)), "attention": vc.InLine(local=False)}, "use ToMe there"),
    ({"tokens": vc.MCTF(r=2), "attention": vc.InLine(local=False)}, "use ToMe there"),
    ({"heads": vc.HeadPruning()}, "use local=False"),
    ({"heads": vc.HMHSA(site="logits")}, "use site='probs'")])
def test_incompatible_methods_are_rejected(plan, message):
  with pytest.raises(ValueError, match=message):
    tiny.deit(vc.Plan(**{"attention": vc.InLine(), **plan}))


def test_merged_tokens_count_by_their_size():
  model = tiny.deit(vc.Plan(attention=vc.InLine(local=False), tokens=vc.ToMe(r=4)))
  assert tiny.apply(model, tiny.init(model), tiny.images(model)).shape == (3, 5)


def test_local_term_requires_as_many_keys_as_queries():
  with pytest.raises(ValueError, match=r"sr_ratios=\(1, 1, 1, 1\)"):
    vc.create_model("pvt_tiny", plan=INLINE)
  with pytest.raises(ValueError, match="local='yes'"):
    vc.InLine(local="yes")
