"""The pool: a clean one-time machine for everyone who sits down."""
