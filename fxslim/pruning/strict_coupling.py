# SPDX-License-Identifier: Apache-2.0
"""``strict=True``: only channels that one layer reads, from layers connected with it directly."""

from fxslim.errors import PlanError
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import ChannelGroup


def indirect_groups(graph: ChannelGraph) -> list[ChannelGroup]:
    """Groups whose channels more than one layer reads."""
    return [group for group in graph.groups if len(group.layers("consumer")) > 1]


def refuse_indirect(group: ChannelGroup) -> None:
    """Raise, naming the target, those that would lose filters, and the layer that this would touch besides."""
    *others, target = group.layers("consumer")
    makers = " and ".join(group.layers("producer"))
    raise PlanError(
        f"strict: the channels that {target} reads are made by {makers}, and {' and '.join(others)} "
        f"read{'s' * (len(others) == 1)} them too, which would change with {target}: "
        f"leave {target} out, or allow it with strict=False"
    )
