"""DeiT-S on ImageNet-1k from scratch: 300 epochs at 224 pixels, the published recipe.

Command:  python main.py --config=configs/deit_s.py --workdir=runs/deit_s
Data:     class folders: imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG; move the train
          images that are to choose checkpoints to a val of their own and name the 50,000 test.
          Or --config.data.name=arrayrecord:OUT, which vitcompact prepare imagenet writes
          from the official tars, or tfds:imagenet2012: there the 50,000 are val and test.
Hardware: the authors used 4 GPUs with 256 images each.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The recipe's authors publish 79.9 % top-1 for the dense model.
"""
from ml_collections import ConfigDict

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""           # .safetensors to start from; a dense one is made compact first
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.batch_size = 1024        # images of one step, all devices and microbatches together
  config.accumulate = 1           # microbatches of a step, one after another
  config.eval_batch_size = 1024
  config.checkpoint_every = 10 * STEPS_PER_EPOCH   # each is evaluated on val
  config.keep_last = 2            # checkpoints, besides the best on val
  config.log_every = 100          # steps
  config.ema_half_life = 0.0462   # of the run: a decay of 0.99996 a step; 0: no averages
  config.eval_params = "raw"      # DeiT keeps averages, and evaluates and publishes the raw ones
  config.plan = ""                # dense; JSON, or a path such as plan.json

  config.model = ConfigDict()
  config.model.name = "deit_small_patch16_224"
  config.model.image_size = 224   # pixels
  config.model.drop_path_rate = 0.1
  config.model.dtype = "bfloat16" # of the computation; parameters are always float32
  config.model.remat = False      # True: less memory, blocks are computed twice

  config.data = ConfigDict()
  config.data.name = "folder:imagenet"
  config.data.augment = "randaugment"   # random resized crop, flip, rand-m9-mstd0.5-inc1
  config.data.workers = 16        # processes that decode and augment; 0: threads
  config.data.eval_fit = "crop"   # in evaluation; or "warp": the whole image, its aspect lost
  config.data.eval_crop = 0.875 # share of the image that evaluation crops, the authors'; 0: timm's
  config.data.erase = 0.25        # probability of random erasing
  config.data.smoothing = 0.1
  config.data.mixup = 0.8         # alpha
  config.data.cutmix = 1.0        # alpha
  config.data.replicas = 4        # of 256 images, the authors' devices: each draws its own mix
  config.data.repeats = 3         # showings of an image in a row: an epoch is a third of the images
  config.data.on_bad = "stop"     # at a record that cannot be used; or "skip" for the next one
  config.data.max_bad = 0         # so many may be passed over

  config.optim = ConfigDict()
  config.optim.name = "adamw"     # or "sgd", with Nesterov momentum b1
  config.optim.schedule = "late_epoch"   # DeiT sets the rate of an epoch after that epoch
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 1e-3         # the peak: 5e-4 for each 512 images of a batch
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.warmup_learning_rate = 1e-6  # of step 0
  config.optim.final_learning_rate = 1e-5
  config.optim.cooldown_steps = 0           # at the end, at the final learning rate
  config.optim.weight_decay = 0.05
  config.optim.b1, config.optim.b2, config.optim.eps = 0.9, 0.999, 1e-8
  config.optim.clip_norm = 0.0    # global norm of the gradient; 0: no clipping
  config.optim.skip_nonfinite = 0 # steps that may change nothing for a NaN, before the run stops
  config.optim.rates = ()         # (pattern, factor of the rate, first step); first match

  config.loss = ConfigDict()      # weights; 0: off
  config.loss.labels = 1.0
  config.loss.patch_labels = 1.0  # LV-ViT: of its patches
  config.loss.hard = 0.0          # the teacher's choice
  config.loss.soft = 0.0          # the teacher's logits, DeiT's way, at `temperature`
  config.loss.temperature = 1.0
  config.loss.logits = 0.0        # KL of the teacher's logits
  config.loss.patches = 0.0       # the teacher's patches, by `patch_error`
  config.loss.patch_error = "square"    # or "divergence", of LV-ViT's logits
  config.loss.kept_ratio = 0.0    # DynamicViT: the share of patches that each stage keeps
  config.loss.consistency = 0.0   # MCTF: with a pass that merges less,
  config.loss.companion_r = 7     # between 0 and so many tokens a block

  config.teacher = ConfigDict()
  config.teacher.file = ""        # .safetensors to learn from; "": no teacher
  config.teacher.name = ""        # its model; "": the dense form of this one

  config.reconstruct = ConfigDict()     # Sparsifiner's first phase: predictors of links alone
  config.reconstruct.steps = 0    # of total_steps; 0: none
  config.reconstruct.weight = 0.01
  config.reconstruct.learning_rate = 3e-4
  config.reconstruct.warmup_steps = 0
  config.reconstruct.warmup_learning_rate = 0.0
  config.reconstruct.final_learning_rate = 2e-4

  config.keep_warmup = ConfigDict()     # EViT: keep rate 1 for `start` steps, then down in `steps`
  config.keep_warmup.start = 0
  config.keep_warmup.steps = 0    # both 0: none

  config.mesh = ConfigDict()
  config.mesh.data = -1           # devices; -1: all the rest
  config.mesh.fsdp = 1            # devices that share one copy of the parameters
  config.mesh.tensor = 1          # devices that share the heads and hidden channels of a layer
  return config
