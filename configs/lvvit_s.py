"""LV-ViT-S on ImageNet-1k with token labelling and MixToken: 300 epochs and 10 of cool-down.

Command:  python main.py --config=configs/lvvit_s.py --workdir=runs/lvvit_s
          with configs/lvvit_s.py:lvvit_t or :lvvit_m for the other sizes.
Data:     ImageNet-1k with token labels from an annotating network (the authors': NFNet-F6);
          vitcompact/data/labels.py says where their files are expected.
Hardware: the authors used 8 GPUs with 128 images each.
Cost:     15.6 EFLOP, forward and backward of 397 M images through the dense model.
Result:   not run here. The authors publish 79.1, 83.3 and 84.0 % top-1 for T, S and M.

The authors do not state T's drop path and learning rate; we use S's.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="lvvit_s")
  config = deit_s.get_config()
  config.total_steps = 310 * STEPS_PER_EPOCH
  config.ema_half_life = 0.02234  # of the run: a decay of 0.99992 per step
  config.eval_params = "ema"      # the best checkpoint is chosen by these too
  config.model.name = options.model
  config.model.drop_path_rate = 0.2 if options.model == "lvvit_m" else 0.1
  config.data.augment = "token_labels"      # flip, RandAugment and crop, also applied to the map
  config.data.eval_crop = 0.0     # the model's own
  config.data.replicas = 8
  config.data.repeats = 1
  config.data.mixup = 0.0
  config.data.cutmix = 0.0
  config.optim.schedule = "epoch"
  config.optim.learning_rate = 1.6e-3       # absolute
  config.optim.cooldown_steps = 10 * STEPS_PER_EPOCH
  return base.finish(config, options)
