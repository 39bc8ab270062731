"""Tuning changes the form, never the function, and its choices are saved with the model."""
import importlib

import jax
import numpy as np
import pytest
from jax import export

import vitcompact as vc
from tests import tiny
from vitcompact import attention, bench, convert, trees
from vitcompact.methods.ffn.cffn import CompactDense

tuning = importlib.import_module("vitcompact.tune")   # `vitcompact.tune` is the function
PLAN = vc.Plan(heads=vc.HMHSA(), tokens=vc.ToMe(r=4),
               ffn=vc.CFFN(factor="both", rank_ratio=0.25), blocks={0: {"heads": None}})


@pytest.fixture(scope="module")
def folded():
  """(training form, its variables, deployed form, its variables, images)."""
  model = tiny.deit(PLAN)
  variables = tiny.init(model)
  return model, variables, *vc.fold(model, variables), tiny.images(model)


def choose(monkeypatch, choice):
  """Replaces measuring by `choice(call)`. Returns a list that collects the calls asked about."""
  calls = []

  def best_form(call, rounds):
    calls.append(call)
    return choice(call)

  monkeypatch.setattr(tuning, "best_form", best_form)
  return calls


def test_a_tuned_model_keeps_its_function_when_saved_or_folded_again(
    folded, monkeypatch, tmp_path):
  model, variables, deploy, deployed, x = folded
  forms = {tuning.FactorisedCall: tuning.MATRIX, tuning.AttentionCall: "tiled"}
  choose(monkeypatch, lambda call: forms[type(call)])
  tuned, tuned_variables = vc.tune(deploy, deployed, x)
  layers = [f"blocks_{i}/mlp/{layer}" for i in range(2) for layer in ("fc1", "fc2")]
  assert tuned.plan == PLAN
  assert tuned.execution == vc.Execution({0: "tiled", 1: "tiled"}, merged=layers)
  assert vc.verify(model, variables, tuned, tuned_variables, x).max_rel <= 1e-5
  expected_shapes = jax.eval_shape(tuned.init, jax.random.key(0), x)
  assert trees.differences(tuned_variables, expected_shapes) == []
  assert vc.count(tuned).params > vc.count(deploy).params     # rank 6 of 24: dense is larger
  # The choice is recorded: folding the training form with it gives the same form without timing.
  again, refolded = vc.fold(model.clone(execution=tuned.execution), variables)
  assert again == tuned and trees.differences(refolded, tuned_variables) == []
  assert vc.verify(tuned, tuned_variables, again, refolded, x).ok
  assert vc.fold(tuned, tuned_variables)[0] == tuned
  convert.save(tmp_path / "tuned.safetensors", tuned, tuned_variables)
  loaded, loaded_variables = convert.load(tmp_path / "tuned.safetensors")
  assert loaded == tuned and trees.digest(loaded_variables) == trees.digest(tuned_variables)
  # Merged layers stay merged, and become dense ones in PyTorch; attention is chosen again.
  asked = choose(monkeypatch, lambda call: None)
  anew, _ = vc.tune(tuned, tuned_variables, x)
  assert asked and not any(isinstance(call, tuning.FactorisedCall) for call in asked)
  assert anew.plan == PLAN and anew.execution == vc.Execution(merged=layers)


def test_the_layers_of_a_wrapped_method_are_merged(monkeypatch):
  model = tiny.deit(vc.Plan(ffn=vc.GLU(ffn=vc.CFFN())), depth=1)
  x = tiny.images(model)
  deploy, deployed = vc.fold(model, tiny.init(model))
  choose(monkeypatch, lambda call: tuning.MATRIX if isinstance(call, tuning.FactorisedCall)
         else None)
  tuned, variables = vc.tune(deploy, deployed, x)
  assert tuned.execution == vc.Execution(merged=("blocks_0/mlp/fc2",))
  assert vc.verify(deploy, deployed, tuned, variables, x).ok


