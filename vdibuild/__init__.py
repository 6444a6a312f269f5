"""vdibuild: from a kickstart to golden images that have booted."""
