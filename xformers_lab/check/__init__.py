"""The conformance kits: what every choice of a shelf must satisfy before the lab believes it, or times it.

`run.check` runs the properties of `values`, `masks` and `costs` on a `subject`, an attention mechanism; those of
`inside` and of the files of `kits/` on choices of other shelves, inside tiny models; `new.new` writes a skeleton that
passes.
"""

# How a report calls a mistake that an earlier property, which it names, has met already.
SAME = "the same as in "
