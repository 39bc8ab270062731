"""cFFN: branches fold into two matrices, and a new layer has a dense one's output spread."""
import functools
import itertools
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vitcompact as vc
from tests import tiny
from vitcompact import attention, trees
from vitcompact.layers import gelu
from vitcompact.methods.ffn.cffn import CompactDense, hidden_rms, truncated_factors
from vitcompact.regression import sums_of
from vitcompact.train import sharding

M, D, RANK = 12, 8, 4


def branches_by_definition(params, stats, x, n, rep, avg_skip):
  """u = sum_i BN_i(H A_i) + mean_groups(H) alpha, y = sum_j BN'_j(u B_j), in numpy float64."""
  params, stats = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, stats))

  def normalised(name, y):
    if rep == "scale":
      return y * params[f"{name}_scale"]
    if rep == "none":
      return y
    norm, seen = params[f"{name}_norm"], stats[f"{name}_norm"]
    return (y - seen["mean"]) / np.sqrt(seen["var"] + 1e-5) * norm["scale"] + norm["bias"]

  x = np.asarray(x, np.float64)
  u = sum(normalised(f"a{i}", x @ params[f"a{i}"]["kernel"]) for i in range(n))
  if avg_skip:
    groups = np.stack([x[..., g * M // RANK:(g + 1) * M // RANK].mean(-1) for g in range(RANK)], -1)
    u = u + groups * params["alpha"]
  return sum(normalised(f"b{j}", u @ params[f"b{j}"]["kernel"]) for j in range(n)) + \
      params.get("bias", 0)


@pytest.mark.parametrize("rep,avg_skip,n",
                         [*itertools.product(["bn", "scale", "none"], [True, False], [1, 3])])
def test_fold_keeps_the_function_and_gives_the_deployed_tree(rep, avg_skip, n):
  x = tiny.normal(5, 3, M)
  module = CompactDense(D, RANK, branches=n, rep=rep, avg_skip=avg_skip)
  variables = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), x))
  params, stats = variables["params"], variables.get("batch_stats", {})
  expected = branches_by_definition(params, stats, x, n, rep, avg_skip)
  np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)
  deploy = module.clone(deploy=True)
  folded, left = jax.jit(module.fold)(params, stats)
  assert left == {}
  assert trees.differences({"params": folded},
                           jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  out = tiny.apply(deploy, {"params": folded}, x)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_skip_is_absent_if_the_rank_does_not_divide_the_width():
  shapes = jax.eval_shape(CompactDense(D, 5).init, jax.random.key(0), tiny.normal(2, M))
  assert "alpha" not in shapes["params"]


@pytest.mark.parametrize("rep", ["bn", "scale", "none"])
@pytest.mark.parametrize("n", [1, 2])
def test_new_layer_has_the_output_spread_of_a_dense_one(rep, n):
  width, hidden = 96, 384
  x = tiny.normal(4000, width)
  h = np.asarray(jax.jit(gelu)(x @ (0.02 * tiny.normal(width, hidden, seed=1))))
  np.testing.assert_allclose(hidden_rms(gelu, width), np.sqrt(np.mean(h ** 2)), rtol=0.05)
  dense = (h @ (0.02 * tiny.normal(hidden, width, seed=2))).std()
  module = CompactDense(width, width // 2, branches=n, rep=rep, input_rms=hidden_rms(gelu, width))
  variables = jax.jit(module.init)(jax.random.key(3), h)
  for train in (True, False):
    apply = jax.jit(functools.partial(module.apply, train=train, mutable=["batch_stats"]))
    y, _ = apply(variables, h)
    spread = np.asarray(y).std() / dense
    assert 0.6 < spread < 1.6, (train, spread)


@pytest.mark.parametrize("rep", ["bn", "scale", "none"])
def test_full_rank_factors_from_a_dense_layer_are_that_layer(rep):
  kernel, bias = tiny.normal(M, D), tiny.normal(D, seed=1)
  x = tiny.normal(64, M, seed=2) + np.float32(0.5)
  module = CompactDense(D, D, rep=rep)
  params, stats = module.from_dense({"kernel": kernel, "bias": bias})
  out = jax.jit(module.apply)({"params": params, "batch_stats": stats}, x)
  np.testing.assert_allclose(out, x @ kernel + bias[None], rtol=1e-5, atol=1e-5)
  first, second = (np.asarray(params[name]["kernel"]) for name in ("a0", "a1"))
  assert np.abs(first - second).max() > 1e-3, "equal branches"


def fit_layer(module, kernel, x):
  """Returns (params, stats) of a layer fitted to a dense layer's outputs for x."""
  sums = jax.tree.map(np.float64, jax.jit(sums_of)(x, x @ kernel))
  return module.from_dense({"kernel": kernel}, module.fit({"kernel": kernel}, (sums, sums)))


def test_calibrated_batch_norms_agree_in_training_and_inference():
  kernel = tiny.normal(M, D)
  x = (tiny.normal(256, M, seed=2) * np.arange(1, M + 1) + 0.5).astype(np.float32)
  module = CompactDense(D, RANK)
  params, stats = fit_layer(module, kernel, x)
  variables = {"params": params, "batch_stats": stats}
  seen, _ = jax.jit(lambda variables, x: module.apply(
      variables, x, True, mutable=["batch_stats"]))(variables, x)
  np.testing.assert_allclose(seen, jax.jit(module.apply)(variables, x), rtol=1e-3, atol=2e-3)


def test_fitted_factors_are_better_on_the_data_and_truncated_ones_in_the_weights():
  kernel = tiny.normal(M, D)
  x = tiny.normal(512, M, seed=2) * np.float32(2) ** -np.arange(M, dtype=np.float32)
  new, _ = fit_layer(CompactDense(D, RANK, deploy=True), kernel, x)
  a, b = (np.asarray(new[name]["kernel"]) for name in ("a", "b"))
  c, d = map(np.asarray, truncated_factors(kernel, RANK))
  assert np.linalg.norm(x @ (kernel - a @ b)) < 0.9 * np.linalg.norm(x @ (kernel - c @ d))
  assert np.linalg.norm(kernel - c @ d) < np.linalg.norm(kernel - a @ b)
  left, singular, right = np.linalg.svd(kernel)
  best = (left[:, :RANK] * singular[:RANK]) @ right[:RANK]
  np.testing.assert_allclose(c @ d, best, atol=1e-5)


def test_layers_of_equal_blocks_share_a_compiled_program(monkeypatch):
  traced, make = [], CompactDense._to_branches
  monkeypatch.setattr(CompactDense, "_to_branches",
                      lambda self, *args: traced.append(self) or make(self, *args))
  kernel = tiny.normal(M, D)
  x = tiny.normal(256, M, seed=2)
  for seed in range(3):
    fit_layer(CompactDense(D, RANK, input_rms=0.75), kernel + seed, x)
  assert len(traced) == 1


@pytest.mark.parametrize("factor", ["output", "both"])
def test_full_rank_model_equals_the_dense_one(factor):
  model = tiny.deit()
  variables, x = tiny.init(model), tiny.images(model)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1.0, factor=factor))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")      # full rank saves nothing, which gives a warning
    small, got = vc.compact(model, variables, plan)
  assert vc.verify(model, variables, small, got, x).max_rel <= 1e-5
  assert got["params"]["blocks_0"]["attn"] is variables["params"]["blocks_0"]["attn"]


