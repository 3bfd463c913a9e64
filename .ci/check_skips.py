"""Fails when a test was skipped that the list of allowed skips does not name.

usage: check_skips.py ALLOWED REPORT.xml ...

Each line of ALLOWED has a test (file::name, brackets left out; * stands for any letters) and a reason.
"""

import sys
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatchcase
from pathlib import Path


def skipped(report: Path) -> dict[str, str]:
    """The skipped tests of a report, with their reasons."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
            found[name] = skip.get("message", "")
    return found


def main(allowed: Path, *reports: Path) -> int:
    """Prints the skips that are not allowed, and returns 1 where there are any."""
    lines = [line for line in allowed.read_text().splitlines() if line.strip() and not line.startswith("#")]
    patterns = [line.split()[0] for line in lines]
    found = {name: why for report in reports for name, why in skipped(report).items()}
    unexpected = {name: why for name, why in found.items() if not any(fnmatchcase(name, p) for p in patterns)}
    for name, why in unexpected.items():
        print(f"skipped, and not on the list {allowed}: {name} ({why})")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
