"""Mechanisms to prove the kit with: right ones, and faults, each a common mistake that one property must name.

A file of faults ends with `FAULTS`, the property that catches each of them, and where some need them `OPTIONS` to
build them with.
"""
