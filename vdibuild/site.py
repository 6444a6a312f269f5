"""The site file `vdibuild.yaml`: read, checked, and told by its lines what is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from vdibuild.errors import InputError, VdibuildError
from vdibuild.settings import windows
from vdibuild.settings.hypervisor import Hypervisor
from vdibuild.settings.images import Image, System
from vdibuild.settings.keys import Keys
from vdibuild.settings.live_systems import INSTALLER, KIOSK, Installer, Kiosk
from vdibuild.settings.machines import Machine, MachineNetwork
from vdibuild.settings.pools import Pool
from vdibuild.settings.values import Name, Settings

DEFAULT_NAME = "vdibuild.yaml"

_Any = TypeVar("_Any", bound=BaseModel)


class Site(Settings):
    """A site: its images, and where things live."""

    images: dict[Name, Image] = Field(min_length=1)
    """The golden images, by name."""
    installer: Installer = Field(default_factory=Installer)
    """The installer ISO."""
    kiosk: Kiosk = Field(default_factory=Kiosk)
    """The ISO of stations."""
    pools: dict[Name, Pool] = Field(default_factory=dict)
    """The pools of one-time machines, by name."""
    networks: dict[Name, MachineNetwork] = Field(default_factory=lambda: {"default": MachineNetwork()})
    """The networks that machines are on, by name."""
    machines: dict[Name, Machine] = Field(default_factory=dict)
    """Machines that `provision` makes, by name."""
    bundles: str | None = None
    """The repository of bundles: a directory, relative to the site file, or an http or https URL."""
    hypervisor: Hypervisor = Field(default_factory=Hypervisor)
    """What hypervisor.setup makes of this host."""
    artifacts: Path = Path("artifacts")
    """Where what was built is kept; relative to the site file."""
    cache: Path | None = None
    """Where downloads and finished steps are kept; by default in the artifacts directory."""
    libvirt: str = "qemu:///system"
    """The libvirt connection."""
    keys: Keys = Field(default_factory=Keys)
    """Signing keys."""

    @field_validator("images")
    @classmethod
    def _no_live_system(cls, images: dict[str, Image]) -> dict[str, Image]:
        for taken in (INSTALLER, KIOSK):
            if taken in images:
                raise ValueError(f"no image can be called {taken}, as the {taken} is")
        return images

    @field_validator("pools")
    @classmethod
    def _of_images(cls, pools: dict[str, Pool], others: ValidationInfo) -> dict[str, Pool]:
        images = others.data.get("images", {})
        for name, pool in pools.items():
            if images and pool.image not in images:
                near = _nearest(pool.image, images) or f"the images are: {', '.join(images)}"
                raise ValueError(f"{name}: there is no image {pool.image!r}; {near}")
        return pools

    @field_validator("machines")
    @classmethod
    def _on_networks(cls, machines: dict[str, Machine], others: ValidationInfo) -> dict[str, Machine]:
        for name, machine in machines.items():
            for kind, wanted in (("image", machine.image), ("network", machine.network)):
                there = others.data.get(f"{kind}s", {})
                if there and wanted and wanted not in there:
                    near = _nearest(wanted, there) or f"the {kind}s are: {', '.join(there)}"
                    raise ValueError(f"{name}: there is no {kind} {wanted!r}; {near}")
        return machines

    _source: Path = PrivateAttr(default=Path(DEFAULT_NAME))

    @property
    def source(self) -> Path:
        """The file this site was read from."""
        return self._source

    @property
    def directory(self) -> Path:
        """The directory of the site file, which relative paths in it start from."""
        return self._source.parent

    @property
    def artifacts_directory(self) -> Path:
        """Where what was built is kept."""
        return self.directory / self.artifacts.expanduser()

    @property
    def cache_directory(self) -> Path:
        """Where downloads and finished steps are kept."""
        return self.directory / self.cache.expanduser() if self.cache else self.artifacts_directory / ".cache"

    @property
    def bundle_repository(self) -> str | None:
        """The repository of bundles; a directory by its full path."""
        if self.bundles is None or re.match(r"https?://", self.bundles):
            return self.bundles
        return str(self.directory / Path(self.bundles).expanduser())

    def pool(self, name: str | None) -> tuple[str, Pool]:
        """The pool of that name, or the first one of the file, its directory by a full path.

        Raises InputError for an unknown name, or where there is none.
        """
        if not self.pools:
            raise InputError(self.source, None, "there is no pool", "describe one: pools: NAME: {image: …}")
        name = name if name is not None else next(iter(self.pools))
        if name not in self.pools:
            near = _nearest(name, self.pools) or f"the pools are: {', '.join(self.pools)}"
            raise InputError(self.source, None, f"there is no pool {name!r}", near)
        pool = self.pools[name]
        directory = self.directory / pool.directory.expanduser() / name
        desk = pool.desk and pool.desk.model_copy(
            update={
                field: self.directory / path
                for field in ("certificate", "key", "ca", "stations", "client_ca")
                if (path := getattr(pool.desk, field))
            }
        )
        relay = directory / pool.relay.expanduser()
        return name, pool.model_copy(update={"directory": directory, "relay": relay, "desk": desk})

    def machine(self, name: str, options: Mapping[str, object]) -> Machine:
        """The machine of that name, with options (fields of Machine) that come before what the file says.

        Raises InputError for an option that is wrong, or without an image.
        """
        described = self.machines.get(name)
        named = {"image", "bundle"} & set(options)
        if described is None and not named:
            raise InputError(
                self.source,
                None,
                f"there is no machine {name!r}",
                "describe it in machines:, or name its image: --image, or a bundle: --bundle",
            )
        of: dict[str, object] = {}
        if described and not named:
            of = {"bundle": described.bundle} if described.bundle else {"image": described.image}
        try:
            given = Machine.model_validate({**of, **options})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"][:1]))
            said = first["msg"].removeprefix("Value error, ")
            raise VdibuildError(f"{key}: {said} (given: {first['input']!r})" if key else said) from None
        # An image's version says nothing about another one.
        fields = {*options, *(("image", "bundle", "version") if named else ())}
        merged = (
            described.model_copy(update={key: getattr(given, key) for key in fields}) if described else given
        )
        if merged.image:
            self.image(merged.image)
        self.network(merged.network)
        return merged

    def network(self, name: str) -> MachineNetwork:
        """The network of that name, its files by full paths; raises InputError for an unknown name."""
        if name not in self.networks:
            near = _nearest(name, self.networks) or f"the networks are: {', '.join(self.networks)}"
            raise InputError(self.source, None, f"there is no network {name!r}", near)
        network = self.networks[name]
        return network.model_copy(update={"dns": network.dns and _rooted(network.dns, self.directory, "key")})

    def image(self, name: str | None) -> tuple[str, Image]:
        """The image of that name, or the first one of the file; raises InputError for an unknown name."""
        if name is None:
            return next(iter(self.images.items()))
        if name not in self.images:
            near = _nearest(name, self.images) or f"the images are: {', '.join(self.images)}"
            raise InputError(self.source, None, f"there is no image {name!r}", near)
        return name, self.images[name]


AnySystem = TypeVar("AnySystem", bound=System)


def load(path: Path) -> Site:
    """Read and check a site file. Raises InputError naming file, line and key."""
    source = path.resolve()
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            path, None, "there is no site file here", "go to the site's directory, or name one: --site FILE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        _refuse_duplicates(root, path)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(path, mark.line + 1 if mark else None, f"is no YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(path, None, f"is no YAML: {error}") from None
    try:
        site = Site.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often missing as well; what stands in the file is what a person can find.
        first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")[0]
        raise _explained(first, root, path) from None
    site._source = source
    return site.model_copy(
        update={
            "images": {name: _resolved_image(image, source.parent) for name, image in site.images.items()},
            "installer": _resolved(site.installer, source.parent),
            "kiosk": _resolved(site.kiosk, source.parent),
            "keys": _rooted(site.keys, source.parent, "signing"),
        }
    )


def _resolved_image(image: Image, directory: Path) -> Image:
    """An image whose files are named so that they are found from everywhere."""
    update = {"windows": image.windows and _rooted(image.windows, directory, *windows.FILES)}
    return _resolved(image, directory).model_copy(update=update)


def _resolved(system: AnySystem, directory: Path) -> AnySystem:
    """A system whose files are named so that they are found from everywhere."""
    return _rooted(system, directory, "playbook", "keyring")


def _rooted(model: _Any, directory: Path, *names: str) -> _Any:
    paths = {name: getattr(model, name) for name in names}
    rooted = {name: directory / path.expanduser() for name, path in paths.items() if path}
    return model.model_copy(update=rooted)


def schema() -> dict[str, Any]:
    """The JSON Schema of the site file, for editors to complete and check it by."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Site.model_json_schema()}


