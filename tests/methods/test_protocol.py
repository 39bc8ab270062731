"""A user's own method, one file and one entry in the list, behaves like any other method.

The files are in `own/`; they import only public names.
"""
import ast
import dataclasses
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.methods.own.drop_tokens import KeepLargest
from tests.methods.own.gate_heads import Gate
from tests.methods.own.glu_ffn import GLU
from tests.methods.own.window_attention import Window
from vitcompact import trees
from vitcompact.train.config import complete
from vitcompact.train.objective import make_objective

OWN = {"heads": ("gate", Gate), "attention": ("window", Window),
       "tokens": ("largest", KeepLargest), "ffn": ("glu", GLU)}
ONE_METHOD = {"heads": Gate(), "attention": Window(), "tokens": KeepLargest(0.5, blocks=(0,)),
         "ffn": GLU()}
# Each is combined with a method of every other axis. A window needs the grid, lost at block 1.
BLOCKS = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
TOGETHER = {
    "heads": {"heads": Gate(), "attention": BLOCKS, "tokens": vc.EViT(0.6, blocks=(0,)),
              "ffn": vc.CFFN()},
    "attention": {"heads": vc.HMHSA(layout="grid"), "attention": Window(), "ffn": vc.CFFN(),
                  "tokens": vc.DynamicViT(0.6, blocks=(1,)),
                  "blocks": {1: {"attention": None, "heads": vc.HMHSA()}}},
    "tokens": {"heads": vc.HMHSA(), "attention": vc.Sparsifiner(0.5, rank=4),
               "tokens": KeepLargest(0.5, blocks=(0,)), "ffn": vc.CFFN()},
    "ffn": {"heads": vc.HMHSA(), "attention": BLOCKS, "tokens": vc.ToMe(r=3), "ffn": GLU()},
}
AXES = pytest.mark.parametrize("axis", OWN)


@pytest.fixture(autouse=True)
def list_own_methods(monkeypatch):
  for axis, (name, kind) in OWN.items():
    monkeypatch.setitem(vc.METHODS[axis], name, kind)


@functools.cache
def with_one_method(axis):
  """Returns (model with one of our own methods, random variables, images)."""
  model = tiny.deit(vc.Plan(**{axis: ONE_METHOD[axis]}), drop_path_rate=0.0)
  return model, tiny.init(model), tiny.images(model)


def own_leaves(axis) -> set[str]:
  """Returns the names of parameters that the dense model lacks or has in another shape."""
  leaves, dense = (trees.named_leaves(variables["params"])
                   for variables in (with_one_method(axis)[1], tiny.init(tiny.deit())))
  return {name for name, leaf in leaves.items()
          if name not in dense or dense[name].shape != leaf.shape}


def test_files_are_short_and_import_only_public_names():
  for path in (pathlib.Path(__file__).parent / "own").glob("*.py"):
    text = path.read_text()
    assert len(text.splitlines()) <= 50, path
    names = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.startswith("vitcompact.methods.")}, path


@AXES
def test_own_method_trains(axis):
  """Every parameter of the method gets a gradient from the labels alone."""
  model, variables, x = with_one_method(axis)

  def loss(params):
    return jnp.sum(jnp.sin(tiny.apply(model, {"params": params}, x, train=True)))

  own = own_leaves(axis)
  assert bool(own) == (axis in ("heads", "ffn"))
  for name, leaf in trees.named_leaves(jax.jit(jax.grad(loss))(variables["params"])).items():
    assert np.isfinite(leaf).all() and (name not in own or np.any(leaf)), name


def test_its_loss_is_added_with_its_weight():
  model, variables, x = with_one_method("heads")
  config = {"model.name": "deit_tiny_patch16_224", "model.image_size": 32,
            "plan": model.plan.to_json(), "batch_size": 3}
  labels = jnp.array([0, 1, 2])

  def loss_at(weight):
    loss = complete({**config, "loss.gate_balance": weight}).loss
    total, (_, metrics) = make_objective(model, loss)(
        variables["params"], {}, None, x, labels, jax.nn.one_hot(labels, 5), jax.random.key(0))
    return total, metrics

  (without, metrics), (total, weighted) = loss_at(0.0), loss_at(3.0)
  assert "loss_gate_balance" not in metrics and weighted["loss_gate_balance"] > 0
  np.testing.assert_allclose(total, without + 3 * weighted["loss_gate_balance"], rtol=1e-6)
  gates = [2 / (1 + np.exp(-gate_scores(variables, i))) for i in range(2)]
  expected = np.mean([np.var(gate.mean(axis=1), axis=-1).mean() for gate in gates])
  np.testing.assert_allclose(weighted["loss_gate_balance"], expected, rtol=1e-4)
  assert complete(config).loss.gate_balance == 0.1
  with pytest.raises(ValueError, match=r"gate_balance.*is a setting of Gate, which the plan does"):
    complete({**config, "plan": "", "loss.gate_balance": 1.0})