def test_rank_that_saves_nothing_is_named():
  with pytest.warns(UserWarning, match=r"blocks_0/mlp/fc2: rank 22 .* break-even is rank 19"):
    tiny.deit(vc.Plan(ffn=vc.CFFN(rank_ratio=0.9)))


@pytest.mark.parametrize("fields", [{"rank_ratio": 0}, {"rank_ratio": 1.5}, {"branches": 0},
                                    {"rank_ratio": "half"}, {"branches": True}, {"avg_skip": "no"},
                                    {"rep": "ln"}, {"factor": "input"}, {"apply_to": "some"}])
def test_invalid_option_is_rejected_with_its_value(fields):
  (name, value), = fields.items()
  with pytest.raises(ValueError, match=rf"CFFN\({name}={value!r}\): must be"):
    vc.CFFN(**fields)


def test_branches_with_few_tokens_agree_on_a_mesh_and_on_one_device():
  """In jax 0.10, kernels concatenated along a sharded axis gave different results."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  site = tiny.site(ffn_width=16, hidden=32, prefix=0, query_grid=(1, 1), tokens=1)
  module = vc.CFFN().make(site, parent=None)
  x = tiny.normal(16, 1, 16)
  variables = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), x))
  rules = tiny.deit(vc.Plan(ffn=vc.CFFN())).parameter_rules()
  placed = sharding.parameters({"blocks_0": {"mlp": variables["params"]}}, rules, mesh)
  params = jax.device_put(variables["params"], placed["blocks_0"]["mlp"])
  stats = jax.device_put(variables["batch_stats"], NamedSharding(mesh, P()))

  def run(params, stats, x):
    return module.apply({"params": params, "batch_stats": stats}, x, True,
                        mutable=["batch_stats"])[0]

  one = jax.jit(run)(variables["params"], variables["batch_stats"], x)
  with attention.split_over(8):
    eight = jax.jit(run)(params, stats, jax.device_put(
        x, NamedSharding(mesh, P(("data", "fsdp")))))
  np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())
