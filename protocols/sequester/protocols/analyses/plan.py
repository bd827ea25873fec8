"""What every analysis plan says; each analysis file adds its own fields."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, StringConstraints

from sequester.protocols.decimals import exact_decimal, one_spelling

# A number that matters: exact in the signed bytes, one spelling only.
Number = Annotated[Decimal, BeforeValidator(exact_decimal), PlainSerializer(one_spelling, return_type=str)]


class AnalysisPlan(BaseModel):
    """`budget` is the share of the study's RDP cap this analysis may spend (private mode; shares add up to at most 1).

    `noise_multiplier` is filled in when the study is signed: calibrated by the filter that must admit it
    (spec/privacy.md, 2.2). It is None in exact mode, where nothing is noised.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    mode: Literal["private", "exact"] = "private"
    budget: Number | None = None
    noise_multiplier: Number | None = None
