"""`python -m bench`: measures the subjects side by side and writes reports/bench.json and bench.md.

Only the command line; its invariant: however it ends, Ctrl-C included, no process it started is left.
"""

import signal
import sys
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report
from bench.figures import DIRECT, rows_of
from bench.measure import MEASURES, Settings, Visit, expected_s, measure
from bench.processes import ROOT, Cores, choose_cores
from bench.subjects import SUBJECTS, Subject, nginx_binary


def chosen(only: str) -> tuple[list[Subject], dict[str, str]]:
    """The subjects that run here, and why others do not. `direct` always runs: it is the floor."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = [subject.name for subject in SUBJECTS]
    if unknown := names - set(known):
        raise click.BadParameter(f"no such subject: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    wanted = [subject for subject in SUBJECTS if not names or subject.name in names | {DIRECT}]
    absent = {subject.name: why for subject in wanted if (why := subject.absent())}
    return [subject for subject in wanted if subject.name not in absent], absent


def _end(number: int, _: FrameType | None) -> None:
    """A termination and the alarm clock end the run the way Ctrl-C does, so that every child is stopped."""
    raise SystemExit("bench: over its time limit" if number == signal.SIGALRM else "bench: terminated")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="One round of short windows: for a look, not for quoting.")
@click.option("--only", default="", help="Subjects, with commas between: naive, nginx, gateway.")
@click.option("--rounds", type=click.IntRange(1, 20), help="How often each subject is visited.")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Length of each measured window.")
@click.option("--requests", type=click.IntRange(0), default=0, help="End a closed-loop window after so many calls.")
@click.option("--connections", type=click.IntRange(1, 1_000), default=32, show_default=True)
@click.option("--docs", is_flag=True, help="Also write the table into docs/benchmarks.md.")
@click.option("--reports", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
def main(
    quick: bool,
    only: str,
    rounds: int | None,
    seconds: float | None,
    requests: int,
    connections: int,
    docs: bool,
    reports: Path,
) -> None:
    """Measure the gateway side by side with the bare upstream, a naive proxy and nginx."""
    console = Console()
    subjects, absent = chosen(only)
    settings = Settings(
        rounds=rounds or (1 if quick else 3),
        window_s=seconds or (0.6 if quick else 2.0),
        warm_s=0.2 if quick else 0.5,
        connections=connections,
        requests=requests,
    )
    cores = choose_cores()
    setting = report.setting(settings, cores.note, absent, nginx_binary())
    for line in setting.lines():
        console.print(f"[dim]{line}[/]", highlight=False)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(int(2 * expected_s(settings, len(subjects))) + 60)
    visits = watched(subjects, settings, cores, console)
    signal.alarm(0)
    found = rows_of(visits)
    console.print(report.table(found, console.width))
    for note in report.notes(found, setting):
        console.print(f"  {note}", highlight=False, markup=False)
    report.write(reports, found, visits, setting)
    if docs:
        report.write_into_page(ROOT / "docs" / "benchmarks.md", found, setting)
    console.print(f"written: {reports / 'bench.json'}, {reports / 'bench.md'}")
    sys.exit(1 if any(row.complaints for row in found) else 0)


def watched(subjects: list[Subject], settings: Settings, cores: Cores, console: Console) -> list[Visit]:
    """The run under a progress bar."""
    columns = (TextColumn("{task.description:<62}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        steps = settings.rounds * len(subjects) * len(MEASURES)
        task = progress.add_task("starting", total=steps)

        def tell(what: str) -> None:
            progress.update(task, description=what, advance=1)

        return measure(subjects, settings, cores, tell)


if __name__ == "__main__":
    main()
