"""Translates other libraries' names and layouts to timm's, by the rules of `foreign_names`."""
import functools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcompact.foreign_names import SOURCES, SYNONYMS, Rule, Source
from vitcompact.foreign_tensors import is_tensor, to_float32


class Translated(NamedTuple):
  """state: under timm's names. source: whose names they were, "" if timm's or unknown.
  left_out: {what: names} of parts that no model here has."""
  state: dict[str, Any]
  source: str = ""
  left_out: Mapping[str, Sequence[str]] = types.MappingProxyType({})


def translated(state: Mapping[str, Any], known: set[str]) -> Translated:
  """A state dict under timm's names. known: the names that the model looks for.

  Raises ValueError if its source is not supported, or if two tensors get the same name.
  """
  source = next((source for source in SOURCES
                 if any(re.search(source.sign, name) for name in state)), None)
  if source is None:
    return Translated(resolved(state, known))
  if source.refusal:
    raise ValueError(f"the names are {source.name}: {source.refusal}")
  left_out = {}
  for name in state:
    if what := _ignored_part(source, name):
      left_out.setdefault(what, []).append(name)
  dropped = {name for names in left_out.values() for name in names}
  rest = {name: value for name, value in state.items() if name not in dropped}
  new = _apply_rules(source, source.before(rest) if source.before else rest)
  new = resolved(source.after(new) if source.after else new, known, left_out)
  return Translated(new, source.name if left_out or new.keys() != state.keys() else "", left_out)


def renamed(state: Mapping[str, Any], rename) -> dict[str, Any]:
  """{rename(name): value}; ValueError if two names become the same."""
  out, origin = {}, {}
  for name, value in state.items():
    new = rename(name)
    if new in out:
      raise ValueError(f"two tensors of one name, {origin[new]!r} and {name!r} are both {new}; "
                       "take one out")
    out[new], origin[new] = value, name
  return out


def resolved(state, known: set[str],
             left_out: dict[str, list[str]] | None = None) -> dict[str, Any]:
  """The state with timm's alternative names and forms replaced by those that the model looks for.

  left_out: receives the names of zero biases that the model does not have.
  """
  state = renamed(state, lambda name: _synonym(name, known))
  out = {}
  for name, value in state.items():
    found = re.fullmatch(r"(.+\.)??(blocks\.\d+\.attn\.)qkv\.bias", name)
    if (left_out is None or not found or f"{found[2]}qkv.bias" in known or not is_tensor(value)
        or value.shape[0] % 3):
      out[name] = value
      continue
    query, key, value_ = np.split(to_float32(name, value), 3)
    if f"{found[2]}q_bias" in known and not key.any():
      out[f"{found[1] or ''}{found[2]}q_bias"] = query
      out[f"{found[1] or ''}{found[2]}v_bias"] = value_
    elif query.any() or key.any() or value_.any():
      out[name] = value
    else:
      left_out.setdefault("biases that are zero", []).append(name)
  return out


def _synonym(name, known):
  for pattern, replacement in SYNONYMS:
    found = re.search(rf"(?:^|\.)({pattern.pattern})$", name)
    if found and found[1] not in known and (other := pattern.sub(replacement, found[1])) in known:
      return name[:found.start(1)] + other
  return name


def _ignored_part(source: Source, name: str) -> str | None:
  return next((what for pattern, what in source.left_out.items()
               if re.fullmatch(pattern, name)), None)


def _apply_rules(source, state):
  """Applies a source's rules; names without a rule stay."""
  out, origin = {}, {}
  targets: dict[str, tuple[Rule, dict[int, str]]] = {}   # timm's name: the rule, {part: old name}
  for name, value in state.items():
    matches = _matches(source, name) if is_tensor(value) else []
    for new, rule, part in matches:
      parts = targets.setdefault(new, (rule, {}))[1]
      if part in parts:
        raise _same_name(parts[part], name, new)
      parts[part] = name
    if not matches:
      out[name], origin[name] = value, name
  for new, (rule, parts) in targets.items():
    count = _compiled(rule.old)[1]
    if rule.join is None:
      value = state[parts[0]]
    else:
      arrays = [to_float32(parts[i], state[parts[i]]) if i in parts else None
                for i in range(count)]
      try:
        value = rule.join(arrays)
      except (ValueError, IndexError, AttributeError, TypeError):   # parts missing or misshapen
        out |= {name: state[name] for name in parts.values()}
        continue
    if new in out:
      raise _same_name(origin[new], parts[min(parts)], new)
    out[new] = value
  return out


def _same_name(first, second, new):
  return ValueError(f"two tensors of one name, {first!r} and {second!r} are both {new}; "
                    "take one out")


def _matches(source, name) -> list[tuple[str, Rule, int]]:
  """[(timm's name, rule, index of the part)]: several if a tensor is split."""
  found = []
  for rule in source.rules:
    if found and rule.old != found[0][1].old:
      break
    pattern, _ = _compiled(rule.old)
    if match := pattern.fullmatch(name):
      groups = match.groupdict()
      prefix, part = groups.pop("prefix"), groups.pop("part", None)
      parts = re.search(r"\{(\w+(?:\|\w+)+)\}", rule.old)
      found.append((prefix + rule.new.format(**groups), rule,
                    parts[1].split("|").index(part) if part else 0))
  return found


@functools.cache
def _compiled(old: str) -> tuple[re.Pattern, int]:
  """(regular expression of whole names, number of parts) of a rule."""
  parts = re.search(r"\{(\w+(?:\|\w+)+)\}", old)
  text = re.sub(r"(?<!\\)\.(?![*+])", r"\.", old)
  text = text.replace("{i}", r"(?P<i>\d+)").replace("{p}", "(?P<p>weight|bias)")
  if parts:
    text = text.replace(parts[0], f"(?P<part>{parts[1]})")
  return re.compile(rf"(?P<prefix>(?:.+?[./])??){text}"), parts[1].count("|") + 1 if parts else 1
