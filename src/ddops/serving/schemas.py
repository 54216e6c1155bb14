"""Requests and answers, as OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

LARGEST_SEED = 2**64 - 1


class ImageRequest(BaseModel):
    """Which images are wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"class": 7, "seed": 42, "format": "png"},
                {"class": "3", "seed": 0, "count": 4, "format": "base64"},
                {"prompt": "a bold handwritten seven, slanted left", "seed": 42},
            ]
        },
    )

    class_label: Annotated[
        Annotated[StrictInt, Field(ge=0, lt=1_000_000)]
        | Annotated[StrictStr, Field(min_length=1, max_length=100)]
        | None,
        Field(alias="class", description="A class by its number, or by its name where the model's classes have names"),
    ] = None
    prompt: Annotated[
        StrictStr | None, Field(min_length=1, description="What to draw, of a model that draws for captions")
    ] = None
    seed: Annotated[
        StrictInt | None,
        Field(ge=0, le=LARGEST_SEED, description="The same seed gives the same images; without one it is drawn"),
    ] = None
    count: Annotated[StrictInt, Field(ge=1, le=1024, description="Image i is a function of class, seed and i")] = 1
    format: Annotated[
        Literal["png", "webp", "base64"],
        Field(description="png and webp (lossless): one picture, the images side by side. base64: JSON with PNGs"),
    ] = "png"
    timeout_s: Annotated[
        float | None, Field(gt=0, le=3600, allow_inf_nan=False, description="Give up after so long")
    ] = None


class EncodedImage(BaseModel):
    """One image of an answer in ``base64``."""

    index: int
    media_type: str
    data: str


class ImageResponse(BaseModel):
    """An answer in ``base64``."""

    model: str
    class_number: int | None = None
    prompt: str | None = None
    seed: int
    images: list[EncodedImage]


class Problem(BaseModel):
    """Why a request was not answered with images."""

    error: str
    request_id: str


class Health(BaseModel):
    """State of the server."""

    status: Literal["alive", "ready", "starting", "draining"]
    model: str | None = None
