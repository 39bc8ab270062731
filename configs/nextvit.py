"""Next-ViT on ImageNet-1k from scratch: 300 epochs of batches of 2048.

Command:  python main.py --config=configs/nextvit.py --workdir=runs/nextvit_small
          with configs/nextvit.py:nextvit_base or :nextvit_large for the others.
Hardware: the authors used 8 GPUs with 256 images each; batch norms are per GPU.
Cost:     13.4 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 82.5, 83.2 and 83.6 % top-1 for S, B and L.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 625             # 1,281,167 images in batches of 2048


def get_config(argument=""):
  options = base.parse(argument, model="nextvit_small")
  config = deit_s.get_config()
  config.batch_size = 2048
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.checkpoint_every = 10 * STEPS_PER_EPOCH
  config.ema_half_life = 0.0
  config.model.name = options.model
  config.model.drop_path_rate = 0.1 if options.model == "nextvit_small" else 0.2
  config.data.replicas = 8
  config.data.repeats = 1
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 2e-3         # the peak: 5e-4 for each 512 images of a batch
  config.optim.warmup_steps = 20 * STEPS_PER_EPOCH
  config.optim.weight_decay = 0.1
  config.optim.clip_norm = 5.0
  return base.finish(config, options)
