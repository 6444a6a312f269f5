"""Windows 10 and 11: installed by their own Setup, which an answer file tells everything.

answers.py renders what Setup and sysprep read, medium.py writes it to a CD-ROM, command.py says how
virt-install makes the machine that installs.
"""

from __future__ import annotations

from pathlib import Path

from vdibuild.errors import VdibuildError
from vdibuild.families.windows import answers, medium
from vdibuild.settings.images import Image
from vdibuild.site import Site


def write_medium(site: Site, name: str, image: Image, path: Path) -> None:
    """Write an image's answers as a CD-ROM. Raises VdibuildError for an image of another family, and
    InputError for files that are missing or not what they should be."""
    if image.windows is None:
        raise VdibuildError(f"image {name!r} is of the family {image.family}: only Windows has answers")
    medium.write(answers.render(image, name, site.directory), image.windows, path)
