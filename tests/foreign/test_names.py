"""State dicts of others load in one call and compute what they computed where they come from."""
import jax
import numpy as np
import pytest

import vitcompact as vc
from tests.foreign.cases import cases, one_image
from vitcompact import convert, foreign

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


def found(case, state=None):
  return foreign.find(case.state if state is None else state, set(case.timm))[0]


@pytest.mark.parametrize("name", OF_TIMM)
def test_names_and_shapes_become_timms(name):
  case = CASES[name]
  got = found(case)
  assert {name: value.shape for name, value in got.state.items()} == case.timm
  assert got.source.split("'")[0] in ("DeiT III", "", name.split()[0])


@pytest.mark.parametrize("name", OURS)
def test_what_their_model_computes_ours_computes(name):
  case = CASES[name]
  pool = {"global_pool": ""} if case.wanted.ndim == 3 else {}
  model = vc.create_model(case.model, **case.fields, **pool)
  variables = vc.from_torch(model, case.state)
  got = jax.jit(model.apply)(variables, one_image(case.fields["image_size"]))
  np.testing.assert_allclose(got, case.wanted, atol=2e-5 * np.abs(case.wanted).max())


@pytest.mark.parametrize("name", [name for name in OF_TIMM if CASES[name].live])
def test_names_in_memory_are_read_as_those_in_files(name):
  """Version 5 of transformers writes other names than its modules have."""
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
def test_whose_names_and_what_was_left_out_is_told(name):
  case = CASES[name]
  got = foreign.find(case.state, set(case.timm or ()))[0]
  assert sorted(got.left) == sorted(LEFT[name])
  if case.model in vc.list_models():
    model = vc.create_model(case.model, **case.fields)
    lines = convert.read_state_dict(model, case.state).lines()
    whose = {"transformers": "transformers'", "Google": "Google's", "MAE": "MAE's"}
    assert f"names: {whose[name.split()[0]]}, read as timm's" in lines
    for what in LEFT[name]:
      assert any(line.startswith(f"left out, {what}: ") for line in lines)
