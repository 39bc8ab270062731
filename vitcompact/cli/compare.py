"""vitcompact compare: training runs side by side."""
import click


@click.command()
@click.argument("workdirs", nargs=-1, required=True)
@click.option("--out", required=True, help="Of the picture, such as curves.png.")
@click.option("--metric", "metrics", multiple=True,
              help="May be repeated.  [default: all that were logged more than once]")
def compare(workdirs, out, metrics):
  """Plot runs side by side, and print what each ended with.

  Reads the metrics.jsonl of each of WORKDIRS. The picture has a panel for each metric, over steps.
  Needs matplotlib.
  """
  from vitcompact import compare

  runs = {workdir: compare.read(workdir) for workdir in workdirs}
  compare.plot(runs, compare.panels(runs, metrics), out)
  click.echo(compare.table(runs))
  click.echo(f"wrote {out}")
