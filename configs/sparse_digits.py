"""Fewer links, fewer tokens, or both, fine-tuned on digits from a dense model that also teaches.

Command:  python main.py --config=configs/sparse_digits.py:dense --workdir=runs/dense
          python main.py --config=configs/sparse_digits.py:token --workdir=runs/token \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with block, evit, sparsif_evit or tuned (dense, fine-tuned alike) in place of token.
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     about two minutes of processor time for the dense model, one for each other.
Result:   python -m experiments.accuracy digits trains them all in five folds, and prints a table.
"""
from configs import digits

LINKS = '"links": {"method": "sparsifiner", "keep": 0.25, %s}'
TOKEN = LINKS % '"reduce_n": 8, "coefficients": 4'
BLOCK = LINKS % '"granularity": "block", "window": 2, "min_tokens": 0'
EVIT = '"tokens": {"method": "evit", "keep": 0.7, "blocks": [1, 2]}'
PLANS = {"dense": "", "tuned": "", "token": f"{{{TOKEN}}}", "block": f"{{{BLOCK}}}",
         "evit": f"{{{EVIT}}}", "sparsif_evit": f"{{{TOKEN}, {EVIT}}}"}


def get_config(plan="token"):
  config = digits.get_config()
  config.plan = PLANS[plan]
  config.model.image_size = 12    # pixels
  config.model.patch_size = 2     # pixels: 36 tokens and the class token
  config.model.depth = 3
  config.model.heads = 2
  config.model.position_std = 0.5
  config.log_every = 100
  if plan == "dense":
    config.total_steps = 500
    config.checkpoint_every = 500
    config.optim.warmup_steps = 50
    config.optim.learning_rate = 2e-3
    return config
  return fine_tune(config, steps=150, learning_rate=1e-3)


def fine_tune(config, steps, learning_rate):
  """`steps` of fine-tuning; with links, after a fifth as many of reconstruction."""
  config.total_steps = steps
  config.checkpoint_every = steps
  config.ema_half_life = 0.1455   # of the run
  config.optim.schedule = "after_warmup"
  config.optim.learning_rate = learning_rate
  config.optim.warmup_steps = steps // 20
  config.optim.warmup_learning_rate = 0.0
  config.optim.final_learning_rate = 1e-5
  config.loss.logits = 0.5
  config.loss.patches = 0.5
  if "sparsifiner" in config.plan:
    config.reconstruct.steps = steps // 5
    config.reconstruct.learning_rate = 3e-3
    config.reconstruct.warmup_steps = steps // 20
    config.reconstruct.final_learning_rate = 3e-4
    config.total_steps += config.reconstruct.steps
  return config
