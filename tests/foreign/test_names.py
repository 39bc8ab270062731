"""Foreign state dicts load in one call and compute what they compute in their own library."""
import re
import warnings

import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.foreign.cases import cases, one_image
from tests.models import parity
from vitcompact import convert, foreign, foreign_rules, trees

CASES = cases()
NAMES = list(CASES)
OF_TIMM = [name for name, case in CASES.items() if case.timm]
OURS = [name for name, case in CASES.items() if case.model in vc.list_models()]
LEFT = {"transformers MAE": ["the decoder"],
        "transformers CLIP gelu": ["the text encoder"], "transformers ViT": [],
        "Google vision_transformer": ["the layer before the classifier of pre-training"],
        "Google big_vision SigLIP": ["the text encoder"], "CLIP": ["the text encoder"],
        "transformers ViT without classifier": ["the pooler"], "transformers PVT": [],
        "MAE": ["the decoder", "the token of masked patches"],
        "DINOv3": ["the token of masked patches",
                   "the periods of rotary positions, which follow from sizes"]}


def translated_case(case, state=None):
  return foreign.find(case.state if state is None else state, set(case.timm))[0]


@pytest.mark.parametrize("name", OF_TIMM)
def test_names_and_shapes_become_timms(name):
  case = CASES[name]
  got = translated_case(case)
  assert {name: value.shape for name, value in got.state.items()} == case.timm
  assert got.source.split("'")[0] in ("DeiT III", "", name.split()[0])


@pytest.mark.parametrize("name", OURS)
def test_our_model_computes_what_the_foreign_one_computes(name):
  case = CASES[name]
  pool = {"global_pool": ""} if case.expected.ndim == 3 else {}
  model = vc.create_model(case.model, **case.fields, **pool)
  variables = vc.from_torch(model, case.state)
  got = tiny.apply(model, variables, one_image(case.fields["image_size"]))
  np.testing.assert_allclose(got, case.expected, atol=2e-5 * np.abs(case.expected).max())


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "eva02_base_patch14_448"])
@pytest.mark.parametrize("pretraining", [False, True])
def test_the_names_of_eva02s_authors_are_read(name, pretraining):
  """Their names are those that timm's reader of their files lists."""
  run = next(run for run in parity.runs("vit") if run.name.startswith(name))
  theirs, state = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc1": "mlp.w12",
                   "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln", "q_proj.bias": "q_bias",
                   "v_proj.bias": "v_bias", **({"fc_norm": "norm"} if pretraining else {})}, {}
  for key, value in run.state.items():
    if not (pretraining and key.startswith("head.")):
      old = next((old for old in theirs if re.search(rf"(^|\.){re.escape(old)}(\.|$)", key)), "")
      state[key.replace(old, theirs[old]) if old else key] = value
  state |= {f"{at}rope.freqs_{part}": np.ones((16, 8), np.float32)
            for at in ("", "blocks.0.attn.") for part in ("cos", "sin")}
  if pretraining:
    state |= {"mask_token": np.ones((1, 1, 24)), "lm_head.weight": np.ones((9, 24), np.float32)}
  model = run.model.clone(num_classes=0 if pretraining else run.model.num_classes)
  assert set(state) - set(run.state) >= {"rope.freqs_cos", "blocks.0.mlp.w3.weight"}
  with warnings.catch_warnings(action="error"):
    got = vc.from_torch(model, state)
  expected = vc.from_torch(run.model, run.state)["params"]
  expected = {key: leaf for key, leaf in expected.items() if key != "head" or not pretraining}
  assert trees.digest(got["params"]) == trees.digest(expected)


@pytest.mark.parametrize("name", [name for name in OF_TIMM if CASES[name].live])
def test_names_in_memory_are_read_like_those_in_files(name):
  """transformers 5 writes names to files that differ from those of its modules."""
  case = CASES[name]
  values = iter(range(10 ** 6))
  live = {key: np.full((6, 6), float(next(values))) for key in case.live}
  got = foreign.find(live, set(case.timm))[0].state
  assert got.keys() == case.timm.keys() and live.keys() != case.state.keys()
  query, key, value = (next(live[name] for name in live if f"layer.0.attention.{part}_proj.weight"
                            in name or f"layers.0.attention.{part}_proj.weight" in name)
                       for part in "qkv")
  np.testing.assert_array_equal(got["blocks.0.attn.qkv.weight"],
                                np.concatenate([query, key, value]))


