"""The dense model that configs/digits.py makes compact: the same in all but the plan.

Command:  python main.py --config=configs/digits_dense.py --workdir=runs/digits_dense
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     1.38 TFLOP, forward and backward of 64,000 images through the dense model.
Result:   not run to its end.
"""
from configs import digits


def get_config():
  config = digits.get_config()
  config.plan = ""
  return config
