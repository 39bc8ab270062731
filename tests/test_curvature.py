"""The expected cost of an error in a branch, against random errors that are added there."""
import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import tiny
from vitcompact.curvature import kl_per_error
from vitcompact.measure import divergence

SPREAD = 0.02   # scale of the random errors, relative to the output
DRAWS = 24
BRANCHES = {("blocks_0", "heads"): ("blocks_0", "attn", "out"),
            ("blocks_0", "ffn"): ("blocks_0", "mlp"),
            ("blocks_1", "heads"): ("blocks_1", "attn", "out"),
            ("blocks_1", "ffn"): ("blocks_1", "mlp")}


def with_errors(model, variables, x, path, seed):
  """Returns a model's output with random errors added to the output of the module at `path`, spread
  evenly over tokens and channels."""
  def add(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name != "__call__" or context.module.path != path:
      return out
    size = np.sqrt(np.mean(np.var(np.asarray(out).reshape(-1, out.shape[-1]), axis=0)))
    return out + SPREAD * size * jax.random.normal(jax.random.key(seed), out.shape)

  with nn.intercept_methods(add):
    return np.asarray(model.apply(variables, x))


@pytest.mark.parametrize("classes", [10, 0])
def test_the_curvature_predicts_the_cost_of_small_random_errors(classes):
  model = tiny.deit(drop_path_rate=0.0, num_classes=classes)
  variables, x = tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=16))
  if classes:   # errors also shift all logits together, which costs nothing
    head = variables["params"]["head"]
    head["kernel"] = head["kernel"] + 2 * np.linspace(-1, 1, len(head["kernel"]))[:, None]
  # Many random combinations of the logits of each image, in one batch.
  found = kl_per_error(model, variables, np.tile(x, (8, 1, 1, 1)), 17 * 16)
  dense = np.asarray(model.apply(variables, x))
  ratios = []
  for (name, axis), path in BRANCHES.items():
    lost = [divergence(dense, out) if classes else
            np.sum((out - dense) ** 2) / (2 * len(x))
            for out in (with_errors(model, variables, x, path, seed) for seed in range(DRAWS))]
    ratios.append(found[name][axis] * SPREAD ** 2 / np.mean(lost))
    assert found[name]["attention"] == found[name]["heads"]
  assert ratios == pytest.approx([1] * 4, rel=0.25)


def test_the_chunk_size_does_not_change_the_expected_cost(monkeypatch):
  """Chunks have different random keys: with one combination per image, sums agree only roughly."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=32))
  one = kl_per_error(model, variables, x, 1)
  many = kl_per_error(model, variables, x, 2 ** 16)   # 8 images at a time
  for name, costs in one.items():
    assert costs == pytest.approx(many[name], rel=0.6)
