"""Foreign checkpoints: nothing is taken or left out silently, no mistake ends in a traceback."""
import pathlib
import re
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vitcompact as vc
from tests import tiny
from tests.torch_double import Tensor
from vitcompact import convert, fit, foreign, torch_names, trees

MODEL = tiny.deit(depth=1)
STATE = vc.to_torch(MODEL, tiny.init(MODEL))
OTHER = vc.to_torch(MODEL, tiny.init(MODEL, seed=2))


def digest(state, model=MODEL, **options):
  return trees.digest(vc.from_torch(model, state, **options))


WANTED = digest(STATE)


def add_prefix(prefix, state=STATE):
  return {prefix + name: value for name, value in state.items()}


@pytest.fixture(autouse=True)
def no_warning_unless_expected():
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    yield


@pytest.fixture
def no_search(monkeypatch):
  """Skips the search for the closest model, which takes seconds and has its own tests."""
  monkeypatch.setattr(fit, "closest_model", lambda *_, **__: None)


def refusal(*arguments, **options):
  with pytest.raises(ValueError) as error:
    vc.from_torch(*arguments, **options)
  return str(error.value)


@pytest.mark.parametrize("options", [
    {}, {"requires_grad": True}, {"device": "cuda:0"}, {"dtype": "float64"},
    {"requires_grad": True, "device": "mps"}])
def test_pytorch_tensors_are_accepted(options):
  assert digest({name: Tensor(value, **options) for name, value in STATE.items()}) == WANTED


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_pytorch_half_precision_becomes_float32(dtype):
  kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
          "float8_e4m3fn": ml_dtypes.float8_e4m3fn}[dtype]
  arrays = {name: value.astype(kind) for name, value in STATE.items()}
  expected = digest({name: value.astype(np.float32) for name, value in arrays.items()})
  assert digest({name: Tensor(value, dtype) for name, value in STATE.items()}) == expected
  assert digest(arrays) == expected


@pytest.mark.parametrize("options, words", [
    ({"is_quantized": True, "dtype": "int8"}, "quantized, not .*dequantize"),
    ({"dtype": "int8"}, "torch.int8, not an array of floating point numbers; quantized weights"),
    ({"layout": "torch.sparse_coo"}, "sparse; pass .*to_dense"),
    ({"device": "meta"}, "meta device, without values"),
    ({"dtype": "complex64"}, "torch.complex64, not an array of floating point numbers")])
def test_tensors_without_plain_values_are_refused_with_a_way_out(options, words):
  message = refusal(MODEL, {**STATE, "norm.bias": Tensor(STATE["norm.bias"], **options)})
  assert re.match(f"norm.bias is .*{words}", message) and "\n" not in message


def test_the_error_names_the_tensor_that_cannot_be_read_and_why():
  class Broken(Tensor):
    def detach(self):
      raise RuntimeError("storage was freed\nC++ frames")
  message = refusal(MODEL, {**STATE, "norm.bias": Broken(np.ones(24))})
  assert "norm.bias, a Broken of torch.float32" in message and message.endswith("storage was freed")


@pytest.mark.parametrize("records", [
    {"n_averaged": np.array(5)}, {"epoch": 3, "args": None}, {"max_accuracy": np.float64(81.2)},
    {"decay": np.array(0.999, np.float32)},
    {"names": ["a", "b"], "date": "today"}, {"bn.num_batches_tracked": Tensor(7, "int64")},
    {"blocks.0.attn.relative_position_index": np.zeros((3, 3), np.int64)}, {7: np.ones(3)}])
def test_records_and_counters_among_weights_are_dropped_and_reported(records):
  for checkpoint in ({**STATE, **records}, {**records, "model": {**STATE, **records}}):
    loaded = convert.read_state_dict(MODEL, checkpoint)
    assert trees.digest(loaded.variables) == WANTED
    assert loaded.dropped == [name for name in records if name != 7]
  swa = {"n_averaged": np.array(5), **add_prefix("module.")}
  assert convert.read_state_dict(MODEL, swa).lines() == ["dropped: n_averaged"]
  deeper = {"n_averaged": np.array(5), "epoch": 3, **add_prefix("module.net.")}
  assert convert.read_state_dict(MODEL, deeper).dropped == ["n_averaged", "epoch"]
  assert digest(deeper) == WANTED   # no warning: these are not weights


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder.", "module.model.", "a.0.b.",
                                    "_orig_mod.model.module.", "module.module.", "teacher."])
