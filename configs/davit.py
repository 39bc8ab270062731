"""DaViT on ImageNet-1k from scratch: 300 epochs at 224 pixels and 10 of cool-down.

Command:  python main.py --config=configs/davit.py --workdir=runs/davit_tiny
          with configs/davit.py:davit_small or :davit_base for the others.
Hardware: the authors used 8 GPUs with 128 images each.
Cost:     10.8 EFLOP, forward and backward of 397 M images through the dense model.
Result:   not run here. The authors publish 82.8, 84.2 and 84.6 % top-1 for T, S and B.

The authors give only T's command. S and B differ from it in the drop path, taken from OpenMMLab's
configs.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="davit_tiny")
  config = deit_s.get_config()
  config.total_steps = 310 * STEPS_PER_EPOCH
  config.ema_half_life = 0.0
  config.model.name = options.model
  config.model.drop_path_rate = {"davit_small": 0.2, "davit_base": 0.4}.get(options.model, 0.1)
  config.data.eval_crop = 0.9     # the authors'; timm's differs
  config.data.replicas = 8
  config.data.repeats = 1
  config.optim.schedule = "epoch"
  config.optim.cooldown_steps = 10 * STEPS_PER_EPOCH
  config.optim.clip_norm = 1.0
  return base.finish(config, options)
