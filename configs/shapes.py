"""A compact DeiT on drawn scenes whose label relates two distant objects; any size, no download.

Command:  python main.py --config=configs/shapes.py --workdir=runs/shapes
Larger:   --config.model.image_size=192 gives 577 tokens; objects scale with the image.
Cost:     62 TFLOP, forward and backward of 384,000 images through the dense model.
Result:   not run to completion.
"""
from configs import base, digits


def get_config(argument=""):
  config = digits.get_config()
  config.total_steps = 3000
  total = config.get_ref("total_steps")
  config.batch_size = 128
  config.checkpoint_every = total // 6
  config.log_every = 50
  config.eval_batch_size = 200
  config.model.image_size = 48    # pixels
  config.model.patch_size = 8     # pixels: 36 tokens and the class token
  config.model.width = 96
  config.model.depth = 6
  config.data.name = "shapes"
  config.data.augment = "none"    # a mirrored scene has another label
  config.optim.learning_rate = 1e-3         # the peak
  config.optim.warmup_steps = total // 15
  return base.finish(config, base.parse(argument))
