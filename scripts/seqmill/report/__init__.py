"""report.html: a run at a glance."""
