"""The contract of attention: base classes of mechanisms, from a layer of any kind to one head of one sequence."""
