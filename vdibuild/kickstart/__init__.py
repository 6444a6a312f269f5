"""Kickstarts: rendered from templates by Jinja2, read through pykickstart, checked, and typed.

docs/kickstart.md says what a kickstart may say here, and what each command means.
"""

from vdibuild.kickstart.recipes import parse
from vdibuild.kickstart.templates import render

__all__ = ["parse", "render"]
