"""All tables of a report, in the order in which they are shown."""

from __future__ import annotations

from bitfit.experiments.report.biases import bias_change_table, theory_table
from bitfit.experiments.report.course import (
    convergence_table,
    cost_table,
    gap_table,
    stability_table,
)
from bitfit.experiments.report.curves import crossing_table, curve_table
from bitfit.experiments.report.differences import Draws, detail_table, difference_table
from bitfit.experiments.report.listing import failure_table, run_table
from bitfit.experiments.report.scores import best_table, mean_table, rate_table
from bitfit.experiments.report.table import Table


def all_tables(draws: Draws) -> list[Table]:
    """Return every table that the records have something for."""
    results = draws.results
    made = (
        best_table(results),
        mean_table(results, "paper"),
        mean_table(results, "split"),
        difference_table(draws, "paper"),
        difference_table(draws, "split"),
        theory_table(draws),
        rate_table(results),
        curve_table(results),
        crossing_table(results),
        gap_table(results),
        convergence_table(results),
        stability_table(results),
        cost_table(results),
        bias_change_table(results),
        detail_table(draws),
        failure_table(results),
        run_table(results),
    )
    return [table for table in made if table]
