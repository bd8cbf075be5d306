"""How a train state of checkpoint format 2 becomes one of format 3.

In format 2 a tree of parameters is {encoder, decoder, head}, where the head is the discrimination's, and the sampling
EMA has a head too. In format 3 it is {network: {encoder, decoder}, discrimination: head}, and the EMA is of the network
alone. Optimiser state is laid out like parameters in both.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax

FORMAT_VERSION = 3
READABLE = (2, 3)


def as_format_2(state: Mapping[str, Any], ema_head: Any) -> dict[str, Any]:
    """A state of format 3, or its item `ema` alone, in format 2. ema_head: the EMA's head; empty if there is none."""

    def is_params(tree: Any) -> bool:
        return isinstance(tree, Mapping) and "network" in tree

    def flat(tree: Any) -> Any:
        if not is_params(tree):
            return tree
        head = {"head": tree["discrimination"]} if "discrimination" in tree else {}
        return {**tree["network"], **head}

    old = {key: jax.tree.map(flat, tree, is_leaf=is_params) for key, tree in state.items()}
    head = {"head": ema_head} if ema_head else {}
    old["ema"] = {name: {**network, **head} for name, network in state["ema"].items()}
    if _head_alone(state):
        # In format 2 this teacher was the EMA, with its head, and had no place of its own.
        own = {key: tree for key, tree in state["aux"]["discrimination"].items() if key != "teacher"}
        old["aux"] = {**state["aux"], "discrimination": own}
    return old


def from_format_2(old: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `as_format_2`. abstract: the state of format 3 to return, as shapes."""

    def is_params(tree: Any) -> bool:
        return isinstance(tree, Mapping) and {"encoder", "decoder"} <= tree.keys()

    def nested(tree: Any) -> Any:
        if not is_params(tree):
            return tree
        own = {"discrimination": tree["head"]} if "head" in tree else {}
        return {"network": {name: tree[name] for name in ("encoder", "decoder")}, **own}

    state = {key: jax.tree.map(nested, tree, is_leaf=is_params) for key, tree in old.items() if key != "ema"}
    state["ema"] = {name: nested(tree)["network"] for name, tree in old["ema"].items()}
    if _head_alone(abstract):
        own = {**state["aux"]["discrimination"], "teacher": {"head": old["ema"]["default"]["head"]}}
        state["aux"] = {**state["aux"], "discrimination": own}
    return state


def path_from_format_2(path: str) -> str:
    """The path in format 3 of a leaf of format 2. The EMA's head has none there, and keeps its path."""
    if path.startswith(("ema/", "aux/")):
        return path
    path = re.sub(r"(^|/)(encoder|decoder)/", r"\1network/\2/", path, count=1)
    return re.sub(r"(^|/)head/", r"\1discrimination/", path, count=1)


def _head_alone(state: Mapping[str, Any]) -> bool:
    """Whether the discrimination's teacher keeps only a head, because its encoder is the EMA's."""
    teacher = state.get("aux", {}).get("discrimination", {}).get("teacher")
    return teacher is not None and "encoder" not in teacher
