"""InLine's DeiT and PVT: the authors' logits, and the specification's counts."""
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models import parity

RUNS = parity.runs("inline")
# parameters, MACs / 1e9
ROWS = {"inline_deit_tiny": (6_477_736, 1.1092), "inline_deit_small": (16_734_760, 4.9658),
        "inline_deit_base": (23_797_096, 17.1691), "inline_pvt_tiny": (12_032_232, 1.9758),
        "inline_pvt_small": (21_556_136, 3.9149)}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_logits_match_the_authors_code(run):
  assert parity.difference(run) < 1e-5


@pytest.mark.parametrize("name", tiny.named(ROWS, "inline_deit_tiny", "inline_pvt_tiny"))
def test_parameter_counts_are_exact_and_macs_match_to_a_thousandth(name):
  got = vc.count(vc.create_model(name))
  assert got.params == ROWS[name][0]
  assert got.macs / 1e9 == pytest.approx(ROWS[name][1], rel=1e-3)


@pytest.mark.parametrize("run", [RUNS[0], RUNS[4]], ids=["deit", "pvt"])
def test_weights_round_trip_through_pytorch_bit_for_bit(run):
  back = vc.to_torch(run.model, vc.from_torch(run.model, run.state))
  assert back.keys() == run.state.keys()
  assert all(np.array_equal(back[name], run.state[name]) for name in back)


def test_model_name_implies_inline_attention_which_combines_with_other_methods():
  sizes = {"depth": 1, "width": 12, "heads": 2, "image_size": 32}
  model = vc.create_model("inline_deit_tiny", **sizes)
  assert model.plan == vc.Plan(attention=vc.InLine())
  both = vc.create_model("inline_deit_tiny", plan=vc.Plan(ffn=vc.CFFN()), **sizes)
  assert both.plan == vc.Plan(attention=vc.InLine(), ffn=vc.CFFN())
  other = vc.Plan(attention=vc.InLine(local=False))
  assert vc.create_model("inline_deit_tiny", plan=other, **sizes).plan == other
