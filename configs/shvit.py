"""SHViT on ImageNet-1k from scratch: 300 epochs of batches of 2048.

Command:  python main.py --config=configs/shvit.py --workdir=runs/shvit_s1
          with configs/shvit.py:shvit_s2, :shvit_s3 or :shvit_s4 for the others; S4 uses 256 pixels.
Hardware: the authors used 8 GPUs with 256 images each; batch norms are per GPU.
Cost:     0.556 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 72.8, 75.2, 77.4 and 79.4 % top-1 for S1 to S4.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 625             # 1,281,167 images in batches of 2048
WEIGHT_DECAY = {"shvit_s1": 0.025, "shvit_s2": 0.032, "shvit_s3": 0.035, "shvit_s4": 0.03}


def get_config(argument=""):
  options = base.parse(argument, model="shvit_s1")
  config = deit_s.get_config()
  config.batch_size = 2048
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.checkpoint_every = 10 * STEPS_PER_EPOCH
  config.ema_half_life = 0.09242  # of the run: decay 0.99996 per step; not evaluated, as in DeiT
  config.model.name = options.model
  config.model.image_size = 256 if options.model == "shvit_s4" else 224
  config.model.drop_path_rate = 0.0
  config.model.dtype = "float32"  # the authors' too
  config.data.replicas = 8
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 4e-3         # the peak: 1e-3 for each 512 images of a batch
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.weight_decay = WEIGHT_DECAY.get(options.model, 0.025)
  config.optim.adaptive_clip = 0.02
  return base.finish(config, options)
