"""Plugins that ansible-playbook loads; it runs on a Python of its own, so they import nothing of vdibuild."""
