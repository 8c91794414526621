"""Mechanisms that go wrong as compiled code can: each a file that is given as a choice by its path."""
