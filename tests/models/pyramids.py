"""Small pyramids shared by the tests of PVT v1 and v2."""
import vitcompact as vc

# 16, 8, 4 and 2 cells per side, keys on 2 x 2 of them; the third stage has an odd number of heads.
SIZES = {"image_size": 64, "num_classes": 5, "widths": (8, 16, 20, 16), "depths": (1, 1, 2, 1),
         "heads": (1, 2, 5, 4), "mlp_ratios": (2, 2, 2, 2)}
# Two stages, for tests that compile gradients or compile more than once.
SHORT = {"image_size": 32, "widths": (16, 20), "depths": (1, 1), "heads": (2, 5),
         "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
HEADS, FFN = {"heads": vc.HMHSA()}, {"ffn": vc.CFFN()}
COMPACT = vc.Plan(**HEADS, **FFN)


def pvt(name="pvt_small", plan=None, **fields):
  return vc.create_model(name, plan=plan or vc.Plan(), **{**SIZES, **fields})


def check_counts(name, row):
  """Checks row: (parameters, MACs / 1e9) of the named model dense, heads, ffn, both.

  Heads and FFNs are independent, and deep models repeat the blocks of the small ones, so deep
  models are traced only for dense and both.
  """
  columns = list(zip(({}, HEADS, FFN, {**HEADS, **FFN}), row, strict=False))
  deep = sum(vc.create_model(name).depths) > 16
  for axes, (params, gmacs) in columns[::3] if deep else columns:
    count = vc.count(vc.create_model(name, plan=vc.Plan(**axes), deploy=True))
    assert count.params == params, axes
    assert abs(count.macs / 1e9 / gmacs - 1) < 1e-3, axes
