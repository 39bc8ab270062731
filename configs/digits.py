"""A compact DeiT (hMHSA and cFFN) on real images in two or three minutes: the first run to try.

Command:  python main.py --config=configs/digits.py --workdir=runs/digits
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     about two and a half minutes of processor time, half a minute of it for compiling.
Result:   test accuracy 98.6, 99.4 and 98.6 % with --config.seed=0, 1 and 2.
"""
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""           # .safetensors to start from; a dense one is made compact first
  config.total_steps = 1000
  config.batch_size = 64          # images of one step, all devices and microbatches together
  config.accumulate = 1           # microbatches of a step, one after another
  config.eval_batch_size = 120
  config.checkpoint_every = 250   # steps; each is evaluated on val
  config.keep_last = 2            # checkpoints, besides the best on val
  config.log_every = 50           # steps
  config.ema_half_life = 0.0462   # of the run, as DeiT's 0.99996 over 375,300 steps; 0: no averages
  config.eval_params = "ema"      # "raw" or "ema": what is evaluated, folded and reported
  config.plan = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'   # or a path: plan.json

  config.model = ConfigDict()
  config.model.name = "deit_tiny_patch16_224"
  config.model.image_size = 16    # pixels; 8 x 8 originals, enlarged
  config.model.patch_size = 4     # pixels: 16 tokens and the class token
  config.model.width = 64
  config.model.depth = 4
  config.model.heads = 4
  config.model.drop_path_rate = 0.0
  config.model.dtype = "float32"  # of the computation; parameters are always float32
  config.model.remat = False      # True: less memory, blocks are computed twice

  config.data = ConfigDict()
  config.data.name = "digits"
  config.data.augment = "digits"  # small rotation, shift and scale; a mirrored digit is no digit
  config.data.workers = 0         # processes; 0: threads
  config.data.erase = 0.0         # probability of random erasing
  config.data.smoothing = 0.1
  config.data.mixup = 0.0         # alpha; 0: off
  config.data.cutmix = 0.0        # alpha; 0: off
  config.data.mix_groups = 1      # groups of a batch that draw their own mix

  config.optim = ConfigDict()
  config.optim.learning_rate = 4e-3         # the peak
  config.optim.warmup_steps = 100
  config.optim.warmup_learning_rate = 1e-6  # of step 0
  config.optim.final_learning_rate = 1e-5
  config.optim.weight_decay = 0.05
  config.optim.b1, config.optim.b2, config.optim.eps = 0.9, 0.999, 1e-8
  config.optim.clip_norm = 1.0    # global norm of the gradient; 0: no clipping
  config.optim.skip_nonfinite = 0 # steps that may change nothing for a NaN, before the run stops

  config.mesh = ConfigDict()
  config.mesh.data = -1           # devices; -1: all the rest
  config.mesh.fsdp = 1            # devices that share one copy of the parameters
  config.mesh.tensor = 1          # devices that share the heads and hidden channels of a layer
  return config
