"""Positional encodings by name: pure functions that make tables, and the objects that `fastattn.attention` takes.

`fastattn.nn` has a module with the parameters of each.  Everything here lowers to what the kernels know already: a
distance table, rotary tables, a dense bias, or columns appended to queries and keys.
"""
