"""Ten central lines, each broken in a copy of this checkout, to see that the unit tier notices.

    python tests/mutations.py [NAME...]     about a minute for each; one line of output for each, and 1 where one lives

test_mutations.py runs it in the nightly tier, and says in the unit tier when a line is no longer there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("fedmm", "conf", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """A regular expression that fits one place of the package, what takes its place, and who should notice."""

    name: str
    pattern: str
    broken: str
    tests: str  # a file or folder below tests/


MUTATIONS = (
    Mutation(
        "the mean's weights",
        r'return float\(update\.num_examples\) if weights == "examples" else 1\.0',
        "return 1.0",
        "aggregate/test_rules.py",
    ),
    Mutation(
        "the Fisher's square",
        r"\(grad\.T @ x\)\.pow\(2\)",
        "(grad.T @ x).abs()",
        "methods/test_methods.py",
    ),
    Mutation(
        "KL's direction",
        r"F\.kl_div\(student_NV, teacher_NV,",
        "F.kl_div(teacher_NV, student_NV,",
        "methods/test_feddat.py",
    ),
    Mutation(
        "the frozen copy on arrival",
        r"for name in cfg\.method\.sets:\n(?=\s+whose = )",
        'for name in (name for name in cfg.method.sets if name != "frozen"):\n',
        "federation/test_client.py",
    ),
    Mutation(
        "the journal's order",
        r'return sorted\((?=\s*int\(path\.stem\.removeprefix\("client_"\)\))',
        "return (lambda clients: sorted(clients, reverse=True))(",
        "runs/test_folder.py",
    ),
    Mutation(
        "the resume's round",
        r"round, path = checkpoints\[-1\]",
        "round, path = checkpoints[0]",
        "runs/test_folder.py",
    ),
    Mutation(
        "the codec's scale",
        r"scales = \(peaks / 127\)\.bfloat16\(\)",
        "scales = (peaks / 64).bfloat16()",
        "test_codecs.py",
    ),
    Mutation(
        "the token's comparison",
        r"if not wanted or not hmac\.compare_digest\(",
        "if not wanted or False and not hmac.compare_digest(",
        "link/test_link.py",
    ),
    Mutation(
        "the ledger's direction",
        r"traffic\.up_bytes \+= frame\.wire_bytes",
        "traffic.down_bytes += frame.wire_bytes",
        "link/test_link.py",
    ),
    Mutation(
        "the schema's filter",
        r'return \[name for name in names if fits\(f"shared\.\{name\}", patterns\)\]',
        "return list(names)",
        "adapters/test_schema.py",
    ),
)


def places(mutation: Mutation, package: Path) -> list[tuple[Path, int]]:
    """Where the pattern fits: a file, and how often in it."""
    counts = ((path, len(re.findall(mutation.pattern, path.read_text()))) for path in sorted(package.rglob("*.py")))
    return [(path, count) for path, count in counts if count]


def copy(folder: Path) -> None:
    """This checkout without what git ignores and what no test of the unit tier reads."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def break_line(mutation: Mutation, folder: Path) -> None:
    """Put the broken line into a copy. Raises ValueError where the pattern does not fit exactly one place."""
    fits = places(mutation, folder / "fedmm")
    if [count for _, count in fits] != [1]:
        shown = ", ".join(f"{path.relative_to(folder)} ({count})" for path, count in fits) or "no place"
        raise ValueError(f"{mutation.name}: its pattern must fit one place and fits {shown}; correct mutations.py")
    ((path, _),) = fits
    path.write_text(re.sub(mutation.pattern, lambda _: mutation.broken, path.read_text()))


def failures(folder: Path, tests: Sequence[str]) -> list[str]:
    """The first test of the unit tier that fails in a copy. Raises RuntimeError where pytest could not run them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in tests)], cwd=folder, capture_output=True, text=True, check=False
    )  # python -m puts the copy first on the path
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


def caught(mutation: Mutation, folder: Path) -> list[str]:
    """Break one line in a copy at `folder`; the test that notices, or nothing."""
    copy(folder)
    break_line(mutation, folder)
    return failures(folder, [mutation.tests])


def main(names: Sequence[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    alive = 0
    for line in lines(chosen):
        print(line, flush=True)
        alive += "NOT CAUGHT" in line
    return int(bool(alive))


def lines(mutations: Sequence[Mutation]) -> Iterator[str]:
    for mutation in mutations:
        with tempfile.TemporaryDirectory() as folder:
            yield f"{mutation.name}: {', '.join(caught(mutation, Path(folder))) or 'NOT CAUGHT'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
