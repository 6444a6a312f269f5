"""Renders a kickstart's template; what goes wrong in it is reported with the template's file and line."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2

from vdibuild import resources
from vdibuild.errors import InputError, VdibuildError
from vdibuild.settings.images import Disk, Image, System


def render(path: Path, image: System, name: str, mirrors: Mapping[str, str], site_directory: Path) -> str:
    """The text of a kickstart.

    path: its template; what it includes is looked for in the kickstarts of the site, then in vdibuild's.
    image: the image's settings, as `image`, and each of its variables under its own name. name: the
    image's name. mirrors: where packages come from by role, as `mirror`. site_directory: that of the site
    file. Raises InputError naming the template and its line.
    """
    directories = resources.directories("kickstarts", site_directory)
    home = next((directory for directory in directories if path.is_relative_to(directory)), path.parent)
    if home not in directories:
        directories = [home, *directories]
    # Templates are the site's own files, as trusted as the %post scripts in them, which run as root: no
    # sandbox. Undefined variables are errors, so a misspelt one cannot render as nothing.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directories),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 (a kickstart is no HTML: `&` must stay `&`)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    context: dict[str, object] = {
        "image": image,
        "name": name,
        "release": image.release,
        "mirror": mirrors,
    }
    hidden = sorted(context.keys() & image.variables.keys())
    if hidden:
        raise InputError(
            path,
            None,
            f"the variable {hidden[0]!r} of image {name!r} has the name of a value every kickstart gets",
            f"rename it; taken are: {', '.join(context)}",
        )
    context |= image.variables
    try:
        return environment.get_template(str(path.relative_to(home))).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(error.filename or path, error.lineno, f"template: {error.message}") from None
    except jinja2.TemplateNotFound as error:
        source, line = _place(error, path, directories)
        known = environment.list_templates(filter_func=lambda one: one.endswith(".ks.j2"))
        hint = _nearest(str(error.name), known) or f"there are: {', '.join(known)}"
        raise InputError(source, line, f"there is no template {error.name}", hint) from None
    except jinja2.UndefinedError as error:
        source, line = _place(error, path, directories)
        raise InputError(source, line, f"template: {error.message}", _advice(error, context, name)) from None
    except UnicodeDecodeError as error:
        raise InputError(path, None, f"the template or one it includes is not UTF-8: {error}") from None
    except OSError as error:
        raise InputError(path, None, f"cannot be read: {error}") from None
    except VdibuildError:
        raise  # a mirror that is not configured says itself what to do
    # An expression of a template can raise anything: 1/0, "a" + 1, a filter's wrong argument.
    except Exception as error:
        source, line = _place(error, path, directories)
        raise InputError(source, line, f"template: {type(error).__name__}: {error}") from None


def _place(error: Exception, path: Path, directories: Iterable[Path]) -> tuple[Path, int | None]:
    """Where in a template an error came from: Jinja puts the template's own file and line on the stack."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        source = Path(frame.filename)
        if source.suffix != ".py" and any(source.is_relative_to(directory) for directory in directories):
            return source, frame.lineno
    return path, None


def _advice(error: jinja2.UndefinedError, context: Mapping[str, object], name: str) -> str:
    """What to do about an undefined variable, or attribute of one."""
    message = error.message or ""
    variable = re.search(r"^'(\w+)' is undefined", message)
    if variable:
        near = _nearest(variable[1], context)
        define = f"define it in vdibuild.yaml: images: {name}: variables: {variable[1]}: …"
        return f"{near} else {define}" if near else define
    attribute = re.search(r"has no attribute '(\w+)'", message)
    mirrors = context["mirror"]
    known = [
        *Image.model_fields,
        *Disk.model_fields,
        *(mirrors if isinstance(mirrors, dict) else ()),
    ]
    return _nearest(attribute[1], known) if attribute else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {close[0]}?" if close else ""
