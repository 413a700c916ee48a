# SPDX-License-Identifier: Apache-2.0
"""What every plan is: a decision about a model of certain shapes, which rewrites it, and which is saved as JSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, given_data
from fxslim.errors import CheckpointError, ConfigError
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.plan.file_writing import write_file

Shapes = Mapping[str, tuple[int, ...]]
# What reading damaged fields may raise.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)


class Plan(ABC):
    """Structure only: shapes of the states that the model has, and in subclasses what becomes of which module."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    # Whether values depend on data that are looked at while the plan is applied.
    reads_data: ClassVar[bool] = False

    shapes: Shapes

    def apply(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        values: bool = True,
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> nn.Module:
        """Rewrite the model in place; returns it. After any error it is as it was.

        ``optimizer``: what trains the model goes on training it. ``values=False`` changes the structure only and leaves
        the values to a state dict. Plans that look at data read ``data`` by ``forward``; by default what they were made
        with.
        """
        if data is not None and not self.reads_data:
            raise ConfigError(f"a {self.kind} plan looks at no data: leave data= out")
        given = given_data(data, forward)
        return all_or_nothing(
            model, lambda changes: self.change_model(model, changes, optimizer, values=values, data=given)
        )

    @abstractmethod
    def change_model(
        self,
        model: nn.Module,
        changes: Changes,
        optimizer: Optimizer | None = None,
        *,
        values: bool = True,
        data: Data | None = None,
    ) -> None:
        """Rewrite the model and note the plan; the caller takes ``changes`` back after an error."""

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, under a temporary name first."""
        text = json.dumps(self.to_dict(), indent=1)
        write_file(path, lambda temporary: temporary.write_text(text))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"kind": self.kind, "version": self.version, "shapes": shapes, **self._to_fields()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The plan that ``to_dict`` wrote."""
        if data.get("kind") != cls.kind or data.get("version") != cls.version:
            raise CheckpointError(
                f"expected a {cls.kind} plan of version {cls.version}, got kind {data.get('kind')!r}, "
                f"version {data.get('version')!r}"
            )
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in data["shapes"].items()}
            return cls._from_fields(data, shapes)
        except _DAMAGE as error:
            raise CheckpointError(f"the plan is damaged: {type(error).__name__}: {error}; save it again") from error

    @abstractmethod
    def _to_fields(self) -> dict[str, Any]:
        """All but the shapes, as plain data."""

    @classmethod
    @abstractmethod
    def _from_fields(cls, data: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self:
        """What ``_to_fields`` wrote; what does not fit may raise anything."""
