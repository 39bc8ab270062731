"""Every key of a config with the library's default, except for keys of methods. Other configs start
from this one.

Command:  python main.py --config=configs/base.py --workdir=runs/base
Cost:     35.3 TFLOP, forward and backward of 64,000 images through the dense model.
Result:   none: this is a starting point for your own config.

Every config accepts the argument `runlocal`, which makes everything small, for a run of seconds on
a laptop. Arguments are joined by commas: --config=configs/deit_s.py:deit_tiny_patch16_224,runlocal

A method's settings (such as the weight of its loss) may only be set if the plan has the method. Any
key that a config leaves out has the library's default.
"""
from ml_collections import ConfigDict


def get_config(argument=""):
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""           # weights to start from, a file or a name (docs/weights.md); dense
                                  # weights are compacted first
  config.total_steps = 1000
  config.batch_size = 64          # images per step, over all devices and microbatches
  config.accumulate = 1           # sequential microbatches per step
  config.eval_batch_size = 64
  config.checkpoint_every = 1000  # steps; each checkpoint is evaluated on val
  config.keep_last = 2            # checkpoints to keep, besides the best on val
  config.log_every = 50           # steps
  config.ema_half_life = 0.0      # as a share of the run; 0: no averages
  config.eval_params = "raw"      # or "ema": which are evaluated, folded and reported
  config.plan = ConfigDict()      # {axis: {"method": name, ...}}; empty: dense. Or "plan.json"

  config.model = ConfigDict()     # a name, and any keyword arguments of vc.create_model
  config.model.name = "deit_tiny_patch16_224"
  config.model.image_size = 16    # pixels
  config.model.patch_size = 4     # pixels
  config.model.drop_path_rate = 0.0
  config.model.dtype = "float32"  # of the computation; parameters are always float32
  config.model.remat = False      # True: blocks are recomputed in the backward pass to save memory

  config.data = ConfigDict()
  config.data.name = "digits"     # vitcompact/data/sources.py lists the others
  config.data.augment = "none"    # vitcompact/data/pipeline.py lists them
  config.data.workers = 0         # processes that decode and augment; 0: threads
  config.data.erase = 0.0         # probability of random erasing
  config.data.smoothing = 0.0
  config.data.mixup = 0.0         # alpha; 0: off
  config.data.cutmix = 0.0        # alpha; 0: off
  config.data.eval_fit = "crop"   # or "warp": evaluate the whole image, distorting its aspect ratio
  config.data.eval_crop = 0.0     # share of the image kept by the crop; 0: the model's own
  config.data.replicas = 1        # of the recipe, not of the hardware: each draws its own mixing
  config.data.repeats = 1         # repeated augmentation: showings of an image in succession
  config.data.on_bad = "stop"     # at a record that cannot be read; or "skip": take the next one
  config.data.max_bad = 0         # records that may be skipped

  config.optim = ConfigDict()
  config.optim.name = "adamw"     # or "muon", or "sgd" with momentum b1
  config.optim.schedule = "step"  # "step", "epoch", "late_epoch" or "after_warmup"
  config.optim.epoch_steps = 1    # steps per epoch, for "epoch" and "late_epoch"
  config.optim.learning_rate = 1e-3         # the peak
  config.optim.warmup_steps = 0
  config.optim.warmup_learning_rate = 1e-6  # of step 0
  config.optim.final_learning_rate = 1e-5
  config.optim.cooldown_steps = 0           # at the end, with the final learning rate
  config.optim.weight_decay = 0.05
  config.optim.b1, config.optim.b2, config.optim.eps = 0.9, 0.999, 1e-8
  config.optim.clip_norm = 0.0    # global norm of the gradient; 0: no clipping
  config.optim.adaptive_clip = 0.0   # largest gradient norm per output unit, relative to the norm
                                     # of its weights; 0: off
  config.optim.skip_nonfinite = 0 # steps with NaN that are skipped before the run stops
  config.optim.rates = ()         # (pattern, factor of the rate, first step); first match wins

  config.loss = ConfigDict()      # weights; 0: off
  config.loss.labels = 1.0
  config.loss.patch_labels = 1.0  # for models with patch logits (LV-ViT)
  config.loss.hard = 0.0          # hard distillation: the teacher's predicted class
  config.loss.soft = 0.0          # soft distillation as in DeiT, at `temperature`
  config.loss.temperature = 1.0
  config.loss.logits = 0.0        # KL from the teacher's logits
  config.loss.patches = 0.0       # error from the teacher's patch features, by `patch_error`
  config.loss.patch_error = "square"    # or "divergence", between LV-ViT's patch logits
  config.loss.attention = 0.0     # error from the teacher's attention maps, averaged over heads

  config.export = ""              # formats of the deployed model, such as "onnx,openvino"
  config.keep_start = False       # with init_from: keep the initial weights if better on val
  config.compact = ConfigDict()   # from a dense model to a smaller one: vitcompact/run/path.py
  config.compact.macs = 0.0       # target share of the dense model's MACs; 0: off
  config.compact.params = 0.0     # or target share of its parameters
  config.compact.speedup = 0.0    # or how many times as fast as the dense model on this device
  config.compact.latency_ms = 0.0 # or milliseconds for a batch of latency_batch images
  config.compact.latency_batch = 1
  config.compact.images = 512     # calibration images, from the train split
  config.compact.sensitivity = "quick"      # or "full": try every option in every block
  config.compact.distil = True    # then distil from the dense model for total_steps
  config.compact.dense_steps = 0  # steps to train the dense model first, if init_from is empty
  config.compact.dense_learning_rate = 1e-3

  config.teacher = ConfigDict()
  config.teacher.file = ""        # the teacher's weights, a file or a name; "": no teacher
  config.teacher.name = ""        # its model; "": the dense form of this one

  config.mesh = ConfigDict()
  config.mesh.data = -1           # devices; -1: all remaining ones
  config.mesh.fsdp = 1            # devices that share one copy of the parameters
  config.mesh.tensor = 1          # devices that share the heads and hidden channels of a layer
  return finish(config, parse(argument))