def test_chunked_inference_keeps_the_function_and_records_the_chunk(monkeypatch):
  model = tiny.deit(PLAN)
  variables, x = tiny.init(model), tiny.images(model, batch=7)
  deploy, deployed = vc.fold(model, variables)
  expected = jax.jit(deploy.apply)(deployed, x)
  monkeypatch.setattr(tuning, "CHUNKS", {"cpu": (3, 7)})
  tried = []
  monkeypatch.setattr(tuning, "fastest_of", lambda calls, rounds: (
      tried.append([chunk for chunk in calls if type(chunk) is int]), 3)[1] if 3 in calls else None)
  tuned, tuned_variables = vc.tune(deploy, deployed, x)
  assert tried == [[3]] and tuned.execution.chunk == 3   # a chunk of seven is the whole batch
  got = jax.jit(tuned.apply)(tuned_variables, x)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  found = jax.eval_shape(lambda: vc.features(tuned, tuned_variables, x))
  assert found.features["block_0"].shape[0] == 7


@pytest.mark.parametrize("name", ["lvvit_t", "pvt_tiny", "pvt_v2_b0", "nextvit_small",
                                  "davit_tiny", "shvit_s1"])
def test_every_family_supports_chunked_inference(name):
  model = vc.create_model(name, num_classes=5, execution=vc.Execution(chunk=2))
  images = jax.ShapeDtypeStruct((5, *vc.preprocess(model).image_size, 3), "float32")
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  jaxpr = jax.make_jaxpr(model.apply)(variables, images)   # two chunks, and one image
  assert jaxpr.out_avals[0].shape == (5, 5)
  assert any(eqn.primitive.name == "scan" and eqn.params["length"] == 2 for eqn in jaxpr.eqns)


def test_a_batch_on_several_devices_is_not_split_into_chunks():
  model = tiny.deit(execution=vc.Execution(chunk=2), depth=1)
  x = tiny.images(model, batch=4)
  variables = tiny.init(model)

  def loops():
    jaxpr = jax.make_jaxpr(model.apply)(variables, x)
    return sum(eqn.primitive.name == "scan" for eqn in jaxpr.eqns)

  assert loops() == 1
  with attention.split_over(2):
    assert loops() == 0


SPARSE = vc.Plan(attention=vc.Sparsifiner(granularity="block", window=2, min_tokens=0))


@pytest.mark.parametrize("fields", [{}, {"execution": vc.Execution(chunk=2)}, {"plan": SPARSE}])
def test_a_chunked_model_is_exported_for_batches_of_any_size(fields):
  model = tiny.deit(**fields, depth=1)
  variables, x = tiny.init(model), tiny.images(model, batch=5)
  size, = export.symbolic_shape("b")
  exported = export.export(jax.jit(model.apply))(
      variables, jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype))
  np.testing.assert_allclose(exported.call(variables, x), model.apply(variables, x), atol=1e-5)


def test_forms_that_are_no_faster_leave_the_folded_model_unchanged(folded, monkeypatch):
  _, _, deploy, deployed, x = folded
  choose(monkeypatch, lambda call: None)
  tuned, variables = vc.tune(deploy, deployed, x)
  assert tuned == deploy and trees.digest(variables) == trees.digest(deployed)


def test_equal_calls_are_measured_once_and_each_block_has_its_choice(
    folded, monkeypatch):
  _, _, deploy, deployed, x = folded
  calls = tuning.calls_with_forms(deploy, deployed, x)
  assert {path[1:]: call.shape for path, call in calls.items()
          if isinstance(call, tuning.FactorisedCall) and path[0] == "blocks_1"} == {
              ("mlp", "fc1"): (3, 9, 24), ("mlp", "fc2"): (3, 9, 96)}    # 17, 13, 9 tokens
  dense, hmhsa = calls["blocks_0", "attn"], calls["blocks_1", "attn"]
  assert dense.shapes == ((3, 17, 4, 6),) * 3 and not dense.sized
  assert hmhsa.shapes == ((3, 13, 2, 6), (3, 13, 2, 6), (3, 13, 4, 6)) and hmhsa.sized
  calls_asked = choose(monkeypatch, lambda call: {
      calls["blocks_1", "mlp", "fc2"]: tuning.MATRIX, dense: "images"}.get(call))
  tuned, variables = vc.tune(deploy, deployed, x)
  assert sorted(map(repr, calls_asked)) == sorted(map(repr, calls.values()))
  assert tuned.execution == vc.Execution({0: "images"}, merged=("blocks_1/mlp/fc2",))
  assert vc.verify(deploy, deployed, tuned, variables, x).ok
  wide = tiny.deit(vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()), deploy=True, depth=4)
  shapes = jax.eval_shape(wide.init, jax.random.key(0), x)
  assert len(set(tuning.calls_with_forms(wide, shapes, x).values())) == 2      # out of eight calls


