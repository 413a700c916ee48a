# SPDX-License-Identifier: Apache-2.0
"""Reads the command line and runs the command."""

import argparse
from collections.abc import Sequence

from fxslim.cli.doctor import doctor_report
from fxslim.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fxslim``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fxslim", description="Makes PyTorch models smaller and faster.")
    parser.add_argument("--version", action="version", version=f"fxslim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("doctor", help="versions, devices, and which kernels run native or as reference, and why")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        print(doctor_report())
    return 0