def gate_scores(variables, block: int):
  """Returns (B, N, heads) before the sigmoid, from the features passed through the model."""
  model, _, x = with_one_method("heads")
  captured = tiny.apply(model, variables, x, mutable=["intermediates"],
                        capture_intermediates=lambda m, _: m.name == "score")[1]
  return np.asarray(captured["intermediates"][f"blocks_{block}"]["attn"]["gate"]["score"][
      "__call__"][0])


@AXES
def test_own_method_folds_to_the_same_function_and_the_expected_tree(axis):
  model, variables, x = with_one_method(axis)
  deploy, folded = vc.fold(model, variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, x), tiny.apply(model, variables, x),
                             atol=1e-5)
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == []


def test_own_method_is_counted():
  """For a block of 17 tokens of width 24, with 4 heads of 6."""
  dense = vc.count(tiny.deit())
  gate, window, fewer, glu = (vc.count(with_one_method(axis)[0]) for axis in OWN)
  assert gate.params - dense.params == 2 * (24 * 4 + 4)
  assert gate.macs - dense.macs == 2 * 17 * 24 * 4
  # The mask leaves 100 pairs of neighbours on a 4 x 4 grid, and 33 with the class token.
  pairs = 133
  assert window.attention_macs == dense.attention_macs and window.params == dense.params
  assert window.ideal_attention_macs == 2 * 2 * 4 * 6 * pairs
  assert fewer.params == dense.params
  assert fewer.attention_macs / dense.attention_macs == pytest.approx((1 + (9 / 17) ** 2) / 2)
  assert glu.params - dense.params == 2 * (3 * 24 * 64 + 64 - (2 * 24 * 96 + 96) + 64)


@AXES
def test_every_parameter_has_a_rule(axis):
  model, variables, _ = with_one_method(axis)
  rules = trees.first_match(model.parameter_rules(), variables["params"], may_be_idle=True)
  flat = {trees.name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
      rules, is_leaf=lambda x: isinstance(x, trees.Leaf))}
  assert flat.keys() == trees.named_leaves(variables["params"]).keys()
  if axis == "ffn":      # its parameters have common names, and common rules apply to them
    assert flat["blocks_0/mlp/fc1/kernel"] == trees.Leaf(("embed", "mlp"), decay=True)
  if axis == "heads":    # it has no rules: only its kernels decay
    assert flat["blocks_0/attn/gate/score/kernel"] == trees.Leaf(decay=True)
    assert flat["blocks_0/attn/gate/score/bias"] == trees.Leaf()


@AXES
def test_own_method_is_saved_loaded_and_round_trips_through_pytorch(axis, tmp_path):
  model, variables, _ = with_one_method(axis)
  vc.save(tmp_path / "own.safetensors", model, variables)
  loaded, loaded_variables = vc.load(tmp_path / "own.safetensors")
  assert loaded == model and trees.digest(loaded_variables) == trees.digest(variables)
  state = vc.to_torch(model, variables)
  assert trees.digest(vc.from_torch(model, state)) == trees.digest(variables)
  if axis == "heads":
    assert "blocks.0.attn.gate.score.kernel" in state


@AXES
def test_dense_model_is_compacted_to_it(axis):
  dense = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(dense), tiny.images(dense)
  small, got = vc.compact(dense, variables, vc.Plan(**{axis: ONE_METHOD[axis]}))
  assert trees.differences(got, jax.eval_shape(small.init, jax.random.key(0), x)) == []
  old, new, own = *map(trees.named_leaves, (variables["params"], got["params"])), own_leaves(axis)
  assert all(new[name] is old[name] for name in new.keys() - own)
  if axis == "heads":      # all gates are 1
    np.testing.assert_allclose(tiny.apply(small, got, x), tiny.apply(dense, variables, x),
                               atol=1e-5)


@AXES
def test_it_composes_with_a_method_of_every_other_axis(axis):
  model = tiny.deit(vc.Plan(**TOGETHER[axis]), drop_path_rate=0.0)
  acting = {type(method) for site in model.sites() for method in model.plan.at(site).present()}
  assert len(acting) == 4 and OWN[axis][1] in acting
  assert vc.Plan.from_json(model.plan.to_json()) == model.plan
  variables, x = tiny.init(model), tiny.images(model)

  for name, grad in tiny.gradients(model, variables, x).items():
    assert np.isfinite(grad).all(), name
  deploy, folded = vc.fold(model, variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, x), tiny.apply(model, variables, x),
                             rtol=1e-4, atol=1e-4)
  count = vc.count(model)
  assert 0 < count.ideal_macs <= count.macs


