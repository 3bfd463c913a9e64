"""A script in which one rank is killed: python killed.py RANK STEP SCRIPT ARGUMENTS... under torchrun."""

import os
import runpy
import signal
import sys

import newton_summary as ns

_, victim, last, script, *arguments = sys.argv
taken, step = 0, ns.NewtonSummary.step


def counted(self, closure=None):
    global taken
    taken += 1
    if os.environ["RANK"] == victim and taken == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, closure)


ns.NewtonSummary.step = counted
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
