"""The report of an experiment: statistics, tables, figures and pages, made from its records.

:func:`bitfit.experiments.report.write.write_report` is the way in.
"""