def test_a_common_prefix_is_removed_and_reported(prefix):
  loaded = convert.read_state_dict(MODEL, {"state_dict": add_prefix(prefix), "optimizer_states": [
      {"state": {0: {"exp_avg": np.ones(3)}}}], "hyper_parameters": {"lr": 1e-3}})
  assert trees.digest(loaded.variables) == WANTED
  rest = prefix
  while rest.startswith(("module.", "_orig_mod.")):
    rest = rest.split(".", 1)[1]
  assert loaded.lines() == ["weights: state_dict"] + (
      [f"prefix taken off the names: {rest}"] if rest else [])


def test_wrappers_of_compiled_and_sharded_layers_are_removed_from_names():
  wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod.")
             .replace("attn.", "attn._fsdp_wrapped_module."): value
             for name, value in add_prefix("_orig_mod.").items()}
  assert digest(wrapped) == WANTED


def test_a_head_outside_the_backbone_prefix_belongs_to_the_model():
  prefixed = {name if name.startswith("head.") else f"backbone.{name}": value
              for name, value in STATE.items()}
  assert digest(prefixed) == WANTED
  loaded = convert.read_state_dict(MODEL, {**prefixed, "loss.centre": np.ones((1, 9))})
  assert loaded.outside == ["loss.centre"]
  assert "left out, not part of the model: loss.centre" in loaded.lines()
  with pytest.warns(UserWarning, match="1 tensors without the prefix 'backbone.' .*loss.centre"):
    assert digest({**prefixed, "loss.centre": np.ones((1, 9))}) == WANTED


def test_two_tensors_with_the_same_name_are_refused():
  message = refusal(MODEL, {**STATE, "module.norm.bias": np.zeros(24)})
  assert message.startswith("two tensors of one name, 'norm.bias' and 'module.norm.bias'")


def test_names_may_be_bytes():
  assert digest({b"model": {name.encode(): value for name, value in STATE.items()}}) == WANTED


@pytest.mark.parametrize("checkpoint, taken", [
    ({"model": OTHER, "model_ema": STATE}, "model_ema"),
    ({"state_dict": OTHER, "state_dict_ema": STATE, "model": OTHER}, "state_dict_ema"),
    ({"student": add_prefix("module.backbone.", OTHER), "teacher": add_prefix("backbone."),
      "dino_loss": {"center": np.ones((1, 9))}}, "teacher"),
    ({"ckpt": {"net": OTHER, "ema": add_prefix("module.")}}, "ckpt.ema"),
    ({"state_dict": {**add_prefix("model.", OTHER), **add_prefix("ema_model.module.")}},
     "state_dict.ema_model")])
def test_one_of_several_sets_of_weights_is_chosen_and_reported(checkpoint, taken):
  with pytest.warns(UserWarning, match=f"several sets of weights: took {taken!r}, not .*weights="):
    assert digest(checkpoint) == WANTED
  loaded = convert.read_state_dict(MODEL, checkpoint)
  assert loaded.container == taken and taken in loaded.containers
  assert re.match(rf"weights: {taken}, not .*\(--weights chooses\)", loaded.lines()[0])
  for name in loaded.containers:   # choosing explicitly gives no warning
    for choice in (name, name.rsplit(".", 1)[-1]):
      assert (digest(checkpoint, weights=choice) == WANTED) == (name == taken)
    assert convert.read_state_dict(MODEL, checkpoint, weights=name).containers == loaded.containers
  said = refusal(MODEL.clone(num_classes=3), checkpoint, weights=taken)
  assert said.startswith(f"'{taken}', of the sets of weights ") and "does not fit" in said
  said = refusal(MODEL, checkpoint, weights="average")
  assert said.startswith("weights='average' is not in the checkpoint; it has ") and taken in said


def test_one_of_several_networks_is_chosen_by_part_of_its_prefix():
  both = {**add_prefix("student.backbone.", OTHER), **add_prefix("teacher.backbone."),
          "teacher.head.mlp.weight": np.ones((3, 3))}
  with pytest.warns(UserWarning) as caught:
    assert digest(both) == WANTED
  assert [str(one.message).split(":")[0] for one in caught] == [
      "the checkpoint holds several sets of weights",
      "1 tensors without the prefix 'teacher.backbone.' are not part of deit_tiny_patch16_224 and "
      "were left out"]
  loaded = convert.read_state_dict(MODEL, both, weights="student")
  assert (loaded.container, loaded.prefix) == ("student.backbone", "student.backbone.")
  assert "stands for several" in refusal(MODEL, both, weights="backbone")


