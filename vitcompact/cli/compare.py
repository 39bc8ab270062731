"""vitcompact compare: training runs side by side."""
import click


@click.command()
@click.argument("workdirs", nargs=-1, required=True)
@click.option("--out", required=True, help="File of the picture, such as curves.png.")
@click.option("--metric", "metrics", multiple=True,
              help="Repeatable.  [default: all that were logged more than once]")
def compare(workdirs, out, metrics):
  """Plot runs side by side, and print the final metrics of each.

  Reads metrics.jsonl in each of WORKDIRS. The picture has a panel for each metric, over steps.
  Needs matplotlib.
  """
  from vitcompact import compare

  runs = {workdir: compare.read(workdir) for workdir in workdirs}
  compare.plot(runs, compare.panels(runs, metrics), out)
  click.echo(compare.table(runs))
  click.echo(f"wrote {out}")
