"""``python -m bitfit``: the command line."""

from bitfit.cli import main

raise SystemExit(main())