@pytest.mark.parametrize("name", LEFT)
def test_the_source_of_the_names_and_omitted_tensors_are_reported(name):
  case = CASES[name]
  got = foreign.find(case.state, set(case.timm or ()))[0]
  assert sorted(got.left_out) == sorted(LEFT[name])
  if case.model in vc.list_models():
    model = vc.create_model(case.model, **case.fields)
    lines = convert.read_state_dict(model, case.state).lines()
    whose = {"transformers": "transformers'", "Google": "Google's", "MAE": "MAE's",
             "CLIP": "CLIP's", "DINOv3": "DINOv3's"}
    assert f"names: {whose[name.split()[0]]}, read as timm's" in lines
    for what in LEFT[name]:
      assert any(line.startswith(f"left out, {what}: ") for line in lines)


@pytest.mark.parametrize("name", sorted(vc.list_models()))
def test_names_of_our_models_are_not_taken_for_foreign_ones(name):
  model = vc.create_model(name)
  timms = [entry.torch for entry in model.torch_entries()]
  for names in (timms, [model.authors_name(name) for name in timms]):
    state = dict.fromkeys(names, np.float32([0]))
    got = foreign_rules.translated(state, set(timms))
    assert got.state.keys() == state.keys() and not got.source and not got.left_out


def test_layer_scale_and_biases_get_the_names_that_the_model_uses():
  """timm has two names for layer scale, and two forms of biases that have none for keys."""
  ones = np.ones(4, np.float32)
  bias = np.concatenate([ones, 0 * ones, 2 * ones])
  state = {"x.blocks.0.ls1.gamma": ones, "x.blocks.0.attn.qkv.bias": bias, "storage_tokens": ones}

  def names(known, bias=bias):
    given = {**state, "x.blocks.0.attn.qkv.bias": bias}
    got = foreign_rules.translated(given, known)
    return got.state, got.left_out

  got, _ = names({"blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias"})
  assert set(got) == {"x.blocks.0.gamma_1", "x.blocks.0.attn.q_bias", "x.blocks.0.attn.v_bias",
                      "reg_token"}
  np.testing.assert_array_equal(got["x.blocks.0.attn.v_bias"], 2 * ones)
  got, _ = names({"blocks.0.ls1.gamma", "blocks.0.attn.qkv.bias"})
  assert set(got) == {"x.blocks.0.ls1.gamma", "x.blocks.0.attn.qkv.bias", "reg_token"}
  got, left = names(set(), 0 * bias)   # no biases in the model: zeros are reported, others refused
  assert "x.blocks.0.attn.qkv.bias" not in got
  assert left == {"biases that are zero": ["x.blocks.0.attn.qkv.bias"]}
  for known in (set(), {"blocks.0.attn.q_bias"}):
    got, left = names(known, bias + 1)
    assert "x.blocks.0.attn.qkv.bias" in got and not left


def test_a_missing_part_of_a_tensor_leaves_the_names_unchanged():
  """So the error shows the names in the file."""
  case = CASES["transformers ViT"]
  key = "vit.encoder.layer.1.attention.attention.key.weight"
  state = {name: value for name, value in case.state.items() if name != key}
  with pytest.raises(ValueError, match=r"1 missing, 2 unexpected") as error:
    vc.from_torch(vc.create_model(case.model, **case.fields), state)
  assert "missing blocks.1.attn.qkv.weight" in str(error.value)
  assert "unexpected encoder.layer.1.attention.attention.query.weight" in str(error.value)


def test_the_error_for_an_invalid_value_uses_the_foreign_name():
  case = CASES["transformers ViT"]
  name = "vit.encoder.layer.0.attention.attention.value.weight"
  with pytest.raises(ValueError, match=rf"^{name} is int8, not an array of floating point"):
    vc.from_torch(vc.create_model(case.model, **case.fields),
                  {**case.state, name: case.state[name].astype(np.int8)})


@pytest.mark.parametrize("name", ["transformers DINOv2 with registers",
                                  "DINOv2 with SwiGLU and registers"])
def test_with_registers_the_class_token_absorbs_its_position(name):
  case = CASES[name]
  cls, positions = (next(value for key, value in case.state.items() if key.endswith(ends))
                    for ends in ("cls_token", ("pos_embed", "position_embeddings")))
  got = translated_case(case).state
  np.testing.assert_array_equal(got["cls_token"], cls + positions[:, :1])
  np.testing.assert_array_equal(got["pos_embed"], positions[:, 1:])


def test_two_tensors_for_the_same_part_are_refused():
  case = CASES["transformers ViT without classifier"]
  other = case.state["encoder.layer.0.attention.attention.query.weight"]
  with pytest.raises(ValueError, match=r"two tensors of one name, .*are both blocks.0.attn.qkv"):
    translated_case(case, {**case.state, "layers.0.attention.q_proj.weight": other})
