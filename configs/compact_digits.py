"""The whole path from a dense model to a smaller one, on real images in a few minutes.

Command:  python main.py --config=configs/compact_digits.py --workdir=runs/compact_digits
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Stages:   a dense model is trained (configs/digits.py:dense) and measured on 1,024 training images;
          a plan for half of its MACs is chosen; the model is compacted, distilled from the dense
          one for a tenth of its steps at a twentieth of its learning rate, folded, verified and
          timed.
Cost:     about three minutes of CPU time, one of them for compilation.
Result:   see the receipt that the run writes.
"""
from configs import base, digits


def get_config(argument=""):
  options = base.parse(argument)
  config = digits.get_config("dense")
  config.compact.update(macs=0.5, images=1024, sensitivity="full", dense_steps=1000,
                        dense_learning_rate=config.optim.learning_rate)
  config.total_steps = 100
  config.optim.learning_rate = config.compact.dense_learning_rate / 20
  config.data.smoothing = 0.0
  config.loss.update(labels=0.0, logits=1.0, patches=1.0)
  return base.finish(config, options)