def test_cyclic_records_and_a_setting_named_kernel_are_not_weights():
  checkpoint = {"model": STATE, "hyper_parameters": {"kernel": 3}}
  checkpoint["self"] = checkpoint
  with pytest.warns(UserWarning, match="took 'model', not 'self.model', 'self.self.model'"):
    assert digest(checkpoint) == WANTED


def test_weights_must_be_chosen_only_if_several_sets_have_unknown_names():
  assert digest({"model": STATE, "epoch": 3}) == WANTED
  assert digest({"mine": STATE}) == WANTED and digest({"mine": STATE}, weights="mine") == WANTED
  message = refusal(MODEL, {"first": STATE, "second": OTHER})
  assert message == ("several sets of weights in the checkpoint, first, second; choose one, as in "
                     "weights='first'")
  assert digest({"first": OTHER, "second": STATE}, weights="second") == WANTED


@pytest.mark.parametrize("names, words", [
    (["backbone.layers.0.ln1.weight"], "OpenMMLab's"),
    (["conv_root/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"],
     "Google's, of a hybrid of ResNet and ViT: no model here has its stem"),
    (["params/head/kernel", "params/head/bias"], "vitcompact's own")])
def test_unsupported_naming_schemes_are_identified_in_one_line(names, words):
  message = refusal(MODEL, {name: np.ones(3) for name in names})
  assert re.search(f"the names are {words}", message) and "\n" not in message


def test_flax_variables_are_not_taken_for_a_state_dict():
  for variables in (tiny.init(MODEL), tiny.init(MODEL)["params"]):
    assert refusal(MODEL, variables).startswith("variables of Flax were given; expected a state")


@pytest.mark.parametrize("given, words", [
    (None, "a NoneType was given; expected a state dict"),
    ("deit.pth", "a path was given, 'deit.pth'; expected"),
    (pathlib.Path("deit.pth"), "a path was given, 'deit.pth'; expected"),
    ([("norm.bias", np.ones(3))], "a list was given; expected"), ({}, "the state dict is empty"),
    ({"epoch": 3, "model": None}, r"no tensors .*'epoch' \(a int\), 'model' \(a NoneType\)"),
    ({"model": {}}, "no tensors"), (tiny.deit(), "a VisionTransformer was given; expected")])
def test_a_value_that_is_not_a_state_dict_is_refused_in_one_line(given, words):
  message = refusal(MODEL, given)
  assert re.search(words, message) and "\n" not in message


def test_a_value_that_is_not_a_model_is_refused_in_one_line():
  assert refusal("deit_small", STATE).startswith("'deit_small' was given, expected a model")
  assert refusal(STATE, MODEL).startswith("a dict was given, expected a model")
  module = type("Module", (), {"state_dict": lambda self: STATE})()
  assert refusal(MODEL, module).endswith("pass its .state_dict()")


def test_of_many_misfits_a_few_are_shown_and_the_rest_counted(no_search):
  said = refusal(MODEL, add_prefix("x", STATE)).split("\n")
  count = len(STATE)
  assert said[0].endswith(f"{count} missing, {count} unexpected, 0 misshapen; none of its names is "
                          "the model's")
  assert len(said) == 11 and said[5] == f"and {count - 4} more missing"
  assert said[10] == f"and {count - 4} more unexpected"


def test_the_error_for_a_norm_after_pooling_names_the_option():
  pooled = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
            for name, value in STATE.items()}
  model = MODEL.clone(global_pool="avg")
  assert "has fc_norm instead of norm: create the model with global_pool='avg'" in refusal(
      MODEL, pooled)
  assert "has norm instead of fc_norm: create the model with global_pool='token'" in refusal(
      model, STATE)
  assert "params" in vc.from_torch(model, pooled)
  message = refusal(MODEL.clone(num_classes=3), pooled)
  assert "global_pool='avg'" in message and "pass reset_head" in message


def test_rgb_kernels_are_adapted_to_other_numbers_of_channels():
  kernel = STATE["patch_embed.proj.weight"]
  grey = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
  loaded = convert.read_state_dict(MODEL.clone(in_chans=1), STATE)
  assert loaded.adapted == ["patch_embed.proj.weight"]
  assert loaded.lines() == ["made for other channels: patch_embed.proj.weight"]
  np.testing.assert_allclose(
      jax.jit(MODEL.clone(in_chans=1).apply)(loaded.variables, grey),
      jax.jit(MODEL.apply)(vc.from_torch(MODEL, STATE), grey.repeat(3, axis=-1)), atol=2e-5)
  # As in timm's adapt_input_conv: repeated, truncated, and scaled by 3 / 5.
  expected = np.tile(kernel, (1, 2, 1, 1))[:, :5] * np.float32(0.6)
  np.testing.assert_array_equal(torch_names.adapt_channels(kernel, 5), expected)
  both = convert.read_state_dict(MODEL.clone(in_chans=1, image_size=16, patch_size=4), STATE)
  assert both.resized == ["patch_embed.proj.weight"] == both.adapted
  one = vc.to_torch(MODEL.clone(in_chans=1), loaded.variables)
  message = refusal(MODEL, one)
  assert "is for images of 1 channels: create the model with in_chans=1" in message


