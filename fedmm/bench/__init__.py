"""Benches: `cases(size) -> Iterator[Case]`, one module a subcommand of `fedmm bench`. A bench is no test."""
