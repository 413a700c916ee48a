# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention, recorded as one operator: heads go or get narrower, with as many channels of its input."""

from typing import Any

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels, along, fixed
from fxslim.graph.propagation import Propagation, results_without_channels, rule
from fxslim.graph.rules.sizes import LITERAL, follow_count, size_kind
from fxslim.graph.size_checks import SizeCheck
from fxslim.graph.slots import LayerCall
from fxslim.graph.tagged_sizes import Attribute

PARAMETERS = """
query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight
q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal
""".split()


@rule("multi_head_attention_forward")
def attend(propagation: Propagation, node: fx.Node) -> Labels | list[Labels]:
    """The width of the heads together is that of the query, so both shrink by whole heads, or all heads alike."""
    given: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    streams = [_stream(propagation, given[name]) for name in ("query", "key", "value")]
    names = {name: propagation.state_name(given.get(name)) for name in PARAMETERS if "proj" in name or "bias" in name}
    heads = node.meta["call"].sizes[1]
    out_weight = names["out_proj_weight"]
    if any(x is None or any(d != len(x.shape) - 1 for d in x.varying) for x in streams) or out_weight is None:
        return propagation.freeze_inputs(node, "attention over another dim than its last")
    if size_kind(propagation, heads) == LITERAL:
        return propagation.freeze_inputs(node, "attention with a number of heads that is written down")
    lines = [x.vector(len(x.shape) - 1) for x in streams if x is not None]
    rows = _projections(propagation, names, lines, int(heads))
    if rows is None:
        return propagation.freeze_inputs(node, "attention with computed projections")
    for name, line in (("bias_k", rows[1]), ("bias_v", rows[2])):
        if (state := names[name]) is not None:
            propagation.slot(state, 2, line)
    propagation.slot(out_weight, 1, rows[2], role="consumer")
    out = propagation.slot(out_weight, 0, role="producer").ids
    if (bias := names["out_proj_bias"]) is not None:
        propagation.slot(bias, 0, out)
    _sizes(propagation, node, lines, rows[0], int(heads))
    _count(propagation, node, names, streams, out_weight)
    results = results_without_channels(node)
    assert isinstance(results, list)
    shape = streams[0].shape if streams[0] is not None else ()
    return [along(shape, len(shape) - 1, out), *(fixed(r.shape) for r in results[1:])]


def _stream(propagation: Propagation, value: object) -> Labels | None:
    """Labels of an input; the entries of a parameter, such as learned queries, are channels along the last dim."""
    x = propagation.labels(value)
    return None if x is None else propagation.tied_along(x, len(x.shape) - 1)


def _projections(
    propagation: Propagation, names: dict[str, str | None], lines: list[Ids], heads: int
) -> list[Ids] | None:
    """Labels of the rows of the three projections.

    Where whole heads go, one for all entries of a head, the same in all three. Else entry i of a head's queries goes
    with that of its keys, and each head loses equally many, of queries and of values.
    """
    packed = names["in_proj_weight"]
    if packed is not None:
        for line in lines:
            propagation.slot(packed, 1, line, role="consumer")
        rows = list(propagation.slot(packed, 0, role="producer").ids.reshape(3, -1))
    else:
        rows = []
        for name, line in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), lines, strict=True):
            weight = names[name]
            if weight is None:
                return None
            propagation.slot(weight, 1, line, role="consumer")
            rows.append(propagation.slot(weight, 0, role="producer").ids)
    if (bias := names["in_proj_bias"]) is not None:
        propagation.slot(bias, 0, np.concatenate(rows))
    if propagation.decisions.heads == "dim":
        propagation.space.unify(rows[0], rows[1])
        propagation.space.balance(np.concatenate([row.reshape(heads, -1) for row in rows[::2]]), "width of the heads")
        _keep_scale(propagation, names, rows[0])
        return rows
    whole = np.repeat(rows[0].reshape(heads, -1)[:, 0], rows[0].size // heads)
    for row in rows:
        propagation.space.unify(whole, row)
    return [whole] * 3


def _keep_scale(propagation: Propagation, names: dict[str, str | None], row: Ids) -> None:
    """Scores are divided by the square root of the width of a head: queries make up for it."""
    for name in (names["in_proj_weight"] or names["q_proj_weight"], names["in_proj_bias"]):
        if name is not None:
            propagation.root_scaled[name] = row


def _sizes(propagation: Propagation, node: fx.Node, lines: list[Ids], row: Ids, heads: int) -> None:
    """The query's width is that of all heads; the module's attributes follow."""
    module = node.meta["module"]
    if lines[0].any():
        propagation.space.balance(np.stack([lines[0], row]), f"width of the heads of {module}")
    else:
        propagation.freeze(Labels(shape=(), ids=row), node, "attention to inputs that are no channels")
    follow_count(propagation, node, node.meta["call"].sizes[0], row)
    given = node.meta["call"].sizes[1]
    if propagation.decisions.heads == "whole":
        follow_count(propagation, node, given, row, parts=row.size // heads)
    else:
        follow_count(propagation, node, given, row[:0], static=heads)
        if hasattr(propagation.modules.get(module), "head_dim"):
            width = Attribute(module=module, name="head_dim")
            propagation.checks.append(SizeCheck(node=node, expression=width, ids=row, parts=heads))
    for name, line in (("kdim", lines[1]), ("vdim", lines[2])):
        if hasattr(propagation.modules.get(module), name):
            expression = Attribute(module=module, name=name)
            propagation.checks.append(SizeCheck(node=node, expression=expression, ids=line))


def _count(
    propagation: Propagation,
    node: fx.Node,
    names: dict[str, str | None],
    streams: list[Labels | None],
    out_weight: str,
) -> None:
    """Projections and both products."""
    query, key, value = (x.shape for x in streams if x is not None)
    width, batch = query[-1], query[1] if len(query) == 3 else 1
    queries, keys = query[0], key[0]
    first = names["in_proj_weight"] or names["q_proj_weight"] or out_weight
    projections = (queries * query[-1] + keys * key[-1] + keys * value[-1]) * width
    call = node.meta["module"]
    propagation.batch = propagation.batch or batch
    scale = batch / propagation.batch
    propagation.calls += [
        LayerCall(name=call, macs=int(projections * scale), factors=((first, 0), (first, 1))),
        LayerCall(name=call, macs=int(2 * queries * keys * width * scale), factors=((out_weight, 1),)),
        LayerCall(name=call, macs=int(queries * width * width * scale), factors=((out_weight, 0), (out_weight, 1))),
    ]
