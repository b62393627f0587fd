"""What an owner says about a dataset: the card. The data itself is safetensors, one tensor per column, rows first.

Everything on a card is a public declaration to those who may list the dataset. Bounds and the row bound are chosen by
the owner without looking at individual values (DESIGN: "values outside the bounds are clamped; denominators use declared
bounds, never counts").
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .codec import Name, Text, WireModel

MAX_ROWS = 1 << 40
MAX_COLUMNS = 4096
MAX_RECORDS_PER_SUBJECT = 16

ColumnName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_ .()/%+-]{0,62}[A-Za-z0-9_)%])?$")]
"""A column's name: 1 to 64 characters, no control characters, no leading or trailing space."""

DatasetId = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?@[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")
]
"""``name@owner``, the owner being a member id."""


class Column(WireModel):
    """One column: dtype and shape of a row's value, and public bounds that hold for every element of it."""

    name: ColumnName
    dtype: Literal["float32", "float64", "int64", "int32", "uint8"]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...], Field(max_length=4)] = ()
    lower: float
    upper: float
    unit: Annotated[str, StringConstraints(max_length=32)] = ""
    description: Text = ""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError("lower must be less than upper")
        return self


class DatasetCard(WireModel):
    """The declared schema of a dataset version. ``row_bound`` is public and at least the number of rows."""

    KIND: ClassVar[str] = "dataset-card"

    version: Literal[1] = 1
    name: Name
    owner: Name
    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=MAX_COLUMNS)]
    row_bound: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    privacy_unit: Literal["record", "subject"] = "record"
    """Whose presence is protected: each record's, or that of all records of one subject together."""
    subject_column: ColumnName | None = None
    """Names whom a record is about, if the unit is the subject. It is an identifier: no job may use it as a feature."""
    max_records_per_subject: Annotated[int, Field(ge=1, le=MAX_RECORDS_PER_SUBJECT)] | None = None
    """The most records of one subject that any job may use: of more, the first are used."""
    subject_bound: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    """Public, and at least the number of subjects; the row bound if not given."""
    description: Text = ""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if len({column.name for column in self.columns}) != len(self.columns):
            raise ValueError("column names must be unique")
        return self

    @model_validator(mode="after")
    def _the_subject_is_declared_whole(self) -> Self:
        given = self.subject_column is not None, self.max_records_per_subject is not None
        if given != (self.privacy_unit == "subject",) * 2:
            raise ValueError("subject_column and max_records_per_subject belong to the privacy unit subject, both")
        if self.subject_bound is not None and (self.privacy_unit != "subject" or self.subject_bound > self.row_bound):
            raise ValueError("subject_bound belongs to the privacy unit subject, and is at most row_bound")
        if self.subject_column is None:
            return self
        column = self.column(self.subject_column)
        if column is None or column.shape or column.dtype not in ("int64", "int32", "uint8"):
            raise ValueError("subject_column must be one of the columns: one whole number a row")
        return self

    @property
    def id(self) -> str:
        """``name@owner``."""
        return f"{self.name}@{self.owner}"

    def column(self, name: str) -> Column | None:
        """The column of that name, or ``None``."""
        return next((column for column in self.columns if column.name == name), None)