def test_calls_are_measured_at_the_size_of_a_chunk():
  model = tiny.deit(PLAN, execution=vc.Execution(chunk=4), deploy=True)
  x = tiny.images(model, batch=9)      # chunks of four, four and one
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  calls = tuning.calls_with_forms(model, shapes, x).values()
  assert {(call.shapes[0] if isinstance(call, tuning.AttentionCall) else call.shape)[0]
          for call in calls} == {4}


def test_sparse_attention_and_token_merging_are_not_tuned():
  x = tiny.images(tiny.deit())
  for plan in (vc.Plan(attention=vc.Sparsifiner(keep=0.5, rank=2)),
               vc.Plan(tokens=vc.MCTF(r=2, blocks=(0, 1)))):
    model = tiny.deit(plan, deploy=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert not tuning.calls_with_forms(model, shapes, x)


def test_forms_are_really_compiled_and_timed():
  """At a rank far above break-even, two factors are many times the work of one matrix."""
  def best(rank, width):
    layer = CompactDense(width, rank, deploy=True)
    return tuning.best_form(tuning.FactorisedCall(layer, (512, width), width, "float32"), rounds=3)

  assert best(rank=512, width=64) == tuning.MATRIX and best(rank=4, width=512) is None


def test_a_form_that_the_device_lacks_is_not_a_candidate(monkeypatch):
  model = tiny.deit(deploy=True, depth=1)
  x = tiny.images(model)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  call, = tuning.calls_with_forms(model, shapes, x).values()
  monkeypatch.setitem(tuning.FORMS, "cpu", ("cudnn",))
  assert tuning.best_form(call, rounds=1) is None


def test_the_record_decides_the_attention_form_of_a_block(monkeypatch):
  seen = []
  monkeypatch.setattr(attention.Core, "__call__", lambda core, query, key, value, *rest: (
      seen.append(attention.requested_form()), value)[1])
  model = tiny.deit(execution=vc.Execution({1: "tiled"}))
  jax.eval_shape(model.init, jax.random.key(0), tiny.images(model))
  assert seen == [None, "tiled"]


def test_only_a_folded_model_can_be_tuned():
  model = tiny.deit(PLAN)
  with pytest.raises(ValueError, match="not folded; give it what"):
    vc.tune(model, {}, None)
  with pytest.raises(ValueError, match="rounds=0: must be a whole number of at least 1"):
    vc.tune(model.clone(deploy=True), {}, None, rounds=0)


@pytest.mark.parametrize("low, merged", [(1.01, 2), (0.99, 0)])
def test_factors_are_timed_in_the_runtime_that_will_be_used(low, merged, monkeypatch):
  """Layers of equal size are merged together, if one matrix is faster in every round."""
  pytest.importorskip("jax2onnx")
  model = tiny.deit(vc.Plan(ffn=vc.CFFN(branches=2)))
  model, variables = vc.fold(model, tiny.init(model))
  images, seen, tried, with_forms = tiny.images(model), [], [], tuning.with_forms
  monkeypatch.setattr(tuning, "with_forms", lambda *args: (tried.append(args[2]),
                                                           with_forms(*args))[1])

  def paired(calls, **_):
    seen.extend(call() for call in calls.values())
    return {name: bench.Timing(1.0, 1.5, low, 2.0, "cpu", 0.0) for name in calls}

  monkeypatch.setattr(bench, "paired", paired)
  chosen, own = vc.tune(model, variables, images, runtime="ort")
  assert len(chosen.execution.merged) == merged and len(seen) == 2
  assert [len(forms) for forms in tried] == [0, 2, merged]   # unchanged, all merged, the choice
  expected = model.apply(variables, images)
  for logits in (*seen, chosen.apply(own, images)):
    np.testing.assert_allclose(logits, expected, atol=1e-5)
