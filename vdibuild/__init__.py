"""vdibuild: from a kickstart to golden images that have booted.

The modules are the interface: `vdibuild.site.load`, `vdibuild.golden.build`, and the parts they are made of.
docs/library.md shows them at work.
"""

__version__ = "0.1.0"
