"""The command line: `fedmm run`, `fedmm watch`, `fedmm sweep`, `fedmm compare`, `fedmm export`, `fedmm bench`.

fedmm run rounds=2 seed=7 run.dir=DIR       a whole federation in this process (overrides as Hydra knows them)
fedmm watch DIR                             live progress of a run, wherever it runs, from its folder
fedmm sweep DIR arm=fedavg,local seed=0,1   a run for every combination; continues where it was stopped
fedmm compare DIR...                        one table of several runs: mean and 95% interval over their seeds
fedmm export DIR FOLDER                     the tuned model of a run as an ordinary Hugging Face checkpoint
fedmm bench NAME [--size real]              times, bytes and memory, a line of JSON for each figure; toy takes seconds
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import threading
from pathlib import Path

from fedmm.types import FedmmError

BENCHES = ("link", "host", "memory", "aggregate", "rounds", "trust")  # modules of fedmm.bench
AGAINST = "what the others are compared with: an arm's label (default: FedAvg), or a setting such as fault=none"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 asked for something that cannot be."""
    parser = argparse.ArgumentParser(
        prog="fedmm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | watch | sweep | compare | export | bench"
    )
    run = commands.add_parser("run", help="run a federation in this process")
    run.add_argument("overrides", nargs="*", help="as in rounds=2 method=fedprox; see conf/")
    watch = commands.add_parser("watch", help="show the progress of a run")
    watch.add_argument("dir", type=Path)
    watch.add_argument("--pid", type=int, help="end when this process has ended")
    watch.add_argument("--stall", type=float, default=600.0, help="seconds without news after which it gives up")
    sweep = commands.add_parser("sweep", help="run every combination of several values")
    sweep.add_argument("dir", type=Path)
    sweep.add_argument("overrides", nargs="+", help="as in arm=fedavg,feddat seed=0,1,2; a comma separates values")
    sweep.add_argument(
        "--tune", help="a setting to choose for each combination on validation data: optimizer.lr=3e-3,6e-3"
    )
    sweep.add_argument(
        "--tune-across",
        metavar="KEYS",
        help="choose one value for all combinations that differ only in these keys, such as scenario",
    )
    sweep.add_argument(
        "--known",
        type=Path,
        help="a file of records (.jsonl) or a sweep's folder: runs in it are not repeated",
    )
    sweep.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at a time; default: one a core")
    sweep.add_argument("--against", help=AGAINST)
    compare = commands.add_parser("compare", help="one table of several runs")
    compare.add_argument(
        "paths", type=Path, nargs="+", metavar="path", help="a run's or sweep's folder, or a file of records"
    )
    compare.add_argument(
        "--into", type=Path, help="a markdown file for the table; a picture and a file of records are written beside it"
    )
    compare.add_argument("--records", type=Path, help="where the file of records goes; default: beside --into's page")
    compare.add_argument("--against", help=AGAINST)
    export = commands.add_parser("export", help="write the tuned model as a checkpoint")
    export.add_argument("dir", type=Path)
    export.add_argument("folder", type=Path)
    bench = commands.add_parser("bench", help="measure times, bytes and memory")
    bench.add_argument("name", choices=BENCHES)
    bench.add_argument("--size", choices=("toy", "real"), default="toy", help="real: LLaVA-1.5-7B's; takes minutes")
    argv = sys.argv[1:] if argv is None else argv
    args, typed = parser.parse_args(argv), shlex.join(["fedmm", *argv])
    if args.command == "run":
        return _run(args.overrides)
    if args.command == "watch":
        from fedmm.results.progress import watch as show

        if not args.dir.exists() or (args.dir / "runs").is_dir():
            sweeps = f"a sweep; watch one of its runs in {args.dir / 'runs'}"
            what = sweeps if args.dir.exists() else "missing; waiting until a run makes it"
            print(f"{args.dir} is {what}", file=sys.stderr)
        until = (lambda: not _alive(args.pid)) if args.pid else None
        try:
            return show(args.dir, until=until, stall_seconds=args.stall)
        except KeyboardInterrupt:
            return 130
    if args.command == "export":
        return _export(args.dir, args.folder)
    if args.command == "bench":
        return _bench(args.name, args.size)
    if args.command == "sweep":
        return _sweep(args, typed)
    return _compare(args, typed)


def _run(overrides: list[str]) -> int:
    from fedmm.flower import inprocess, server_app
    from fedmm.results.progress import watch

    try:
        arms = server_app.plan(overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(arms[0].folder,), kwargs={"until": ended.is_set})
    watcher.start()
    try:
        inprocess.run(arms)
    except KeyboardInterrupt:
        return 130  # the watcher says how to go on
    except (ValueError, OSError, FedmmError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        ended.set()
        watcher.join()
    return 0


def _sweep(args: argparse.Namespace, typed: str) -> int:
    from fedmm.flower import server_app
    from fedmm.runs import records
    from fedmm.sweep import plan, results, runner

    try:
        made = runner.run(
            args.dir,
            args.overrides,
            plan.search(args.tune, args.tune_across),
            known=records.load([args.known] if args.known else []),
            at_once=args.at_once,
            check=server_app.plan,
            say=lambda text: print(text, flush=True),
            against=args.against,
            command=typed,
        )
        print(results.write(args.dir / runner.PAGE, made, args.against, typed, anew=True).read_text())
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (FedmmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _compare(args: argparse.Namespace, typed: str) -> int:
    from fedmm.results import intervals, table
    from fedmm.runs import records
    from fedmm.sweep import results

    try:
        if args.records and not args.into:
            raise ValueError(f"--records {args.records} needs a page: give --into FILE.md too")
        found = records.load(args.paths)
        rows = intervals.rows(found.runs)
        print(table.markdown(rows, table.columns(args.against, rows)))
        if args.into:
            print(results.write(args.into, found, args.against, typed, records_to=args.records))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (FedmmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _export(run: Path, into: Path) -> int:
    from fedmm.federation.export import export

    try:
        round = export(run, into)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except FedmmError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{into}: the backbone with the adapters of round {round} folded in")
    return 0


def _bench(name: str, size: str) -> int:
    import torch

    torch.set_num_threads(1)  # as in clients and host
    for case in importlib.import_module(f"fedmm.bench.{name}").cases(size):
        print(case.line(), flush=True)
    return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
