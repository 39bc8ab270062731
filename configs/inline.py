"""InLine-DeiT and InLine-PVT on ImageNet-1k from scratch: 300 epochs, the authors' configs.

Command:  python main.py --config=configs/inline.py --workdir=runs/inline_deit_tiny
          with configs/inline.py:inline_deit_small, :inline_deit_base, :inline_pvt_tiny,
          :inline_pvt_small, :inline_pvt_medium or :inline_pvt_large for the others.
Hardware: the authors used 8 GPUs, with 512 images each for DeiT-T, 64 for B and 128 otherwise.
Cost:     2.55 EFLOP, forward and backward of 384 M images.
Result:   not run here. The authors publish 74.5, 80.2 and 82.3 % top-1 for DeiT-T, S and B, at 224,
          288 and 448 pixels; 78.2, 82.0, 83.2 and 83.6 % for PVT-Tiny, Small, Medium and Large.
"""
from configs import base, deit_s

IMAGES, GPUS = 1_281_167, 8
PIXELS = {"inline_deit_small": 288, "inline_deit_base": 448}
ON_A_GPU = {"inline_deit_tiny": 512, "inline_deit_base": 64}   # images
DEEP = ("inline_pvt_medium", "inline_pvt_large")


def get_config(argument=""):
  options = base.parse(argument, model="inline_deit_tiny")
  config = deit_s.get_config()
  config.model.name = options.model
  config.plan = {"attention": {"method": "inline"}}
  config.batch_size = GPUS * ON_A_GPU.get(options.model, 128)
  config.eval_batch_size = config.batch_size
  steps_per_epoch = IMAGES // config.batch_size
  config.total_steps = 300 * steps_per_epoch
  config.checkpoint_every = 10 * steps_per_epoch
  config.ema_half_life = 0.0

  config.model.image_size = PIXELS.get(options.model, 224)
  config.model.drop_path_rate = 0.3 if options.model in DEEP else 0.1
  config.data.replicas = GPUS
  config.data.repeats = 1

  # Rates are for 512 images; the PVTs have a shorter warm-up and no gradient clipping.
  pyramid, scale = "pvt" in options.model, config.batch_size / 512
  config.optim.schedule = "step"
  config.optim.learning_rate = 5e-4 * scale
  config.optim.warmup_steps = (5 if pyramid else 20) * steps_per_epoch
  config.optim.warmup_learning_rate = (1e-6 if pyramid else 5e-7) * scale
  config.optim.final_learning_rate = (1e-5 if pyramid else 5e-6) * scale
  config.optim.clip_norm = 0.0 if pyramid else 5.0
  return base.finish(config, options)
