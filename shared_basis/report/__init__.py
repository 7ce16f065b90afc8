"""HTML reports: a run's results and errors with plots, and comparisons of several runs."""
