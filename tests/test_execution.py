"""Execution records how a model is computed: it is checked and saved, and changes no function."""
import dataclasses
import json

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import convert, trees

RECORD = vc.Execution({1: "tiled", 0: "einsum"}, chunk=2,
                      merged=("blocks_1/mlp/fc2", "blocks_0/mlp/fc1"))


def test_a_record_survives_json_and_prints_readably():
  assert json.loads(RECORD.to_json()) == {
      "attention": {"0": "einsum", "1": "tiled"}, "chunk": 2,
      "merged": ["blocks_0/mlp/fc1", "blocks_1/mlp/fc2"]}
  assert vc.Execution().to_json() == "{}"
  for record in (RECORD, vc.Execution()):
    again = vc.Execution.from_json(record.to_json())
    assert again == record and hash(again) == hash(record)


def test_records_are_equal_in_any_order():
  """Models with equal records share compiled programs."""
  other = vc.Execution({0: "einsum", 1: "tiled"}, chunk=2, merged=RECORD.merged[::-1])
  assert other == RECORD and hash(other) == hash(RECORD)
  assert RECORD.merged_in(1) == ("fc2",) and vc.Execution().merged_in(1) == ()


@pytest.mark.parametrize("make,words", [
    (lambda: vc.Execution({1: "fast"}), "must be one of einsum, "),
    (lambda: vc.Execution({-1: "tiled"}), "blocks are numbered 0, 1"),
    (lambda: vc.Execution({"1": "tiled"}), "blocks are numbered 0, 1"),
    (lambda: vc.Execution(["tiled"]), "must be a dict such as"),
    (lambda: vc.Execution(chunk=0), "Execution(chunk=0): must be a whole number of images"),
    (lambda: vc.Execution(chunk=True), "must be a whole number of images"),
    (lambda: vc.Execution(chunk=2.0), "must be a whole number of images"),
    (lambda: vc.Execution(merged="blocks_0/mlp/fc2"), "must be paths such as"),
    (lambda: vc.Execution(merged=("fc2",)), "must be paths such as"),
    (lambda: vc.Execution(merged=(2,)), "must be paths such as"),
    (lambda: tiny.deit(execution=vc.Execution({2: "tiled"})),
     "the execution names block 2, but the model has blocks 0 to 1"),
    (lambda: tiny.deit(execution=vc.Execution(merged=("blocks_7/mlp/fc2",))), "names block 7"),
    (lambda: vc.create_model("pvt_tiny", execution=vc.Execution({8: "tiled"})), "blocks 0 to 7"),
    (lambda: tiny.deit(execution={"chunk": 2}), "must be an Execution"),
    (lambda: vc.Execution.from_json("[]"), "must be a JSON object"),
    (lambda: vc.Execution.from_json("{"), "must be JSON"),
    (lambda: vc.Execution.from_json('{"chunks": 2}'), "attention, chunk and merged"),
    (lambda: vc.Execution.from_json('{"attention": {"x": "tiled"}}'), "must be an object such as"),
    (lambda: vc.Execution.from_json('{"attention": {"1": ["tiled"]}}'), "must be one of einsum"),
    (lambda: vc.Execution.from_json('{"merged": [["fc2"]]}'), "must be paths such as"),
])
def test_a_wrong_record_is_refused_in_one_line(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_dense_model_with_a_record_is_compacted_and_folded_by_it():
  model = tiny.deit(execution=RECORD)
  variables, x = tiny.init(model), tiny.images(model)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=0.25, factor="both"))
  small, small_variables = vc.compact(model, variables, plan)
  assert small.execution == RECORD
  deploy, folded = vc.fold(small, small_variables)
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  mlps = [folded["params"][f"blocks_{i}"]["mlp"] for i in range(2)]
  assert [sorted(mlp[layer]) for mlp in mlps for layer in ("fc1", "fc2")] == [
      ["bias", "kernel"], ["a", "b"], ["a", "b"], ["bias", "kernel"]]
  plain, plain_folded = vc.fold(small.clone(execution=vc.Execution()), small_variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, x), tiny.apply(plain, plain_folded, x),
                             rtol=1e-5,
                             atol=1e-5)


def test_a_record_is_saved_and_loaded_with_the_model(tmp_path):
  model = tiny.deit(vc.Plan(ffn=vc.CFFN(factor="both")), execution=RECORD, deploy=True)
  variables = tiny.init(model)
  convert.save(tmp_path / "a.safetensors", model, variables)
  loaded, loaded_variables = convert.load(tmp_path / "a.safetensors")
  assert loaded == model and loaded.execution == RECORD
  assert trees.digest(loaded_variables) == trees.digest(variables)


def test_the_record_of_older_files_is_read_from_their_plan(tmp_path):
  plan = vc.Plan(ffn=vc.CFFN(factor="both"), blocks={1: {"ffn": vc.CFFN()}})
  record = dataclasses.replace(RECORD, merged=("blocks_0/mlp/fc1", "blocks_1/mlp/fc2"))
  model = tiny.deit(plan, execution=record, deploy=True)
  variables = tiny.init(model)
  old = json.loads(plan.to_json())
  old["ffn"]["merged"], old["blocks"]["1"]["ffn"]["merged"] = ["fc1"], ["fc2"]
  old |= {"backends": {"0": "einsum", "1": "tiled"}, "at_a_time": 2}
  about = {**convert.metadata(model), "plan": json.dumps(old)}
  del about["execution"]
  convert.write_safetensors(tmp_path / "old.safetensors", trees.named_leaves(variables), about)
  loaded, _ = convert.load(tmp_path / "old.safetensors")
  assert loaded == model