@pytest.mark.parametrize("name", ["pvt_v2_b2_li", "nextvit_small", "davit_tiny"])
def test_it_applies_to_hierarchical_models_where_its_needs_are_met(name):
  # Within DaViT's windows, the model determines who attends to whom.
  attention = None if name == "davit_tiny" else Window()
  plan = vc.Plan(heads=Gate(), attention=attention, ffn=GLU())
  model = vc.create_model(name, plan=plan, image_size=64)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tiny.images(model, 1))["params"]
  assert trees.first_match(model.parameter_rules(), shapes, may_be_idle=True)
  attending = [site for site in model.sites() if "attention" in site.provides]
  assert all("gate" in shapes[f"blocks_{site.block}"]["attn"] for site in attending)
  assert {plan.at(site).attention for site in attending} <= {None, Window()}
  assert "gate" in shapes["blocks_0"]["mlp"]


@pytest.mark.parametrize("make,words", [
    (lambda: tiny.deit(vc.Plan(attention=Window(), tokens=vc.EViT(0.5, blocks=(0,)))),
     "Window() in block 0 needs the whole grid of tokens, which EViT("),
    (lambda: tiny.deit(vc.Plan(attention=Window(), tokens=vc.MCTF(r=3, blocks=(1,)))),
     "use attention=None there"),
    (lambda: tiny.deit(vc.Plan(heads=vc.HMHSA(layout="grid"), tokens=KeepLargest(0.5, (0,)))),
     "which KeepLargest(keep=0.5, blocks=(0,)) removes from block 0 onward; use layout='map'"),
    (lambda: vc.create_model("pvt_tiny", plan=vc.Plan(tokens=KeepLargest(0.5, (1,)))),
     "needs tokens that may be dropped or merged, which pvt_tiny does not have; use tokens=None"),
    (lambda: tiny.deit(vc.Plan(tokens=KeepLargest())), "the plan names block 3, but the model has"),
    (lambda: vc.create_model("nextvit_small", plan=vc.Plan(blocks={0: {"heads": Gate()}})),
     "gives block 0 a method of heads, but it has no attention"),
    (lambda: vc.create_model("pvt_v2_b2", plan=vc.Plan(attention=Window(), blocks={
        0: {"attention": Gate()}})), "Gate() is not a method of this axis; use Sparsifiner, "),
])
def test_it_is_rejected_with_the_reason_where_its_needs_are_not_met(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def a_class(axis, frozen=True, **members):
  kind = types.new_class("Mine", exec_body=lambda space: space.update(
      {"axis": axis, "__annotations__": {}, **members}))
  return dataclasses.dataclass(frozen=frozen)(kind)


@pytest.mark.parametrize("axis,kind,words", [
    ("heads", a_class("heads"), "must have a method make, see vitcompact/methods/protocol.py"),
    ("ffn", a_class("ffn"), "must have a method make"),
    ("ffn", a_class("ffn", make=lambda *args: None, mergeable=lambda *args: ("fc2",)),
     "has mergeable, so it must have a method merge"),
    ("tokens", a_class("tokens", make=lambda *args: None), "must have a method reduction"),
    ("heads", a_class("ffn", make=lambda *args: None), "must have axis = 'heads'"),
    ("heads", a_class("heads", frozen=False, make=lambda *args: None), "be a frozen dataclass"),
    ("heads", type("Mine", (), {"axis": "heads", "make": None}), "must be a frozen dataclass"),
])
def test_class_with_a_missing_member_is_rejected_in_one_line(
    axis, kind, words, monkeypatch):
  monkeypatch.setitem(vc.METHODS[axis], "mine", kind)
  with pytest.raises(ValueError) as error:
    vc.Plan(**{axis: kind()})
  assert words in str(error.value) and "\n" not in str(error.value)
  assert f"Mine, listed in METHODS[{axis!r}]" in str(error.value)


def test_unlisted_method_is_rejected_with_the_line_that_would_list_it(monkeypatch):
  monkeypatch.delitem(vc.METHODS["heads"], "gate")
  with pytest.raises(ValueError) as error:
    vc.Plan(heads=Gate())
  assert "vitcompact.METHODS['heads'][NAME] = CLASS" in str(error.value)
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match=r"unknown name 'gate'; use one of \[.*'hmhsa'"):
    vc.Plan.from_json('{"heads": {"method": "gate"}}')


def test_listed_methods_are_public_names():
  """So a method inside the package takes one file and one line."""
  with pytest.raises(AttributeError, match="no attribute 'Listed'"):
    _ = vc.Listed
  listed = type("Listed", (Gate,), {})
  vc.METHODS["heads"]["listed"] = listed
  try:
    assert vc.Listed is listed
  finally:
    del vc.METHODS["heads"]["listed"], vc.__dict__["Listed"]
