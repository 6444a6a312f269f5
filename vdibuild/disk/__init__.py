"""A disk from a tree: its layout, its file systems, its boot loader."""
