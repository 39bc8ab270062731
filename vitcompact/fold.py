"""fold: the deployed form of a model, without anything that only training needs."""
import flax.linen as nn

from vitcompact.checks import check_model, check_variables


def fold(model: nn.Module, variables):
  """Returns (deployed model, its variables): the same function, re-parameterised.

  Branches, their norms and skips become one factor pair. `fold` is pure in the variables (it can be
  traced), idempotent, and measures no times. If you evaluate the EMA of parameters and batch
  statistics, pass these.
  """
  check_model(model)
  check_variables(model, variables)
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  if not model.deploy:
    for name, module in model.submodules().items():
      params[name], stats[name] = module.fold(params[name], stats.get(name, {}))
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  return model.clone(deploy=True), {"params": params, **({"batch_stats": stats} if stats else {})}
