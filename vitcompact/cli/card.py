"""vitcompact card: a page on what a model is, what it costs and who published it."""
import pathlib
import sys

import click


def card_text(name: str, plan: str | None, receipt: str | None) -> str:
  """The card of a named model, or of a file, folder or repository that vitcompact wrote."""
  import vitcompact as vc
  from vitcompact import hub
  from vitcompact.cli import weights
  from vitcompact.cli.count import default_plan
  from vitcompact.hub import card

  if not hub.is_model_name(name):
    if plan is not None:
      raise ValueError(f"{name} has its own plan; leave --plan out")
    return card.file_card(weights.file_of(name), name, receipt)
  if plan is not None:
    return card.model_card(name, vc.Plan.parse(plan), receipt=receipt)
  plan, why = default_plan(name)
  note = why and (f"The default plan, hMHSA and cFFN, is refused for this network ({why}); this is "
                  "cFFN without hMHSA.")
  return card.model_card(name, plan, receipt=receipt, note=note)


def write(path: pathlib.Path, text: str, force: bool):
  if path.exists() and not force:
    raise ValueError(f"{path} exists; give another name or --force")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


@click.command()
@click.argument("name", required=False, metavar="NAME|FILE")
@click.option("--all", "everything", is_flag=True,
              help="Write a card for every named model; needs --out FOLDER.")
@click.option("--plan", help="JSON, or a path to it (*.json); '' is dense.  [default: hMHSA and "
              "cFFN]")
@click.option("--receipt", metavar="PATH", help="receipt.json of the run that made the model, or "
              "its folder; the card takes the accuracy from it.  [default: NAME.json or "
              "receipt.json in the folder of FILE]")
@click.option("--out", metavar="PATH", help="A file, or with --all a folder.  [default: print]")
@click.option("--force", is_flag=True, help="Overwrite.")
def card(name, everything, plan, receipt, out, force):
  """Write a model card: cost, source, and accuracy if measured.

  \b
  vitcompact card deit_small_patch16_224
  vitcompact card pvt_v2_b2 --plan plan.json --out card.md
  vitcompact card small/deploy.safetensors --receipt small
  vitcompact card --all --out cards

  NAME is one of `vitcompact models`, with or without a tag; the card is of its deployed form. FILE
  is a file, folder or hf-hub:org/name that vitcompact wrote, which has its own plan. The model is
  not run: counts come from the traced program. `vitcompact push` writes the same card.
  """
  import vitcompact as vc

  if everything == (name is not None):
    raise ValueError("give one NAME or FILE, or --all" + " and no name" * everything)
  if not everything:
    text = card_text(name, plan, receipt)
    if out is None:
      click.echo(text, nl=False)
    else:
      write(pathlib.Path(out), text, force)
      click.echo(out)
    return
  if out is None or receipt is not None:
    raise ValueError("--all needs --out FOLDER" if out is None else
                     "--receipt is for one model; leave it or --all out")
  paths = {known: pathlib.Path(out) / f"{known}.md" for known in vc.list_models()}
  if (existing := [path for path in paths.values() if path.exists()]) and not force:
    raise ValueError(f"{existing[0]} exists; give another folder or --force")
  with click.progressbar(paths.items(), label="cards", file=sys.stderr,
                         item_show_func=lambda item: item and item[0]) as items:
    for known, path in items:
      write(path, card_text(known, plan, None), force)
  click.echo(f"{out}: {len(paths)} cards")