@pytest.mark.parametrize("value, kind", [(np.nan, np.float32), (np.inf, np.float16),
                                         (-np.inf, np.float32), (1e300, np.float64)])
def test_nan_and_infinity_are_refused_with_the_first_and_the_count(value, kind):
  state = {name: array.astype(kind) for name, array in STATE.items()}
  state["blocks.0.norm1.bias"][:3] = value
  state["norm.bias"][:] = value
  message = refusal(MODEL, state)
  assert "blocks.0.norm1.bias has 3 values that are NaN or infinite, and 1 more" in message
  assert "\n" not in message
  got = vc.from_torch(MODEL, state, allow_nonfinite=True)
  assert not np.isfinite(got["params"]["norm"]["bias"]).any()


WORDS = st.sampled_from(["module", "model", "backbone", "_orig_mod", "net", "a", "0"])
BOXES = st.sampled_from([*foreign.CONTAINERS, "mine", "checkpoint", b"net"])
BESIDE = st.sampled_from([{}, {"epoch": 3, "args": None}, {"best": np.float64(1)},
                          {"optimizer": {"state": {0: {"exp_avg": np.ones(3)}}}},
                          {"centre": {"center": np.ones((1, 3), np.float32)}}])


@st.composite
def checkpoints(draw):
  """Draws (checkpoint, expected state dict, numbers of missing, odd and misshapen entries)."""
  kind = draw(st.sampled_from(["float16", "float32", "float64", "bfloat16"]))
  state = {name: Tensor(value, kind) if kind == "bfloat16" else value.astype(kind)
           for name, value in STATE.items()}
  names = st.sampled_from(sorted(STATE))
  expected = {name: np.asarray(value.array if kind == "bfloat16" else value, np.float32)
              for name, value in state.items()}
  misshapen = draw(st.sets(names, max_size=6))
  for name in misshapen:
    shape = STATE[name].shape
    state[name] = np.zeros((shape[0] + 1, *shape[1:]), np.float32)
  missing = draw(st.sets(names, max_size=6))
  for name in missing:
    del state[name]
  letters = st.text("abc.module_", min_size=1, max_size=12).filter(
      lambda name: name not in STATE and not foreign._prefixes(name, set(STATE)))
  extra = draw(st.dictionaries(letters, st.sampled_from(
      [np.ones(3, np.float32), np.float32(3), np.ones(3, np.int8), "text", None]), max_size=6))
  state |= extra
  prefix = "".join(f"{part}." for part in draw(st.lists(WORDS, max_size=3)))
  checkpoint = add_prefix(prefix, state)
  if draw(st.booleans()):
    checkpoint = {name.encode(): value for name, value in checkpoint.items()}
  for box in draw(st.lists(BOXES, max_size=3)):
    checkpoint = {box: checkpoint, **draw(BESIDE)}
  floats = [name for name, value in extra.items()
            if isinstance(value, np.ndarray) and value.dtype == np.float32]
  return checkpoint, expected, (missing, misshapen - missing, floats)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(checkpoints())
def test_any_checkpoint_is_read_correctly_or_refused_in_a_few_lines(case):
  checkpoint, expected, (missing, misshapen, odd) = case
  old, fit.closest_model = fit.closest_model, lambda *_, **__: None
  try:
    loaded = convert.read_state_dict(MODEL, checkpoint)
  except ValueError as error:
    lines = str(error).split("\n")
    assert missing or misshapen or odd or "two tensors of one name" in lines[0], error
    assert len(lines) <= 16 and all(len(line) < 300 for line in lines)
    if "does not fit" in lines[0]:
      assert f": {len(missing)} missing, " in lines[0]
      assert f"{len(misshapen)} misshapen" in lines[0]
      for name in [*sorted(missing)[:1], *sorted(misshapen)[:1]] if len(missing) < 5 else []:
        assert name in str(error) or len(misshapen) > 4
  else:
    assert not missing and not misshapen and not odd
    assert trees.digest(loaded.variables) == digest(expected)
  finally:
    fit.closest_model = old
