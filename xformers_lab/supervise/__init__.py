"""Work in a process of its own, under a limit: whatever it does to that process, a crash in native code, a want of
memory, a hang, the command goes on. `process` is the driver's side, `worker` the other, `limits` how long is too long.
"""
