"""Finds the classes that a model is built from by the type in its config; they are imported when they are used."""

from collections.abc import Mapping
from typing import Any

from llava.errors import CheckpointError
from llava.systems import registry
from llava.systems.base import resolve


def component_class(kind: str, known: Mapping[str, str], name: str) -> Any:
    """Returns the class of a type.

    Args:
        kind: What it is, for messages.
        known: Reference ``module:Class`` of each type that belongs to no system.
        name: The type; one that only a system has is written ``<system>:<type>``.

    Raises:
        CheckpointError: The type is unknown.
    """
    if name in known:
        return resolve(known[name])
    system, colon, own = name.partition(":")
    if colon and system in registry.specs():
        components = registry.spec(system).components
        if own in components:
            return resolve(components[own])
    raise CheckpointError(f"unknown {kind} type {name!r}; known: {', '.join(sorted(known)) or 'those of a system'}")