def _refuse_duplicates(node: yaml.Node | None, path: Path) -> None:
    """YAML lets a later key replace an earlier one without a word; a person meant one of the two."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[object, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(path, line, f"{key.value}: already given in line {seen[key.value]}")
            seen[key.value] = line
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path)


def _explained(error: ErrorDetails, root: yaml.Node | None, path: Path) -> InputError:
    """A validation error as a sentence about a line of the file."""
    location = [part for part in error["loc"] if part != "[key]"]
    line = _line(root, location)
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        hint = _nearest(str(location[-1]), known) or f"known here: {', '.join(known)}"
        return InputError(path, line, f"{key}: unknown key", hint)
    if error["type"] == "missing":
        return InputError(path, line, f"{key}: is missing", _described(location))
    if not location:
        return InputError(path, line, "is empty or no mapping", "see the example vdibuild.yaml")
    said = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (given: {error['input']!r})"
    return InputError(path, line, f"{key}: {said[:1].lower()}{said[1:]}{given}", _described(location))


def _line(node: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """The line of the key at that location, or of the nearest thing around it that exists."""
    line = node.start_mark.line + 1 if node else None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _model_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that describes the mapping at that location; None where the site chooses the keys."""
    described: Any = Site
    for part in location:
        if _is_model(described):
            field = described.model_fields.get(str(part))
            described = field.annotation if field else None
        else:
            described = next(iter(get_args(described)[1:]), None)
        if get_origin(described) in (Union, UnionType):
            # What may be left out is described by the model that it is otherwise.
            described = next(filter(_is_model, get_args(described)), described)
    return described if _is_model(described) else None


def _is_model(described: object) -> bool:
    return isinstance(described, type) and issubclass(described, BaseModel)


def _keys_at(location: Sequence[int | str]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def _described(location: Sequence[int | str]) -> str:
    model = _model_at(location[:-1])
    field = model.model_fields.get(str(location[-1])) if model else None
    return field.description or "" if field else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else ""
