"""The conformance kit: what every attention mechanism must satisfy before the lab times it or believes it.

`run.check` runs the properties of `values`, `masks` and `costs` on a `subject`; `new.new` writes a skeleton that
passes.
"""