def parse(argument: str, **options):
  """Returns {option: value} from a config's argument, words joined by commas.

  A word that names an option whose default is False turns it on; any other word is the value of the
  option whose default is a string. Every config has the option `runlocal`.
  """
  chosen = {**options, "runlocal": False}
  text = [name for name, default in options.items() if isinstance(default, str)]
  for word in filter(None, argument.split(",")):
    if chosen.get(word) is False:
      chosen[word] = True
    elif text and word not in chosen:
      chosen[text[0]] = word
    else:
      switches = [name for name, default in chosen.items() if isinstance(default, bool)]
      raise ValueError(f"{word!r} is not an argument of this config, which takes "
                       f"{', '.join([*(f'a {name}' for name in text), *switches])}")
  return ConfigDict(chosen)


def finish(config, options, small=()):
  """Returns the config, or with `runlocal` a small version of it that runs for seconds.

  small: {key: its value with `runlocal`}, for the settings of the config's methods.
  """
  if options.runlocal:
    local(config)
    config.update_from_flattened_dict(dict(small))
  return config


SMALL_ISOTROPIC = {"width": 16, "depth": 3, "heads": 2, "patch_size": 4, "image_size": 16}
SMALL = {   # {prefix of a model's name: its sizes with `runlocal`}
    "deit": SMALL_ISOTROPIC, "vit": SMALL_ISOTROPIC,
    "lvvit": {**SMALL_ISOTROPIC, "patch_size": 16, "image_size": 64, "stem_width": 4},
    "pvt": {"image_size": 64, "widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
            "heads": (1, 1, 2, 2)},
    "davit": {"image_size": 32, "widths": (8, 16, 16), "depths": (1, 1, 1), "heads": (2, 2, 4),
              "window_size": 3},
    "transnext": {"image_size": 64, "widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
                  "heads": (1, 1, 2, 2)},
    "nextvit": {"image_size": 64, "stem_widths": (8, 4, 8, 8), "widths": (8, 24, 24, 24),
                "depths": (1, 1, 1, 1), "periods": (0, 1, 0, 1), "head_dim": 8},
    "shvit": {"image_size": 64, "widths": (8, 12, 16), "depths": (1, 1, 1),
              "partial_widths": (4, 6), "qk_width": 8},
    "inline_deit": SMALL_ISOTROPIC,
    "inline_pvt": {"image_size": 64, "widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
                   "heads": (1, 1, 2, 2)},
    "biformer": {"image_size": 32, "widths": (8, 16), "depths": (1, 1), "top_ks": (1,),
                 "head_dim": 8, "regions": 2},
}


def local(config):
  """Shrinks a config to a narrow, shallow model on embedded data and 20 steps. Every part stays
  except the teacher, which would need a file, and token labels, which the data do not have."""
  steps = 20
  config.update(total_steps=steps, batch_size=32, accumulate=1, eval_batch_size=120,
                checkpoint_every=10, log_every=5)
  kind = next(kind for kind in SMALL if config.model.name.startswith(kind))
  config.model = ConfigDict({
      "name": config.model.name, "dtype": "float32", **SMALL[kind],
      **{key: config.model[key] for key in ("drop_path_rate", "remat", "mix_token")
         if key in config.model}})
  if config.data.name not in ("shapes", "directions"):
    config.data.name = "digits"
  config.data.update(workers=0, augment="none", replicas=min(config.data.replicas, 2))
  config.optim.update(epoch_steps=5, warmup_steps=min(config.optim.warmup_steps, 2),
                      cooldown_steps=min(config.optim.cooldown_steps, 2))
  config.optim.rates = tuple((pattern, factor, min(first, 2))
                             for pattern, factor, first in config.optim.rates)
  if any(config.compact[goal] for goal in ("macs", "params", "speedup", "latency_ms")):
    # These provide a teacher.
    config.compact.update(images=64, sensitivity="quick", dense_steps=20)
  else:
    config.loss.update(hard=0.0, soft=0.0, logits=0.0, patches=0.0)
  config.teacher.update(file="", name="")
