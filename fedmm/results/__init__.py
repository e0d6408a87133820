"""What is shown of runs: statistics, tables, pictures, the report, live progress."""
