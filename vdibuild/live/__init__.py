"""Live systems: a root file system becomes a squashfs, that with a kernel an ISO that boots everywhere."""
