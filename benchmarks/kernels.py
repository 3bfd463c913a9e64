"""The tests of numbers under other kernels than those that this processor and torch would choose.

Run ``python benchmarks/kernels.py [VARIANT …]``, or ``make test-kernels`` for all.  Every variant is a run of pytest in
a process of its own, with environment variables that choose kernels.  It prints a line for each, and updates
results/kernels.json and results/kernels.md.  What the processor does not have is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"

VARIANTS = {
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
NEEDS = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}

FILES = """
advice attributes batches cadence clipping directions directions_of_several elementwise forward invariance layers
loops losses_with_derivatives lowering memory monitor monitor_cadence nested optim_parts optimizer partition programs
rate_adaptation rehearsed_advice reports rules sampling second_derivatives slices soap solve_bounded solve_cubic
solve_line_search solve_newton solve_shrinkage suggestion summarize summary summary_average testing together
torch_derivatives unusual untouched zoo
""".split()  # noqa: SIM905


def run(variant: str) -> dict[str, Any]:
    """One run of the tests: their numbers by outcome, and the names of those that failed."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **VARIANTS[variant]}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "torch": torch.__version__,
        "processor": processor(),
    }


def processor() -> str:
    """Its name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(found: dict[str, Any]) -> None:
    """The table of every variant's last run."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# The tests of numbers under other kernels",
        "",
        "`python benchmarks/kernels.py`: the last run of every variant.  One thread where nothing else is said.",
        "",
        "| variant | environment | processor | torch | passed | skipped | failed | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, row in found.items():
        environment = " ".join(f"{key}={value}" for key, value in VARIANTS[variant].items())
        columns = [row["processor"], row["torch"], row["passed"], row["skipped"], len(row["failed"]), row["minutes"]]
        lines.append(f"| {variant} | `{environment}` | " + " | ".join(map(str, columns)) + " |")
    failures = [f"- {variant}: `{name}`" for variant, row in found.items() for name in row["failed"]]
    missing = [variant for variant in VARIANTS if variant not in found]
    lines += ["", *(failures or ["No test failed."])]
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    (RESULTS / "kernels.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; default: all")
    chosen = parser.parse_args().variants or list(VARIANTS)
    unknown = [variant for variant in chosen if variant not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    path = RESULTS / "kernels.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for variant in chosen:
        if variant in NEEDS and not NEEDS[variant]():
            print(f"{variant}: this processor has no such kernels", flush=True)
            continue
        found[variant] = run(variant)
        print(f"{variant}: {found[variant]['passed']} passed, failed: {found[variant]['failed'] or 'none'}", flush=True)
        write({name: found[name] for name in VARIANTS if name in found})
    sys.exit(any(found[variant]["failed"] for variant in chosen if variant in found))


if __name__ == "__main__":
    main()
