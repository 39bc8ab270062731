"""MCTF on DeiT-S from a trained dense model: 30 epochs and 10 of cool-down (CVPR 2024).

Command:  python main.py --config=configs/mctf_deit_s.py --workdir=runs/mctf_deit_s \\
            --config.init_from=deit_small.safetensors
          with configs/mctf_deit_s.py:deit_tiny_patch16_224 for DeiT-T.
Data:     ImageNet-1k as in configs/deit_s.py, but without mixup and cutmix.
Hardware: the authors used 8 GPUs with 128 images each; each step has two passes.
Cost:     1.41 EFLOP, forward and backward of 51.2 M images through the dense model, plus the second
          pass.
Result:   not run here. The authors publish 80.1 % top-1 for S (dense: 79.8 %) and 72.7 % for T
          (dense: 72.2 %), with order="code", which is not the same function as this plan's.
At 384:   at 320 pixels or more, the authors evaluate the whole image, distorting its aspect ratio:
          convert the file with --image-size 384, then --config.model.image_size=384
          --config.data.eval_fit=warp.

The number of tokens that the second pass merges is drawn at each step; the authors draw it on each
GPU. Its eight values are eight programs to compile.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="deit_small_patch16_224")
  config = deit_s.get_config()
  config.total_steps = 40 * STEPS_PER_EPOCH
  config.ema_half_life = 0.3463   # of the run: a decay of 0.99996 per step
  config.plan = {"tokens": {"method": "mctf", "r": 16}}
  config.model.name = options.model
  config.data.replicas = 8        # of 128 images
  config.data.mixup = 0.0
  config.data.cutmix = 0.0
  config.optim.learning_rate = 3e-5         # 1.5e-5 for each 512 images of a batch
  config.optim.warmup_steps = 0
  config.optim.final_learning_rate = 1e-6
  config.optim.cooldown_steps = 10 * STEPS_PER_EPOCH
  config.loss.consistency = 3.0
  config.loss.second_pass_r = 7     # the second pass merges 0 to 7 tokens per block
  return base.finish(config, options, {"loss.second_pass_r": 1})
