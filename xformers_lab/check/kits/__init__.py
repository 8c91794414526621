"""Property kits of shelves other than attention: what every choice of a shelf must satisfy. One file = one shelf's.

A kit has PROPERTIES, functions of a choice inside tiny models (inside.py) that raise Broken or NotApplicable, and may
have `words(choice)`, what a config says to have the choice, and LAYERS, the numbers of layers to try.
"""
