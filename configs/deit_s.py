"""DeiT-S on ImageNet-1k from scratch: 300 epochs at 224 pixels, the published recipe.

Command:  python main.py --config=configs/deit_s.py --workdir=runs/deit_s
          with configs/deit_s.py:deit_tiny_patch16_224 for T, or
          configs/deit_s.py:deit_base_patch16_224 for B; with a distillation token, trained on
          another model's predictions:
          python main.py --config=configs/deit_s.py:deit_small_distilled_patch16_224 \\
            --workdir=runs/deit_s_distilled --config.teacher.file=nextvit_base.safetensors
          and configs/deit_s.py:deit_tiny_distilled_patch16_224 and
          configs/deit_s.py:deit_base_distilled_patch16_224 likewise.
Data:     class folders: imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG. To choose
          checkpoints on held-out images, move some train images to val and rename the 50,000 to
          test. Or --config.data.name=arrayrecord:OUT, which vitcompact prepare imagenet writes
          from the official tars, or tfds:imagenet2012: there the 50,000 are both val and test.
Hardware: the authors used 4 GPUs with 256 images each, and 16 GPUs with 64 images each for B.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model (T: 2.89, B:
          40.5; with the distillation token 10.7, plus the teacher's forward pass).
Result:   not run here. The recipe's authors publish 72.2, 79.9 and 81.8 % top-1 for the dense T, S
          and B; with distillation 74.5, 81.2 and 83.4 % from RegNetY-16GF (82.9 %), which this
          library does not have. Any model of this library can be the teacher.
"""
from configs import base

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="deit_small_patch16_224")
  config = base.get_config()
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.batch_size = 1024
  config.eval_batch_size = 1024
  config.checkpoint_every = 10 * STEPS_PER_EPOCH
  config.log_every = 100
  config.ema_half_life = 0.0462   # of the run: a decay of 0.99996 per step
  config.eval_params = "raw"      # DeiT keeps averages, but evaluates and publishes raw weights

  config.model = {"name": options.model, "image_size": 224, "drop_path_rate": 0.1,
                  "dtype": "bfloat16", "remat": False}

  config.data.name = "folder:imagenet"
  config.data.augment = "randaugment"   # random resized crop, flip, rand-m9-mstd0.5-inc1
  config.data.workers = 16
  config.data.eval_crop = 0.875   # the authors'; timm's differs
  config.data.erase = 0.25
  config.data.smoothing = 0.1
  config.data.mixup = 0.8
  config.data.cutmix = 1.0
  config.data.replicas = 16 if "base" in options.model else 4   # the authors' devices
  config.data.repeats = 3         # so an epoch has a third of the images

  config.optim.schedule = "late_epoch"   # DeiT updates the rate only after each epoch
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 1e-3         # the peak: 5e-4 for each 512 images of a batch
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH

  if "distilled" in options.model:
    config.teacher.name = "nextvit_base"
    config.loss.labels = 0.5
    config.loss.hard = 0.5        # or soft, with a temperature
  return base.finish(config, options)
