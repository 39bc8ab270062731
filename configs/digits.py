"""A compact DeiT (hMHSA and cFFN) on real images in two or three minutes: the first run to try.

Command:  python main.py --config=configs/digits.py --workdir=runs/digits
          with configs/digits.py:dense for the dense model, which differs only in the plan.
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     about two and a half minutes of CPU time, half a minute of it for compilation.
Result:   test accuracy 98.9 %; an earlier version on another processor reached 98.6, 99.4 and
          98.6 % with --config.seed=0, 1 and 2.

Warm-up and checkpoint intervals scale with --config.total_steps.
"""
from configs import base


def get_config(argument=""):
  options = base.parse(argument, dense=False)
  config = base.get_config()
  if not options.dense:
    config.plan = {"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}
  total = config.get_ref("total_steps")
  config.eval_batch_size = 120
  config.checkpoint_every = total // 4
  config.ema_half_life = 0.0462   # of the run, like DeiT's decay of 0.99996 over 375,300 steps
  config.eval_params = "ema"
  config.model.image_size = 16    # pixels; 8 x 8 originals, enlarged
  config.model.patch_size = 4     # pixels: 16 tokens and the class token
  config.model.width = 64
  config.model.depth = 4
  config.model.heads = 4
  config.data.augment = "digits"  # small rotation, shift and scale, but no flip
  config.data.smoothing = 0.1
  config.optim.learning_rate = 4e-3         # the peak
  config.optim.warmup_steps = total // 10
  config.optim.clip_norm = 1.0
  return base.finish(config, options)
