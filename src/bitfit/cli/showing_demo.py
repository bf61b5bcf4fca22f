"""Behind ``bitfit demo``: its progress and its tables."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.progress import Progress, TextColumn

from bitfit.cli import console
from bitfit.demo import TASKS, DemoResult, DemoStarted, run_demo, task_file
from bitfit.errors import TrainingInterrupted
from bitfit.training.finetune import Event, RunStarted
from bitfit.training.train import EpochDone, StepDone


class _Progress:
    """One bar for the run at work; without a terminal a line per run."""

    def __init__(self, bar: Progress | None, quiet: bool) -> None:
        self.bar, self.quiet = bar, quiet
        if bar is not None:
            self.row = bar.add_task("loading the base", total=None, dev="")

    def __call__(self, event: DemoStarted | Event) -> None:
        if isinstance(event, DemoStarted):
            how = "a head on the frozen base" if event.method == "frozen" else "biases and a head"
            self.title = f"{event.run}/{event.runs} {event.task}: {how}"
            if self.bar is None and not self.quiet:
                console.note(self.title)
        elif self.bar is not None and isinstance(event, RunStarted):
            self.bar.reset(self.row, total=event.total_steps, description=self.title, dev="")
        elif self.bar is not None and isinstance(event, StepDone):
            self.bar.update(self.row, completed=event.step)
        elif self.bar is not None and isinstance(event, EpochDone):
            scores = ", ".join(f"{k} {v:.3f}" for k, v in list(event.scores.items())[:1])
            self.bar.update(self.row, dev=f"dev {scores}")


def run(folder: Path, *, base: str, quick: bool, quiet: bool) -> DemoResult:
    """Run the demo with its progress on standard error.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM; says what is kept.
    """
    try:
        # Never running: a demo begins again anew, so there is no state to save.
        with (
            console.Interruption(),
            console.bar(quiet, TextColumn("{task.fields[dev]}", markup=False)) as bar,
        ):
            return run_demo(folder, base=base, quick=quick, on_event=_Progress(bar, quiet))
    except KeyboardInterrupt:
        files = [path.name for task in TASKS if (path := task_file(folder, task)).is_file()]
        kept = f"kept in {folder}: {', '.join(files)}" if files else "no task file is there yet"
        raise TrainingInterrupted(
            f"stopped; {kept}. The same command trains all three tasks anew"
        ) from None


def show(result: DemoResult, folder: Path, quick: bool) -> None:
    """Print the two tables, and what to try next."""
    rows = [
        (r["task"], r["classes"], console.number(r["score"], 3), console.number(r["majority"], 3),
         console.number(r["frozen"], 3),
         f"{r['trained']:,} + {r['head']:,}", console.size(r["file_bytes"]),
         f"{r['seconds']:.0f}")
        for r in result.tasks
    ]  # fmt: skip
    columns = ("task", ">classes", ">score", ">majority", ">frozen base", ">trained + head",
               ">file", ">seconds")  # fmt: skip
    metric = result.tasks[0]["metric"]
    title = f"dev {metric} of three tasks on one base"
    if quick:
        title += " (--quick: the scores are meaningless)"
    console.print_table(columns, rows, title=title)
    if quick:
        console.say(
            "one short epoch each and no frozen baseline: it runs, and the scores say no more; "
            "without --quick they mean something"
        )
    console.say(
        "\nNew sentences, each answered by all three tasks in one mixed batch "
        f"({result.answer_seconds * 1000:.0f} ms):"
    )
    answers = [
        (text, *(f"{a.text} {a.confidence:.2f}" for a in found))
        for text, found in zip(result.sentences, result.answers, strict=True)
    ]
    console.print_table(("text", *(a.task for a in result.answers[0])), answers)
    files = shlex.join(str(task_file(folder, row["task"])) for row in result.tasks)
    first = shlex.quote(result.tasks[0]["file"])
    console.say(
        f"\nThe files are in {folder.resolve()}. Took {console.duration(result.seconds)}. Next:"
    )
    console.say(f'  bitfit predict {files} "your own sentence"')
    console.say(f"  bitfit inspect {first} --check")
    console.say("  bitfit train --data your.csv --text COLUMN --label COLUMN")
