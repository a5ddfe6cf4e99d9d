"""The commands of ``python -m fastattn``: one module each, with `add_arguments` and `main`."""
