"""Property kits of shelves other than attention: what every choice of a shelf must satisfy. One file = one shelf's.

A kit has `subject(choice)`, the choice inside tiny models (tiny.py), and PROPERTIES, functions of it that raise Broken
or NotApplicable; most are those of inside.py.
"""
