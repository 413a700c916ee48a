# SPDX-License-Identifier: Apache-2.0
"""The front as a page: a table for each network, who beats whom, and the best file within one point."""

import textwrap

from benchmarks.front.latencies import SIZES
from benchmarks.front.places import NETS
from benchmarks.front.standings import AXES, ONE_POINT, Standing, best_within, front, made, reference, verdict
from benchmarks.tasks.contest import RECIPES

HEAD = (
    "| | | by | each training | mean | - float | ms, 1 image | faster | ms, 16 | faster | kB | smaller | front |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)
LETTERS = {"batch 1": "1", "batch 16": "16", "size": "kB"}


def section(net: str, standings: list[Standing]) -> list[str]:
    """One network: its table, the best files within one point, its peers one by one."""
    whole = reference(standings)
    epochs = RECIPES[NETS[net]].epochs
    text = f"""Trained for {epochs:g} epochs. Differences are from "{whole.name}", the better of the two. In the
    last column: where no other row is as accurate and as fast for one image (1), for sixteen (16), or as small (kB)."""
    return [
        f"## {net}", "", *_wrapped(text), "", *HEAD, *(_line(one, standings) for one in standings), "",
        *_sentences(net, standings), "", *_peers(standings), "",
    ]  # fmt: skip


def best_sentence(net: str, standings: list[Standing]) -> str:
    """The fastest file within one point of float."""
    best, whole = best_within(standings, ONE_POINT, AXES["batch 1"]), reference(standings)
    return (
        f"**{net}, within {ONE_POINT:g} point of float: {best.name}**, {best.accuracy:.2f} % "
        f"({best.beside(whole)}), **{best.faster(0):.1f} times as fast** as the float file for one image, "
        f"{best.faster(1):.1f} times for sixteen, {_smaller(best, standings):.1f} times smaller."
    )


def _sentences(net: str, standings: list[Standing]) -> list[str]:
    best = {axis: best_within(standings, ONE_POINT, measure) for axis, measure in AXES.items()}
    others = [f"for {axis}: {one.name} ({one.accuracy:.2f} %)" for axis, one in best.items() if axis != "batch 1"]
    return [*_wrapped(best_sentence(net, standings)), "", f"By the other measures, {'; '.join(others)}."]


def _line(one: Standing, standings: list[Standing]) -> str:
    if one.error:
        return f"| {one.number} | {one.name} | {one.by} | failed: {one.error[:160]} " + "| " * 9 + "|"
    whole = reference(standings)
    cells = [str(one.number), one.name, one.by, " ".join(f"{value:.2f}" for value in one.accuracies)]
    cells += [f"{one.accuracy:.2f}", "" if one is whole else str(one.beside(whole))]
    for size in range(len(SIZES)):
        cells += [f"{one.milliseconds(size):.3f}", f"{one.faster(size):.2f}"]
    cells += [f"{one.bytes / 1000:.0f}", f"{_smaller(one, standings):.1f}"]
    where = [LETTERS[axis] for axis, measure in AXES.items() if one in front(standings, measure)]
    return "| " + " | ".join([*cells, " ".join(where)]) + " |"


def _smaller(one: Standing, standings: list[Standing]) -> float:
    return made(standings)[0].bytes / one.bytes


def _peers(standings: list[Standing]) -> list[str]:
    """Beside each row of another tool: our most accurate file that is no slower, or no larger."""
    lines = ["| of others | " + " | ".join(f"fxslim's, {axis}" for axis in AXES) + " |", "|---" * (1 + len(AXES)) + "|"]
    for peer in made(standings):
        if peer.by != "fxslim":
            cells = [verdict(peer, standings, measure) for measure in AXES.values()]
            lines.append("| " + " | ".join([peer.name, *cells]) + " |")
    return lines


def not_dominated(nets: dict[str, list[Standing]]) -> list[str]:
    """Where a peer's file is better, for the summary."""
    found = []
    for net, standings in nets.items():
        for peer in made(standings):
            for axis, measure in AXES.items() if peer.by != "fxslim" else ():
                said = verdict(peer, standings, measure)
                if "**" in said:
                    found.append(f"- {net}, {peer.name}, {axis}: {said.replace('**', '')}.")
    return found


def summary(nets: dict[str, list[Standing]]) -> list[str]:
    lines = [line for net, standings in nets.items() for line in [*_wrapped(best_sentence(net, standings)), ""]]
    behind = not_dominated(nets)
    if not behind:
        return [*lines, "No file of another tool is better than fxslim's that is as fast, or as small.", ""]
    return [
        *lines,
        "Where a file of another tool is better than fxslim's that is as fast, or as small:",
        "",
        *behind,
        "",
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 118, break_on_hyphens=False)
