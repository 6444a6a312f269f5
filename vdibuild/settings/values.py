"""The kinds of values that settings have."""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def _mebibytes(value: object) -> object:
    """A size such as 8GiB, 512M or 1.5 TiB, in MiB; a bare number is refused: of what?"""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"give a unit with the size: {value}MiB or {value}GiB")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is no size; write it like 8GiB or 512MiB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size != int(size) or size < 1:
        raise ValueError(f"{value!r} is not a whole number of MiB")
    return int(size)


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError(f"{value!r} is no name: lower-case letters, digits, dots, dashes, at most 63")
    return value


def _bundle_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError(f"{value!r} is no name of a bundle: letters, digits, dots, dashes, at most 63")
    return value


def _mac(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise ValueError(f"{value!r} is no MAC address; write it like 52:54:c0:a8:7a:04")
    if int(value[:2], 16) & 1:
        raise ValueError(f"{value!r} is a multicast address: the first byte of a machine's own is even")
    return value.lower()


def domain_name(value: str) -> str:
    """The name of a domain, or of a host in one. Raises ValueError when it is none."""
    if not re.fullmatch(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*", value):
        raise ValueError(f"{value!r} is no domain: lower-case letters, digits, dashes and dots")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("is no SHA-256: 64 hexadecimal digits, as sha256sum prints them")
    return value.lower()


def _time(value: object) -> object:
    """A time of the day; YAML reads 08:00 without quotes as a number, which is nobody's meaning."""
    if not isinstance(value, str) or not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
        raise ValueError(f'{value!r} is no time of the day; write it like "08:00", with the quotes')
    return time.fromisoformat(value)


Size = Annotated[int, BeforeValidator(_mebibytes, json_schema_input_type=str)]
Name = Annotated[str, AfterValidator(_name)]
BundleName = Annotated[str, AfterValidator(_bundle_name)]
Mac = Annotated[str, AfterValidator(_mac)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Domain = Annotated[str, AfterValidator(domain_name)]
TimeOfDay = Annotated[time, BeforeValidator(_time)]
Port = Annotated[int, Field(ge=1, le=65535)]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")]


class Settings(BaseModel):
    """Settings that belong together; a key that is unknown here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
