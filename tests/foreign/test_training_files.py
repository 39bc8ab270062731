"""Files of training code: the trained network is read, and a line lists the rest of the file."""
import argparse
import warnings

import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.foreign.cases import cases
from vitcompact import convert, trees

MODEL = tiny.deit(num_classes=0)
STATE = vc.to_torch(MODEL, tiny.init(MODEL))
OTHER = vc.to_torch(MODEL, tiny.init(MODEL, seed=2))
WANTED = trees.digest(vc.from_torch(MODEL, STATE))
HEAD = {"mlp.0.weight": np.ones((9, 24), np.float32), "last_layer.weight_g": np.ones((9, 1))}


def add_prefix(prefix, state=STATE):
  return {prefix + name: value for name, value in state.items()}


def chunked(state):
  """Returns names as in DINOv2's FSDP files, where a block's own number comes second."""
  return {name.replace("blocks.", "blocks.0."): value for name, value in state.items()}


def read(checkpoint, model=MODEL, **options):
  loaded = convert.read_state_dict(model, checkpoint, **options)
  return trees.digest(loaded.variables), loaded.lines()


def test_of_a_dino_file_the_teacher_is_read_without_the_projection_head():
  file = {"student": {**add_prefix("module.backbone.", OTHER), **add_prefix("module.head.", HEAD)},
          "teacher": {**add_prefix("backbone."), **add_prefix("head.", HEAD)},
          "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(arch="vit_small"),
          "dino_loss": {"center": np.ones((1, 9))}}
  digest, lines = read(file)
  assert digest == WANTED
  assert lines == ["weights: teacher, not student (--weights chooses)",
                   "prefix taken off the names: backbone.",
                   "left out, not part of the model: head.mlp.0.weight, head.last_layer.weight_g"]
  assert read(file, weights="student")[0] == trees.digest(vc.from_torch(MODEL, OTHER))


@pytest.mark.parametrize("numbers", [("0", "0"), ("0", "1")])
def test_of_a_dinov2_file_the_teacher_is_read_from_chunks_of_blocks(numbers):
  chunk = {name.replace("blocks.0.", f"blocks.{numbers[0]}.0.")
           .replace("blocks.1.", f"blocks.{numbers[1]}.1."): value for name, value in STATE.items()}
  teacher = {**add_prefix("backbone.", {**chunk, "mask_token": np.ones((1, 24), np.float32)}),
             **add_prefix("dino_head.", HEAD), **add_prefix("ibot_head.", HEAD)}
  for file in ({"teacher": teacher}, {"model": add_prefix("teacher.", teacher)}):
    digest, lines = read(file)
    assert digest == WANTED
    assert "names: DINOv2's, read as timm's" in lines
    assert any(line.startswith("left out, the token of masked patches: ") for line in lines)
    assert any(line.startswith("left out, not part of the model: ") for line in lines)


def test_two_blocks_with_the_same_number_are_refused():
  state = {**STATE, "blocks.7.1.norm1.weight": np.ones(24, np.float32)}
  with pytest.raises(ValueError, match=r"two tensors of one name, .*are both blocks.1.norm1"):
    vc.from_torch(MODEL, state)


def test_pytorch_averages_and_lightning_checkpoints_are_read():
  average = {"n_averaged": np.array(5), **add_prefix("module.")}
  assert read(average) == (WANTED, ["dropped: n_averaged"])
  for prefix in ("model.", "net.", "backbone.", "model.backbone.", "model.module._orig_mod."):
    file = {"state_dict": add_prefix(prefix), "epoch": 3, "global_step": 9, "callbacks": {},
            "pytorch-lightning_version": "2.6", "hyper_parameters": {"lr": 0.1}}
    digest, lines = read(file)
    assert digest == WANTED and lines[0] == "weights: state_dict"


def test_a_transformers_model_inside_lightning_keeps_its_classifier():
  case = cases()["transformers ViT"]
  model = vc.create_model(case.model, **case.fields)
  file = {"state_dict": add_prefix("model.", case.state), "loss.weight": np.ones(5)}
  digest, lines = read(file, model)
  assert digest == trees.digest(vc.from_torch(model, case.state))
  assert "prefix taken off the names: model.vit." in lines


def test_known_extra_parts_cause_no_warning_and_unknown_ones_an_error():
  mae = {**STATE, "mask_token": np.ones((1, 1, 24)), "decoder_embed.weight": np.ones((8, 24)),
         "decoder_blocks.0.norm1.weight": np.ones(8), "decoder_pos_embed": np.ones((1, 17, 8))}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert trees.digest(vc.from_torch(MODEL, {"model": mae})) == WANTED
  with pytest.raises(ValueError, match=r"unexpected neck.weight"):
    vc.from_torch(MODEL, {"model": {**mae, "neck.weight": np.ones(3)}})
  # Without the rest of MAE's decoder it is an error: nothing is left out by its name alone.
  with pytest.raises(ValueError, match=r"unexpected mask_token|unexpected decoder_pos_embed"):
    vc.from_torch(MODEL, {**STATE, "decoder_pos_embed": np.ones((1, 17, 8))})


def test_the_closest_model_to_foreign_weights_is_named():
  case = cases()["transformers ViT"]
  with pytest.raises(ValueError, match=r"names transformers', read as timm's\) does not fit"):
    vc.from_torch(tiny.deit(depth=1), case.state)
  # A full DeiT-Ti, with blocks named as in DINOv2's files.
  names = chunked({name: np.broadcast_to(np.float32(0), shape)
                   for name, shape in _shapes("deit_tiny_patch16_224").items()})
  with pytest.raises(ValueError, match=r"the closest model is (deit|vit)_tiny_patch16_224"):
    vc.from_torch(vc.create_model("deit_small_patch16_224"), names)


def _shapes(name):
  from vitcompact import fit
  return dict(fit._tensors(name)[0])
